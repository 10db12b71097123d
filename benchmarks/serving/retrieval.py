"""The service beside raw FAISS and LMDB in process, a gRPC echo, a server of forty lines and other engines.

    python -m benchmarks.serving.retrieval [--entries 200000 1000000] [--directory DIR] [--data DATA]
                                           [--others PYTHON] [--quick]

Each size has one store, with an exact index and with an HNSW tuned to recall@5 (`prepared_stores.py`). For
each store: the time to the first answer of a fresh process (`cold_start.py`); then a comparison of the
answers of all ways to query, and an end if they differ (`same_answers.py`); then the rows, measured in turn,
in rounds: medians, lowest and highest. In every row the load runs in its own process and shares the cores
with the server.

DATA is the folder that holds flickr8k/, for the figures by image (`flickr8k.py`). PYTHON is the interpreter
of an environment with other engines (`other_engines.py` lists them), measured over the first size. The report
names what is left out. --directory keeps the stores for the next run.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.processes import cpu_seconds, running_server
from benchmarks.report import arguments_parser, table, write
from benchmarks.serving import cold_start, engine_comparison, flickr8k
from benchmarks.serving.callers import (
    CHANNEL_OPTIONS,
    RETRIEVE,
    LoadProcess,
    async_callers,
    call_seconds,
    one_caller,
    percentiles,
    stream_caller,
    threads_in_process,
)
from benchmarks.serving.comparison_servers import echo_server, forty_line_server, in_processes
from benchmarks.serving.prepared_stores import CURRENT, FLAT, build_seconds, prepare
from benchmarks.serving.query_paths import K, engine_in_process, raw_faiss_lmdb, request_messages
from benchmarks.serving.same_answers import check
from benchmarks.synthetic import fingerprint, queries

DIMENSION = 512
RAW, ENGINE = "raw FAISS + LMDB, in process", "our engine, in process"
POOL_ECHO, AIO_ECHO = "bare gRPC echo, thread pool", "bare gRPC echo, asyncio on uvloop"
SMALL, OURS, TWO = "a server of forty lines", "tagstore serve", "tagstore serve, 2 workers"
P50, P99, EIGHT, SIXTY_FOUR, BATCH, STREAM, CPU = (
    "p50 ms", "p99 ms", "8 clients, /s", "64 clients, /s", "batch 64, /s", "stream, 64 ahead, /s",
    "server's CPU, us a query",
)  # fmt: skip
DIGITS = {P50: 3, P99: 3, EIGHT: 0, SIXTY_FOUR: 0, BATCH: 0, STREAM: 0, CPU: 0}
MAX_INDEX_SECONDS = 200.0
"""Seconds after which no further round of an index begins."""


class Rows:
    """Figures by row and column, over rounds."""

    def __init__(self) -> None:
        self.figures: dict[tuple[str, str], list[float]] = {}
        self.rounds = 0

    def add(self, row: str, column: str, value: float) -> None:
        self.figures.setdefault((row, column), []).append(value)

    def median(self, row: str, column: str) -> float:
        return float(np.median(self.figures.get((row, column), [float("nan")])))

    def ratio(self, row: str, column: str, other_row: str, other_column: str = "") -> str:
        return f"{self.median(row, column) / self.median(other_row, other_column or column):.2f}"

    def table(self) -> str:
        names = dict.fromkeys(row for row, _ in self.figures)
        return table(["", *DIGITS], [[row, *(self._cell(row, column) for column in DIGITS)] for row in names])

    def _cell(self, row: str, column: str) -> str:
        values, digits = self.figures.get((row, column)), DIGITS[column]
        if not values:
            return ""
        return f"{np.median(values):,.{digits}f} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


@dataclass
class MeasuredServer:
    """A server and the columns that are measured of it."""

    name: str
    address: str
    pids: Sequence[int]
    columns: Sequence[str]

    def measure(
        self, rows: Rows, singles: list[bytes], batches: list[bytes], seconds: float, load: LoadProcess
    ) -> None:
        if P50 in self.columns:
            p50, p99 = load(one_caller, self.address, singles, seconds)
            rows.add(self.name, P50, p50)
            rows.add(self.name, P99, p99)
        before = cpu_seconds(*self.pids)
        rate = load(async_callers, self.address, singles, 8, seconds)
        rows.add(self.name, CPU, (cpu_seconds(*self.pids) - before) / rate.calls * 1e6)
        rows.add(self.name, EIGHT, rate.per_second)
        rows.add(self.name, SIXTY_FOUR, load(async_callers, self.address, singles, 64, seconds).per_second)
        if BATCH in self.columns:
            rows.add(self.name, BATCH, load(async_callers, self.address, batches, 2, seconds).per_second * 64)
        if STREAM in self.columns:
            rows.add(self.name, STREAM, load(stream_caller, self.address, singles, 64, seconds).per_second)


def compare(
    root: Path, version: int, vectors: np.ndarray, rounds: int, seconds: float, load: LoadProcess
) -> tuple[Rows, dict[str, float]]:
    """The rows of one index, and the recall of each way to query it."""
    digest, exact = fingerprint(vectors.shape[1]).digest, version == FLAT
    singles, batches = (request_messages(vectors, n, digest, version=version) for n in (1, 64))
    rows = Rows()
    with ExitStack() as stack:
        one, pid = stack.enter_context(running_server(root, "--workers", "1"))
        two, pid_of_two = stack.enter_context(running_server(root, "--workers", "2"))
        small, pids = stack.enter_context(in_processes(forty_line_server, str(root), version))
        addresses = {"one worker": one, "two workers": two}
        shares = check(root, version, addresses, small, vectors, 64 if exact else 200)
        servers = [
            MeasuredServer(SMALL, small, pids, (P50, BATCH)),
            MeasuredServer(OURS, one, [pid], (P50, BATCH, STREAM)),
            MeasuredServer(TWO, two, [pid_of_two], (BATCH,)),
        ]
        if not exact:  # an echo has no index: measured once
            with grpc.insecure_channel(one, CHANNEL_OPTIONS) as channel:
                answer = channel.unary_unary(RETRIEVE)(singles[0])
            for name, api in ((AIO_ECHO, "aio, uvloop"), (POOL_ECHO, "sync pool")):
                address, pids = stack.enter_context(in_processes(echo_server, api, answer, 0.0))
                servers.insert(0, MeasuredServer(name, address, pids, (P50, STREAM)))
        in_process = {RAW: raw_faiss_lmdb(root, version), ENGINE: engine_in_process(root, version)}
        start = time.perf_counter()
        while rows.rounds < rounds:
            expected = (time.perf_counter() - start) * (1 + 1 / max(1, rows.rounds))
            if expected >= MAX_INDEX_SECONDS:
                break
            for name, query in in_process.items():
                p50, p99 = percentiles(call_seconds(partial(_query_one, query, vectors), seconds))
                rows.add(name, P50, p50)
                rows.add(name, P99, p99)
                before = time.process_time()
                rate = threads_in_process(query, vectors, 8, 1, seconds)
                rows.add(name, CPU, (time.process_time() - before) / rate.calls * 1e6)
                rows.add(name, EIGHT, rate.per_second)
                rows.add(name, BATCH, threads_in_process(query, vectors, 1, 64, seconds).per_second)
            for server in servers:
                server.measure(rows, singles, batches, seconds, load)
            rows.rounds += 1
    return rows, shares


def _query_one(query: Callable[[np.ndarray], Any], vectors: np.ndarray, i: int) -> Any:
    return query(vectors[i % len(vectors)][None])


def targets(rows: Rows, echo_p50: float) -> str:
    """The targets beside the measured ratios."""
    added = rows.median(OURS, P50) - echo_p50 - rows.median(RAW, P50)
    cores = "1.7 where cores allow"
    return table(
        ["figure", "value", "target"],
        [
            ["p50 added to the faster echo + raw search", f"{added:.2f} ms", "at most 0.3 ms"],
            ["8 clients, beside the server of forty lines", rows.ratio(OURS, EIGHT, SMALL), "above 1"],
            ["64 clients, beside the server of forty lines", rows.ratio(OURS, SIXTY_FOUR, SMALL), "above 1"],
            ["batch 64, beside raw in process", rows.ratio(OURS, BATCH, RAW), "at least 0.95"],
            [
                "stream, beside raw in process, batch 64",
                rows.ratio(OURS, STREAM, RAW, BATCH),
                "at least 0.95",
            ],
            ["2 workers, beside 1, 8 clients", rows.ratio(TWO, EIGHT, OURS), cores],
            ["2 workers, beside 1, 64 clients", rows.ratio(TWO, SIXTY_FOUR, OURS), cores],
        ],
    )


def store_report(root: Path, n: int, arguments: argparse.Namespace, load: LoadProcess) -> list[str]:
    """The parts of the report on one store."""
    vectors = queries(2048, n, DIMENSION)
    digest = fingerprint(DIMENSION).digest
    [message] = request_messages(vectors[:1], 1, digest)
    # first of all: later this process has the store open, and its pages stay in memory
    parts = [cold_start.report(root, n, digest, vectors[0], message, min(3, arguments.rounds))]
    echo_p50 = float("nan")
    for version, title in ((CURRENT, "HNSW"), (FLAT, "exact")):
        print(f"{n:,} entries, {title} ...", flush=True)
        rows, shares = compare(root, version, vectors, arguments.rounds, arguments.seconds, load)
        if version == CURRENT:
            echo_p50 = min(rows.median(name, P50) for name in (POOL_ECHO, AIO_ECHO))
        recalls = ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
        parts += [
            f"## {n:,} entries, {title}",
            f"Recall@{K}: {recalls}. {rows.rounds} rounds.",
            rows.table(),
            targets(rows, echo_p50),
        ]
    answers = engine_in_process(root)(vectors[:200])
    fifth = float(np.median([answer.neighbours[-1].similarity for answer in answers]))
    return [f"{n:,} entries: the fifth neighbour is at cosine {fifth:.2f} (median).", *parts]


def announce(arguments: argparse.Namespace, directory: Path) -> str:
    """The expected duration."""
    minutes = [f"building {build_seconds(directory, arguments.entries) / 60:.0f}"]
    scale = arguments.seconds / 1.5 * arguments.rounds / 3
    minutes.append(f"figures {len(arguments.entries) * (1 + scale * 2 * MAX_INDEX_SECONDS / 60):.0f}")
    if arguments.data:
        minutes.append(f"Flickr8k {1 if flickr8k.is_prepared(directory) else 4}")
    if arguments.others:
        n = arguments.entries[0]
        seconds = engine_comparison.expected_seconds(directory / "others" / str(n), n)
        minutes.append(f"other engines {seconds / 60:.0f}")
    return f"At most about, in minutes: {', '.join(minutes)}."


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--entries", type=int, nargs="+", default=[200_000, 1_000_000])
    parser.add_argument(
        "--rounds", type=int, default=3, help="at most; fewer if an index would take over 200 s"
    )
    parser.add_argument("--seconds", type=float, default=1.5, help="of each figure")
    parser.add_argument("--data", type=Path, help="folder that holds flickr8k/")
    parser.add_argument("--others", metavar="PYTHON", help="interpreter with other engines")
    parser.add_argument("--directory", type=Path, help="where stores are built and kept")
    parser.add_argument(
        "--quick", action="store_true", help="20,000 entries, one round of half seconds, not kept"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.entries, arguments.rounds, arguments.seconds = [20_000], 1, 0.5
    with tempfile.TemporaryDirectory() as scratch, LoadProcess() as load:
        directory = arguments.directory or Path(scratch)
        print(announce(arguments, directory), flush=True)
        start = time.perf_counter()
        roots = prepare(directory, arguments.entries, DIMENSION)
        built = time.perf_counter()
        parts = [part for n in arguments.entries for part in store_report(roots[n], n, arguments, load)]
        parts.append("## By image: Flickr8k")
        if arguments.data:
            root = flickr8k.prepare(directory, arguments.data)
            parts.append(flickr8k.report(root, arguments.data, arguments.seconds, arguments.rounds, load))
        else:
            parts.append("Left out; pass --data, the folder that holds flickr8k/.")
        n = arguments.entries[0]
        parts.append(f"## Beside other engines, {n:,} entries")
        if arguments.others:
            folder, vectors = directory / "others" / str(n), queries(2048, n, DIMENSION)
            parts.append(
                engine_comparison.report(arguments.others, roots[n], folder, vectors, arguments.seconds, load)
            )
        else:
            engines = "`benchmarks/serving/other_engines.py` lists them"
            parts.append(f"Left out; pass --others, an interpreter with other engines ({engines}).")
        took = time.perf_counter() - start
    about = (
        f"Vectors of {DIMENSION} dimensions, {K} neighbours, queries that are near-duplicates of entries. "
        f"Medians, lowest and highest in parentheses. Load and server share {os.cpu_count()} cores, so rates "
        "are of both together; the server's CPU is its user and system time with 8 clients, workers summed, "
        "in process also that of the querying threads. Answers of all ways to query were compared: equal. "
        f"Built in {(built - start) / 60:.0f} min, {took / 60:.0f} min in all. Load average at the end "
        f"{os.getloadavg()[0]:.1f}."
    )
    packages = ("grpcio", "faiss-cpu", "lmdb", "numpy", "protobuf", "uvloop")
    title = "Retrieval: the service beside its parts"
    write("retrieval", title, about, *parts, packages=packages, keep=not arguments.quick)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
