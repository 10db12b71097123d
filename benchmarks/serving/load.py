"""A server under load: new versions, stores that come and go, bad requests, overload, SIGTERM, kill -9.

    python -m benchmarks.serving.load [--minutes 10] [--directory DIR] [--quick]

1. Capacity: calls a second of 16 connections that send their next request when they have an answer; the
   lowest of several windows.
2. Steady: 80 % of that, each request when it is due, for --minutes. Meanwhile entries are deleted, versions
   rolled back, another store is unloaded and loaded, and 1 % of the requests are bad. Every good answer is
   compared in all fields with the one its version must give; every bad request must be refused. The server's
   private memory must stay flat.
3. Overload: three times the capacity. Admitted calls must not wait long; all others must get
   RESOURCE_EXHAUSTED and a time to retry.
4. SIGTERM under load: calls in flight, long exact searches among them, must be answered.
5. kill -9 of one of two workers under load: the other continues, a second one starts, and nothing fails once
   the callers have connected again.

A load that shares two cores with its server is late itself when there is too much of it. So a caller beside
it, in its own process, measures the waits that count. Exits with 1 if anything that must hold does not.
--directory keeps the store, as in `retrieval.py`.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np

from benchmarks.processes import private_mib, running_server
from benchmarks.report import arguments_parser, table, write
from benchmarks.serving.callers import CHANNEL_OPTIONS, RETRIEVE, LoadProcess
from benchmarks.serving.checked_requests import CONNECTIONS, Expected, Load, Probed, Tally, probe
from benchmarks.serving.prepared_stores import build_seconds, prepare
from benchmarks.synthetic import STORE, build, queries
from tagstore.client.admin import administer

DIMENSION = 512
PROBES_PER_SECOND = 50.0
"""Calls of the caller beside the load."""
MEMORY_GROWTH = 1.05
"""Limit of the server's memory in the last quarter of the steady phase, relative to the second quarter."""
WINDOWS, WINDOW_SECONDS = 9, 5.0
"""Windows of the capacity. The phases use the lowest: a rate that is gone a minute later is no capacity."""
LONG_SEARCHES = 4
"""Exact searches in flight at SIGTERM."""
SIGTERM_MARGIN = 0.02
"""Seconds before SIGTERM after which a request may have met a closed door."""


@dataclass
class Phase:
    """Results of a phase of load."""

    tally: Tally
    seconds: float
    probed: Probed
    memory: list[float] = field(default_factory=list)
    changes: Counter[str] = field(default_factory=Counter)
    trouble: list[str] = field(default_factory=list)


def capacity(address: str, expected: Expected, windows: int, seconds: float) -> list[float]:
    """Calls a second in each window, lowest first: a shared machine is not equally fast all the time."""
    rates = []
    with Load(address, expected, None) as load:
        time.sleep(0.5)
        for _ in range(windows):
            before, start = load.tally.codes["OK"], time.perf_counter()
            time.sleep(seconds)
            rates.append((load.tally.codes["OK"] - before) / (time.perf_counter() - start))
    if load.tally.wrong or load.tally.failed:
        problems = f"{load.tally.wrong} wrong answers and {len(load.tally.failed)} failures"
        raise RuntimeError(f"{problems} before anything was done to the server")
    return sorted(rates)


@contextmanager
def changing_stores(address: str, expected: Expected) -> Iterator[tuple[Counter[str], list[str]]]:
    """Make versions, unload and load another store, again and again; gives counts of changes, and errors."""
    stop, changes, trouble = threading.Event(), Counter[str](), list[str]()

    def run() -> None:
        try:
            with (
                administer(f"grpc://{address}/{STORE}") as admin,
                administer(f"grpc://{address}/other") as other,
            ):
                while not stop.wait(1.0):
                    version, _ = admin.delete(keys=expected.keys)
                    stop.wait(1.0)
                    admin.rollback(version.number - 1)
                    other.unload()
                    other.load()
                    changes["versions"] += 2
                    changes["unloads"] += 1
        except Exception as error:  # noqa: BLE001  a phase without changes proves nothing: reported as broken
            trouble.append(f"the changes ended: {error!r}")

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield changes, trouble
    finally:
        stop.set()
        thread.join()


def steady(
    address: str, pid: int, expected: Expected, rate: float, seconds: float, load_process: LoadProcess
) -> Phase:
    memory: list[float] = []
    with (
        Load(address, expected, rate, bad=0.01) as load,
        ThreadPoolExecutor(1) as pool,
        changing_stores(address, expected) as (changes, trouble),
    ):
        arguments = address, expected.messages, PROBES_PER_SECOND, seconds
        probed = pool.submit(load_process, probe, *arguments, timeout=seconds + 60)
        start = time.perf_counter()
        while (now := time.perf_counter()) < start + seconds:
            memory.append(private_mib(pid))
            time.sleep(min(max(0.25, seconds / 200), start + seconds - now))
        return Phase(load.tally, seconds, probed.result(), memory, changes, trouble)


def overload(
    address: str, expected: Expected, rate: float, seconds: float, load_process: LoadProcess
) -> Phase:
    start = time.perf_counter()
    with Load(address, expected, rate) as load:
        arguments = address, expected.messages, PROBES_PER_SECOND, seconds
        probed = load_process(probe, *arguments, timeout=seconds + 60)
    return Phase(load.tally, time.perf_counter() - start, probed)


def terminate(address: str, pid: int, expected: Expected, rate: float) -> tuple[str, list[str]]:
    """Send SIGTERM under load; what was in flight, and what of it was lost."""
    message = expected.exact_search.SerializeToString()
    with Load(address, expected, rate) as load, grpc.insecure_channel(address, CHANNEL_OPTIONS) as channel:
        time.sleep(2)
        call = channel.unary_unary(RETRIEVE)
        searches = [call.future(message, timeout=60) for _ in range(LONG_SEARCHES)]
        time.sleep(0.1)
        sigterm = time.perf_counter()
        os.kill(pid, signal.SIGTERM)
        in_flight = sum(not search.done() for search in searches)
        short = sum(start < sigterm - SIGTERM_MARGIN for start in list(load.started.values()))
        codes = Counter(search.code().name for search in searches)
        time.sleep(1)
    lost = [text for start, text in load.tally.failed if start < sigterm - SIGTERM_MARGIN]
    lost += [f"a long search: {c}" for c in codes.elements() if c not in ("OK", "RESOURCE_EXHAUSTED")]
    if not in_flight:
        lost.append("no long search was in flight: nothing was shown")
    counts = ", ".join(f"{code} {n}" for code, n in codes.items())
    searches_text = f"{in_flight} of {LONG_SEARCHES} exact searches of 64 queries ({counts})"
    return f"{searches_text}, {short} calls sent 20 ms before", lost


def kill_worker(root: Path, expected: Expected, rate: float) -> tuple[int, int, int, float]:
    """Kill -9 one of two workers.

    Returns the calls answered in the second after, failed in it and failed later, and the seconds until two
    processes ran again.
    """
    with running_server(root, "--workers", "2") as (address, pid), Load(address, expected, rate) as load:
        time.sleep(3)
        children = Path(f"/proc/{pid}/task/{pid}/children")
        first = children.read_text().split()
        before = load.tally.codes["OK"]
        os.kill(int(first[0]), signal.SIGKILL)
        start = time.perf_counter()
        time.sleep(1)
        answered = load.tally.codes["OK"] - before
        while time.perf_counter() < start + 60:
            workers = children.read_text().split()
            if len(workers) == 2 and workers != first:
                break
            time.sleep(0.01)
        recovered = time.perf_counter() - start
        time.sleep(10)
    late = sum(sent > start + 1 for sent, _ in load.tally.failed)
    return answered, len(load.tally.failed) - late, late, recovered


def memory_is_flat(memory: Sequence[float]) -> tuple[bool, str]:
    """Whether memory stayed flat; medians of its quarters and growth over the second half, as text."""
    quarters = [float(np.median(part)) for part in np.array_split(np.array(memory), 4)]
    half = np.array(memory[len(memory) // 2 :])
    growth = float(np.polyfit(np.arange(len(half)), half, 1)[0]) * len(half)
    text = f"{', '.join(f'{q:.0f}' for q in quarters)}; over the second half {growth:+.1f}"
    return quarters[3] < MEMORY_GROWTH * quarters[1], text


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--entries", type=int, default=200_000)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument(
        "--directory", type=Path, help="where the store is kept; the benchmark works on a copy"
    )
    parser.add_argument("--quick", action="store_true", help="20,000 entries, fifteen seconds, not kept")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.entries, arguments.minutes = 20_000, 1 / 4
    with tempfile.TemporaryDirectory() as scratch, LoadProcess() as load_process:
        directory, n = arguments.directory or Path(scratch) / "stores", arguments.entries
        minutes = (build_seconds(directory, [n]) + 90) / 60 + arguments.minutes
        print(f"about {minutes:.0f} min ...", flush=True)
        root = Path(scratch) / "root"
        shutil.copytree(prepare(directory, [n], DIMENSION)[n] / STORE, root / STORE)
        broken = measure(root, n, arguments.minutes * 60, load_process, keep=not arguments.quick)
        sys.exit(1 if broken else 0)


def measure(root: Path, n: int, seconds: float, load_process: LoadProcess, *, keep: bool) -> list[str]:
    """Run all phases and write the report; returns what did not hold."""
    build(root, 2000, DIMENSION, store="other")
    expected = Expected(root, queries(500, n, DIMENSION))
    windows = (WINDOWS, WINDOW_SECONDS) if seconds > 60 else (2, seconds / 6)
    with running_server(root, "--workers", "1", "--anonymous", "admin") as (address, pid):
        rates = capacity(address, expected, *windows)
        lowest = rates[0]
        calm = steady(address, pid, expected, 0.8 * lowest, seconds, load_process)
        over = overload(address, expected, 3 * lowest, min(20.0, seconds), load_process)
        in_flight, lost = terminate(address, pid, expected, 0.8 * lowest)
    answered, failed, failed_later, recovered = kill_worker(root, expected, 0.5 * lowest)
    flat, memory = memory_is_flat(calm.memory)
    ratio = over.probed.p99 / calm.probed.p99
    refused = calm.tally.codes["RESOURCE_EXHAUSTED"] or calm.probed.refused
    over_failed = over.tally.failed or over.tally.without_time or over.probed.failed
    checks = {
        "wrong answers": calm.tally.wrong + over.tally.wrong == 0,
        "good requests that failed or were refused": not (calm.tally.failed or calm.probed.failed or refused),
        "bad requests that were not refused": not calm.tally.unrefused,
        "versions and unloads": not calm.trouble
        and calm.changes["versions"] > 0
        and len(calm.tally.versions) > 2,
        f"memory grew by more than {MEMORY_GROWTH - 1:.0%}": flat,
        "overload: p99 of the admitted above twice the calm one": ratio <= 2,
        "overload: nobody was refused": over.tally.codes["RESOURCE_EXHAUSTED"] > 0,
        "overload: other failures than RESOURCE_EXHAUSTED with a time": not over_failed,
        "lost at SIGTERM": not lost,
        "kill -9: no call was answered": answered > 0,
        "kill -9: failures after a second": not failed_later,
        "kill -9: not two workers again in a minute": recovered < 60,
    }
    broken = [name for name, holds in checks.items() if not holds]
    sent = sum(calm.tally.codes.values())
    sent_over = sum(over.tally.codes.values()) / over.seconds
    rows = [
        (
            f"capacity of {CONNECTIONS} connections, closed loop, answers compared: "
            f"lowest (median, highest) of {len(rates)} windows",
            f"{lowest:,.0f}/s ({np.median(rates):,.0f}, {rates[-1]:,.0f})",
        ),
        (
            f"steady at 80 %, {seconds:.0f} s: requests",
            f"{sent:,} ({sent / seconds:,.0f}/s): {_codes(calm.tally)}",
        ),
        (
            "... wrong, failed, bad ones not refused",
            f"{calm.tally.wrong}, {len(calm.tally.failed)}, {calm.tally.unrefused}",
        ),
        ("... queries of 500 whose answers differ between the versions", expected.distinguishing),
        (
            "... versions made / seen by queries, unloads and loads",
            f"{calm.changes['versions']} / {len(calm.tally.versions)}, {calm.changes['unloads']}",
        ),
        ("... p50, p99 ms: of the load, of the caller beside it", _waits(calm)),
        ("... private memory of the server, MiB, medians of quarters", memory),
        ("overload at 3 x: requests", f"{sent_over:,.0f}/s: {_codes(over.tally)}"),
        ("... p50, p99 ms of the admitted: of the load, of the caller beside it", _waits(over)),
        (
            "... the caller beside it: admitted, refused, p99 relative to the calm one",
            f"{over.probed.answered}, {over.probed.refused}, {ratio:.1f}",
        ),
        (
            "... the load itself was late by, p50, p99 ms, calm / overload",
            f"{_lateness(calm.tally)} / {_lateness(over.tally)}",
        ),
        ("SIGTERM under load: in flight / lost", f"{in_flight} / {len(lost)}"),
        ("kill -9 of one of two workers: answered, failed in the next second", f"{answered}, {failed}"),
        ("... failed in the 10 s after it, two processes again after", f"{failed_later}, {recovered:.1f} s"),
    ]
    failures = [text for _, text in calm.tally.failed + over.tally.failed]
    problems = calm.trouble + failures + calm.probed.failed + over.probed.failed + lost
    about = (
        f"{n:,} entries of {DIMENSION} dimensions, HNSW, one worker (two for kill -9); load and server share "
        f"{os.cpu_count()} cores. Load average at the end {os.getloadavg()[0]:.1f}."
    )
    verdict = "Did not hold: " + "; ".join(broken) + "." if broken else "Everything that must hold held."
    parts = [table(["figure", "value"], rows), verdict, *(f"    {text}" for text in problems[:5])]
    packages = ("grpcio", "faiss-cpu", "lmdb")
    write("load", "A server under load", about, *parts, packages=packages, keep=keep)
    return broken


def _waits(phase: Phase) -> str:
    own = f"{phase.tally.percentile(50):.1f}, {phase.tally.percentile(99):.1f}"
    return f"{own}; {phase.probed.p50:.1f}, {phase.probed.p99:.1f}"


def _lateness(tally: Tally) -> str:
    p50, p99 = np.percentile(tally.late, [50, 99]) * 1e3
    return f"{p50:.1f}, {p99:.1f}"


def _codes(tally: Tally) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in tally.codes.most_common())


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
