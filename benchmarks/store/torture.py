"""Everything that may befall stores, at once, with readers that compare every answer with an oracle.

    python -m benchmarks.store.torture [--minutes 20] [--seed 0] [--report PATH]

Three stores of one root, each with a writer that ingests, deletes, purges, compacts, rolls back, changes the
encoder and exports; it is killed at random instants. Copies of the stores are damaged, or mounted read-only.
A `tagstore serve` answers for the root; callers send it noise, damaged and huge messages, and streams without
any. Two readers, over gRPC and in process, compare each answer with an exact search over what the version
must hold. A client asks a server that lies.

Nothing acknowledged may be lost, no answer may be wrong, nothing may take longer than a minute, and the
processes must stay within the bounds of memory below. Exits with 1 otherwise, and leaves the stores.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.processes import private_mib, running_server
from benchmarks.report import arguments_parser, table, write
from benchmarks.serving.hostile import Attacks, deceive
from benchmarks.store import torture_readers, torture_writers
from benchmarks.store.torture_readers import DEADLINE, Findings, crash

STORES = ("one", "two", "three")
SERVER_MIB, WORKER_MIB = 1536, 512
"""Private memory that the server may take over what it takes idle, and a reader or writer at all."""
TOKEN = "a token of somebody who may read everything"
SAMPLE_SECONDS = 1.0


def attack(address: str, seed: int, seconds: float) -> Findings:
    attacks = Attacks(address, STORES[0], crash.SPACES["first"].digest, crash.D, TOKEN, seed)
    attacks.run(seconds)
    return Findings(attacks.counts, wrong=attacks.trouble)


def ask_a_liar(seconds: float) -> Findings:
    logging.disable(logging.WARNING)
    counts, trouble = deceive(seconds)
    return Findings(counts, wrong=trouble)


def _work(queue: Any, name: str, work: Callable[..., Findings], arguments: tuple[Any, ...]) -> None:
    try:
        findings = work(*arguments)
    except BaseException as error:  # a process that ends by itself is a finding
        logging.exception(name)
        findings = Findings(wrong=[f"{name} ended with {error!r}"])
    queue.put((name, findings))


def torture(
    directory: Path, seed: int, seconds: float
) -> tuple[dict[str, Findings], dict[str, float], float]:
    """Run it all; returns what each process found, its peak of memory in MiB, and the idle server's."""
    root, tokens = directory / "root", directory / "tokens.json"
    # the server imports torch when it warms a store: later, that would take long beside all this
    crash.ingest(root, crash.ingest_of("first", "warm", [[("key", 1)]]))
    caller = {"name": "reader", "token": TOKEN, "stores": {"*": "read"}}
    tokens.write_text(json.dumps({"callers": [caller]}))
    os.environ["TAGSTORE_TOKEN"] = TOKEN
    journals = [directory / f"{store}.journal" for store in STORES]
    for journal in journals:
        journal.touch()
    with (directory / "server.log").open("w") as log:
        options = ("--workers", "1", "--tokens", str(tokens))
        with running_server(root, *options, stderr=log) as (address, pid):
            place, idle = f"grpc://{address}", private_mib(pid)
            jobs: dict[str, tuple[Callable[..., Findings], tuple[Any, ...]]] = {
                "reader over gRPC": (torture_readers.read, (place, journals, seed, seconds)),
                "reader in process": (torture_readers.read, (f"file://{root}", journals, seed + 1, seconds)),
                "hostile callers": (attack, (address, seed, seconds)),
                "client of a lying server": (ask_a_liar, (seconds,)),
            }
            for number, (store, journal) in enumerate(zip(STORES, journals, strict=True)):
                scratch = directory / f"scratch-{store}"
                scratch.mkdir()
                arguments = (root, store, scratch, journal, 10 * seed + number, seconds, place)
                jobs[f"writer of {store}"] = (torture_writers.write, arguments)
            findings, peaks = _run(jobs, pid, seconds)
    faults = Counter(
        line for line in (directory / "server.log").read_text().splitlines() if "Traceback" in line
    )
    findings["server"] = Findings(wrong=["the server logged a fault: see server.log"] if faults else [])
    return findings, peaks, idle


def _run(
    jobs: dict[str, tuple[Callable[..., Findings], tuple[Any, ...]]], server: int, seconds: float
) -> tuple[dict[str, Findings], dict[str, float]]:
    """Run each job in a process, for some seconds and the deadline; sample everybody's memory meanwhile."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = {name: context.Process(target=_work, args=(queue, name, *job)) for name, job in jobs.items()}
    for process in processes.values():
        process.start()
    pids = {name: process.pid or 0 for name, process in processes.items()} | {"server": server}
    findings: dict[str, Findings] = {}
    peaks: dict[str, float] = {}
    end = time.monotonic() + seconds + 4 * DEADLINE
    while len(findings) < len(jobs) and time.monotonic() < end:
        for name, pid in pids.items():
            try:
                peaks[name] = max(peaks.get(name, 0.0), private_mib(pid))
            except (OSError, KeyError):
                continue  # it or a child of it has ended
        while not queue.empty():
            name, found = queue.get()
            findings[name] = found
        time.sleep(SAMPLE_SECONDS)
    for name, process in processes.items():
        if name not in findings:
            state = f"ended with {process.exitcode}" if process.exitcode else "did not end in time"
            findings[name] = Findings(hangs=[f"{name} {state}"])
            process.kill()
        process.join()
    return findings, peaks


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="where the report goes; by default to benchmarks/results")
    parser.add_argument("--directory", help="where the stores are made; kept if anything was wrong")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="torture-", dir=arguments.directory))
    start = time.perf_counter()
    findings, peaks, idle = torture(directory, arguments.seed, arguments.minutes * 60)
    bounds = {name: idle + SERVER_MIB if name == "server" else WORKER_MIB for name in peaks}
    bounds["hostile callers"] = float("inf")  # what they take is theirs
    exceeded = [f"{name}: {peak:.0f} MiB" for name, peak in peaks.items() if peak > bounds[name]]
    counts = sum((found.counts for found in findings.values()), Counter[str]())
    problems = {
        "lost": [text for found in findings.values() for text in found.lost],
        "wrong": [text for found in findings.values() for text in found.wrong],
        "hangs": [text for found in findings.values() for text in found.hangs],
        "processes beyond their bound of memory": exceeded,
    }
    about = (
        f"{len(STORES)} stores of one root, {time.perf_counter() - start:.0f} s, seed {arguments.seed}. "
        f"What takes longer than {DEADLINE:.0f} s counts as a hang."
    )
    memory = [
        (name, f"{peak:.0f}", "" if name == "hostile callers" else f"{bounds[name]:.0f}")
        for name, peak in sorted(peaks.items())
    ]
    write(
        "torture",
        "Stores, server and client under everything at once",
        about,
        table(
            ["must be 0", "count"], [[f"**{name}**", f"**{len(texts)}**"] for name, texts in problems.items()]
        ),
        table(["what happened", "times"], [(name, f"{count:,}") for name, count in sorted(counts.items())]),
        table(["private memory, MiB", "peak", "bound"], memory),
        *(f"    {name}: {text}" for name, texts in problems.items() for text in texts[:20]),
        packages=("lmdb", "faiss-cpu", "numpy", "grpcio"),
        path=arguments.report,
    )
    if any(problems.values()):
        sys.exit(f"seed {arguments.seed}: something did not hold; stores and server.log are in {directory}")
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
