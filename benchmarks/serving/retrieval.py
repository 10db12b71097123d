"""What the service adds to its parts: raw FAISS and LMDB in process, a bare gRPC echo, a server of forty lines, other engines; in one run.

    python -m benchmarks.serving.retrieval [--entries 200000 1000000] [--directory DIR] [--data DATA] [--others PYTHON] [--quick]

Of each size there is one store with an exact index and an HNSW tuned to recall@5 (`prepared_stores.py`). For each: the time to the first answer of a
fresh process (`cold_start.py`); then the answers of every way to ask are compared, and nothing is timed if they differ; then the rows are
measured in turn, in rounds: medians, lowest and highest. The load runs in a process of its own, and shares the cores with the server, in
every row alike. DATA is the folder that holds flickr8k/, for the figures by image (`flickr8k.py`). PYTHON is the interpreter of an environment
that has what users would pick instead (`other_engines.py` says which), measured over the first of the sizes. What is left out is said.

How long it takes is said at the start. --directory keeps what was built, so that it is built once.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.report import table, write
from benchmarks.serving import cold_start, engine_comparison, flickr8k
from benchmarks.serving.callers import (
    LOCAL,
    RETRIEVE,
    Apart,
    callers,
    one_caller,
    percentiles,
    streamed,
    threads,
    timed,
)
from benchmarks.serving.prepared_stores import CURRENT, FLAT, needed, prepared
from benchmarks.serving.query_paths import K, in_process, raw, requests_of
from benchmarks.serving.same_answers import check
from benchmarks.serving.servers import child_server, cpu_seconds, echo, minimal, ours
from benchmarks.synthetic import fingerprint, queries

DIMENSION = 512
RAW, ENGINE = "raw FAISS + LMDB, in process", "our engine, in process"
POOL_ECHO, AIO_ECHO = "bare gRPC echo, thread pool", "bare gRPC echo, asyncio on uvloop"
SMALL, OURS, TWO = "a server of forty lines", "tagstore serve", "tagstore serve, 2 workers"
P50, P99, EIGHT, SIXTY_FOUR, BATCH, STREAM, CPU = (
    "p50 ms", "p99 ms", "8 clients, /s", "64 clients, /s", "batch 64, /s", "stream, 64 ahead, /s", "server's CPU, us a query",
)  # fmt: skip
DIGITS = {P50: 3, P99: 3, EIGHT: 0, SIXTY_FOUR: 0, BATCH: 0, STREAM: 0, CPU: 0}
LONGEST = 200.0
"""Seconds after which no further round of an index is begun."""


class Rows:
    """Figures by row and column, over rounds."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], list[float]] = {}
        self.rounds = 0

    def add(self, row: str, column: str, value: float) -> None:
        self.found.setdefault((row, column), []).append(value)

    def median(self, row: str, column: str) -> float:
        return float(np.median(self.found.get((row, column), [float("nan")])))

    def ratio(self, row: str, column: str, other: str, other_column: str) -> str:
        return f"{self.median(row, column) / self.median(other, other_column):.2f}"

    def table(self) -> str:
        names = list(dict.fromkeys(row for row, _ in self.found))
        return table(["", *DIGITS], [[row, *(self._cell(row, column) for column in DIGITS)] for row in names])

    def _cell(self, row: str, column: str) -> str:
        values, digits = self.found.get((row, column)), DIGITS[column]
        if not values:
            return ""
        return f"{np.median(values):,.{digits}f} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


class Server:
    """A server and what it is asked."""

    def __init__(self, name: str, address: str, pids: Sequence[int], columns: Sequence[str]) -> None:
        self.name, self.address, self.pids, self.columns = name, address, pids, columns

    def measure(
        self, rows: Rows, ones: list[bytes], batches: list[bytes], seconds: float, apart: Apart
    ) -> None:
        if P50 in self.columns:
            for column, value in zip((P50, P99), apart(one_caller, self.address, ones, seconds), strict=True):
                rows.add(self.name, column, value)
        before = cpu_seconds(*self.pids)
        rate = apart(callers, self.address, ones, 8, seconds)
        rows.add(self.name, CPU, (cpu_seconds(*self.pids) - before) / rate.calls * 1e6)
        rows.add(self.name, EIGHT, rate.per_second)
        rows.add(self.name, SIXTY_FOUR, apart(callers, self.address, ones, 64, seconds).per_second)
        if BATCH in self.columns:
            rows.add(self.name, BATCH, apart(callers, self.address, batches, 2, seconds).per_second * 64)
        if STREAM in self.columns:
            rows.add(self.name, STREAM, apart(streamed, self.address, ones, 64, seconds).per_second)


def compare(
    root: Path, version: int, vectors: np.ndarray, rounds: int, seconds: float, apart: Apart
) -> tuple[Rows, dict[str, float]]:
    """All ways to ask one index, and the recall of each."""
    digest, exact = fingerprint(vectors.shape[1]).digest, version == FLAT
    ones, batches = (requests_of(vectors, n, digest, version=version) for n in (1, 64))
    rows = Rows()
    with ExitStack() as stack:
        one, pid = stack.enter_context(ours(root, "--workers", "1"))
        two, pid_of_two = stack.enter_context(ours(root, "--workers", "2"))
        small, pids = stack.enter_context(child_server(minimal, str(root), version))
        shares = check(
            root, version, {"one worker": one, "two workers": two}, small, vectors, 64 if exact else 200
        )
        servers = [
            Server(SMALL, small, pids, (P50, BATCH)),
            Server(OURS, one, [pid], (P50, BATCH, STREAM)),
            Server(TWO, two, [pid_of_two], (BATCH,)),
        ]
        if not exact:  # an echo has no index: measured once
            answer = _answer(one, ones[0])
            for name, face in ((AIO_ECHO, "aio, uvloop"), (POOL_ECHO, "sync pool")):
                where, pids = stack.enter_context(child_server(echo, face, answer, 0.0))
                servers.insert(0, Server(name, where, pids, (P50, STREAM)))
        inside = {RAW: raw(root, version), ENGINE: in_process(root, version)}
        start = time.perf_counter()
        while (
            rows.rounds < rounds and (time.perf_counter() - start) * (1 + 1 / max(1, rows.rounds)) < LONGEST
        ):
            for name, ask in inside.items():
                p50, p99 = percentiles(timed(partial(_one, ask, vectors), seconds))
                rows.add(name, P50, p50)
                rows.add(name, P99, p99)
                before = time.process_time()
                rate = threads(ask, vectors, 8, 1, seconds)
                rows.add(name, CPU, (time.process_time() - before) / rate.calls * 1e6)
                rows.add(name, EIGHT, rate.per_second)
                rows.add(name, BATCH, threads(ask, vectors, 1, 64, seconds).per_second)
            for server in servers:
                server.measure(rows, ones, batches, seconds, apart)
            rows.rounds += 1
    return rows, shares


def _one(ask: Callable[[np.ndarray], Any], vectors: np.ndarray, i: int) -> Any:
    return ask(vectors[i % len(vectors)][None])


def _answer(address: str, message: bytes) -> bytes:
    with grpc.insecure_channel(address, LOCAL) as channel:
        data: bytes = channel.unary_unary(RETRIEVE)(message)
    return data


def ratios(rows: Rows, echo_p50: float) -> str:
    """What is wanted, beside what came out."""
    added = rows.median(OURS, P50) - echo_p50 - rows.median(RAW, P50)
    return table(
        ["figure", "value", "target"],
        [
            ["p50 added over the quicker echo + raw search", f"{added:.2f} ms", "0.3 ms at most"],
            ["8 clients, beside the server of forty lines", rows.ratio(OURS, EIGHT, SMALL, EIGHT), "above 1"],
            [
                "64 clients, beside the server of forty lines",
                rows.ratio(OURS, SIXTY_FOUR, SMALL, SIXTY_FOUR),
                "above 1",
            ],
            ["batch 64, beside raw in process", rows.ratio(OURS, BATCH, RAW, BATCH), "0.95 at least"],
            [
                "stream, beside raw in process, batch 64",
                rows.ratio(OURS, STREAM, RAW, BATCH),
                "0.95 at least",
            ],
            ["2 workers, beside 1, 8 clients", rows.ratio(TWO, EIGHT, OURS, EIGHT), "1.7 where cores allow"],
            [
                "2 workers, beside 1, 64 clients",
                rows.ratio(TWO, SIXTY_FOUR, OURS, SIXTY_FOUR),
                "1.7 where cores allow",
            ],
        ],
    )


def of_size(root: Path, n: int, arguments: argparse.Namespace, apart: Apart) -> list[str]:
    """The report on one store."""
    vectors = queries(2048, n, DIMENSION)
    digest = fingerprint(DIMENSION).digest
    # first of all: later, this process has the store open, and its pages stay in memory
    parts = [
        cold_start.report(
            root, n, digest, vectors[0], requests_of(vectors[:1], 1, digest)[0], min(3, arguments.rounds)
        )
    ]
    echo_p50 = float("nan")
    for version, title in ((CURRENT, "HNSW"), (FLAT, "exact")):
        print(f"{n:,} entries, {title} ...", flush=True)
        rows, shares = compare(root, version, vectors, arguments.rounds, arguments.seconds, apart)
        if version == CURRENT:
            echo_p50 = min(rows.median(name, P50) for name in (POOL_ECHO, AIO_ECHO))
        recalls = (
            f"Recall@{K}: "
            + ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
            + f". {rows.rounds} rounds."
        )
        parts += [f"## {n:,} entries, {title}", recalls, rows.table(), ratios(rows, echo_p50)]
    fifth = float(np.median([answer.neighbours[-1].similarity for answer in in_process(root)(vectors[:200])]))
    return [f"{n:,} entries: the fifth neighbour is at cosine {fifth:.2f} (median).", *parts]


def said_before(arguments: argparse.Namespace, directory: Path) -> str:
    """How long it will take."""
    minutes = [f"building {needed(directory, arguments.entries) / 60:.0f}"]
    scale = arguments.seconds / 1.5 * arguments.rounds / 3
    minutes.append(f"figures {len(arguments.entries) * (1 + scale * 2 * LONGEST / 60):.0f}")
    if arguments.data:
        minutes.append(f"Flickr8k {1 if (directory / 'real' / 'ingested').exists() else 4}")
    if arguments.others:
        n = arguments.entries[0]
        minutes.append(f"others {engine_comparison.needed(directory / 'others' / str(n), n) / 60:.0f}")
    return f"At most about, in minutes: {', '.join(minutes)}."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entries", type=int, nargs="+", default=[200_000, 1_000_000])
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="at most; one that would take an index beyond 200 s is not begun",
    )
    parser.add_argument("--seconds", type=float, default=1.5, help="of each figure")
    parser.add_argument("--data", type=Path, help="folder that holds flickr8k/")
    parser.add_argument("--others", metavar="PYTHON", help="interpreter with other engines")
    parser.add_argument("--directory", type=Path, help="where stores are made, and kept")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="20,000 entries, one round of half seconds, not kept: to see that it runs",
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.entries, arguments.rounds, arguments.seconds = [20_000], 1, 0.5
    with tempfile.TemporaryDirectory() as scratch, Apart() as apart:
        directory = arguments.directory or Path(scratch)
        print(said_before(arguments, directory), flush=True)
        start = time.perf_counter()
        roots = prepared(directory, arguments.entries, DIMENSION)
        built = time.perf_counter()
        parts = [part for n in arguments.entries for part in of_size(roots[n], n, arguments, apart)]
        parts.append("## By image: Flickr8k")
        if arguments.data:
            parts.append(
                flickr8k.report(
                    flickr8k.prepared(directory, arguments.data),
                    arguments.data,
                    arguments.seconds,
                    arguments.rounds,
                    apart,
                )
            )
        else:
            parts.append("Left out; pass --data, the folder that holds flickr8k/.")
        parts.append(f"## Beside other engines, {arguments.entries[0]:,} entries")
        if arguments.others:
            n = arguments.entries[0]
            vectors = queries(2048, n, DIMENSION)
            parts.append(
                engine_comparison.report(
                    arguments.others,
                    roots[n],
                    directory / "others" / str(n),
                    vectors,
                    arguments.seconds,
                    apart,
                )
            )
        else:
            parts.append(
                "Left out; pass --others, an interpreter that has them (`benchmarks/serving/other_engines.py` says which)."
            )
        took = time.perf_counter() - start
    about = (
        f"Vectors of {DIMENSION} dimensions, {K} neighbours, queries that are near-duplicates of entries. Medians, lowest and highest in "
        f"parentheses. Load and server share {os.cpu_count()} cores, so rates are of both together; the server's CPU is its user and "
        f"system time with 8 clients, workers summed, in process that of the asking threads too. Answers of all ways to ask were compared: "
        f"equal. Built in {(built - start) / 60:.0f} min, {took / 60:.0f} min in all. Load average at the end {os.getloadavg()[0]:.1f}."
    )
    packages = ("grpcio", "faiss-cpu", "lmdb", "numpy", "protobuf", "uvloop")
    write(
        "retrieval",
        "Retrieval: the service beside its parts",
        about,
        *parts,
        packages=packages,
        keep=not arguments.quick,
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
