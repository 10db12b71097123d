"""A server under load, with everything that happens to one: new versions, stores that come and go, bad requests, too many, its end.

    python -m benchmarks.serving.load [--minutes 10] [--directory DIR] [--quick]

1. Capacity: calls a second of 16 connections that ask again as soon as they are answered, by the callers of the phases that follow; the
   lowest of several windows.
2. Steady: 80 % of that, each request when it is due, for --minutes. Meanwhile entries are deleted, versions rolled back, another store is
   unloaded and loaded, and 1 % of the requests are bad. Every good answer is compared in all fields with what its version must say; every
   bad request must be refused. The server's own memory must stay flat.
3. Overload: three times the capacity. Whoever is admitted must not wait long, everybody else must get RESOURCE_EXHAUSTED and a time.
4. The end: SIGTERM under load; what was under way, long exact searches among it, must be answered.
5. kill -9 of one of two workers under load: the other goes on, there are two again, nothing fails once the callers have connected again.

A load that shares two cores with its server is late itself when there is too much of it; so waits are also measured by a caller beside it,
in a process of its own, and judged by that. Exits with 1 if anything that must hold does not. --directory keeps the store that is built, as
`retrieval.py` does.
"""

from __future__ import annotations

import argparse
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

from benchmarks.report import table, write
from benchmarks.serving.callers import LOCAL, RETRIEVE, Apart
from benchmarks.serving.checked_requests import CONNECTIONS, Expected, Load, Probed, Tally, probe
from benchmarks.serving.prepared_stores import needed, prepared
from benchmarks.serving.servers import ours, private_mib
from benchmarks.synthetic import STORE, build, queries
from tagstore.client.admin import administer

DIMENSION = 512
PROBES = 50.0
"""A second, of the caller beside the load."""
FLAT_WITHIN = 1.05
"""What the server's memory may grow to, from the second quarter of the steady phase to the last."""
WINDOWS, WINDOW = 9, 5.0
"""In which capacity is measured, and seconds of each. The phases go by the lowest: what is over in another minute is no capacity."""
HEAVY = 4
"""Exact searches that are under way at SIGTERM."""


@dataclass
class Phase:
    """What a phase of load came to."""

    tally: Tally
    seconds: float
    probed: Probed
    memory: list[float] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    trouble: list[str] = field(default_factory=list)


def capacity(address: str, expected: Expected, windows: int, seconds: float) -> list[float]:
    """Calls a second in each of so many windows, lowest first: a machine that is shared with others is not equally fast all the time."""
    found = []
    with Load(address, expected, None) as load:
        time.sleep(0.5)
        for _ in range(windows):
            before, start = load.tally.codes["OK"], time.perf_counter()
            time.sleep(seconds)
            found.append((load.tally.codes["OK"] - before) / (time.perf_counter() - start))
    if load.tally.wrong or load.tally.failed:
        raise RuntimeError(
            f"{load.tally.wrong} wrong answers and {len(load.tally.failed)} failures before anything was done to the server"
        )
    return sorted(found)


@contextmanager
def disturbed(address: str, expected: Expected) -> Iterator[tuple[Counter[str], list[str]]]:
    """New versions and stores that come and go: what was done, and what kept it from being done."""
    stop, done, trouble = threading.Event(), Counter[str](), list[str]()

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
                    done["versions"] += 2
                    done["unloads"] += 1
        except Exception as error:  # noqa: BLE001  a phase without its disturbance proves nothing: reported as broken
            trouble.append(f"the disturbance ended: {error!r}")

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield done, trouble
    finally:
        stop.set()
        thread.join()


def steady(address: str, pid: int, expected: Expected, rate: float, seconds: float, apart: Apart) -> Phase:
    memory: list[float] = []
    with (
        Load(address, expected, rate, bad=0.01) as load,
        ThreadPoolExecutor(1) as beside,
        disturbed(address, expected) as (done, trouble),
    ):
        probed = beside.submit(
            apart, probe, address, expected.messages, PROBES, seconds, patience=seconds + 60
        )
        start = time.perf_counter()
        while (now := time.perf_counter()) < start + seconds:
            memory.append(private_mib(pid))
            time.sleep(min(max(0.25, seconds / 200), start + seconds - now))
        return Phase(load.tally, seconds, probed.result(), memory, done, trouble)


def overload(address: str, expected: Expected, rate: float, seconds: float, apart: Apart) -> Phase:
    start = time.perf_counter()
    with Load(address, expected, rate) as load:
        probed = apart(probe, address, expected.messages, PROBES, seconds, patience=seconds + 60)
    return Phase(load.tally, time.perf_counter() - start, probed)


def ending(address: str, pid: int, expected: Expected, rate: float) -> tuple[str, list[str]]:
    """SIGTERM under load: what was under way, and what of it was lost."""
    message = expected.heavy.SerializeToString()
    with Load(address, expected, rate) as load, grpc.insecure_channel(address, LOCAL) as channel:
        time.sleep(2)
        call = channel.unary_unary(RETRIEVE)
        heavy = [call.future(message, timeout=60) for _ in range(HEAVY)]
        time.sleep(0.1)
        told = time.perf_counter()
        os.kill(pid, signal.SIGTERM)
        under_way = sum(not one.done() for one in heavy)
        short = sum(start < told - 0.02 for start in list(load.started.values()))
        codes = Counter(one.code().name for one in heavy)
        time.sleep(1)
    # what was sent as the door closed was not taken; what had been sent before it was
    lost = [text for start, text in load.tally.failed if start < told - 0.02]
    lost += [
        f"a long search: {code}"
        for code, n in codes.items()
        if code not in ("OK", "RESOURCE_EXHAUSTED")
        for _ in range(n)
    ]
    if not under_way:
        lost.append("no long search was under way: nothing was shown")
    counted = ", ".join(f"{code} {n}" for code, n in codes.items())
    return (
        f"{under_way} of {HEAVY} exact searches of 64 queries ({counted}), {short} calls sent 20 ms before",
        lost,
    )


def killing(root: Path, expected: Expected, rate: float) -> tuple[int, int, int, float]:
    """kill -9 of one of two workers: answered in the second after, failed in it, failed later, seconds until two processes ran again."""
    with ours(root, "--workers", "2") as (address, pid), Load(address, expected, rate) as load:
        time.sleep(3)
        children = Path(f"/proc/{pid}/task/{pid}/children")
        first = children.read_text().split()
        before = load.tally.codes["OK"]
        os.kill(int(first[0]), signal.SIGKILL)
        start = time.perf_counter()
        time.sleep(1)
        after = load.tally.codes["OK"] - before
        while (
            len(now := children.read_text().split()) < 2 or now == first
        ) and time.perf_counter() < start + 60:
            time.sleep(0.01)
        back = time.perf_counter() - start
        time.sleep(10)
    late = sum(sent > start + 1 for sent, _ in load.tally.failed)
    return after, len(load.tally.failed) - late, late, back


def flat(memory: Sequence[float]) -> tuple[bool, str]:
    """Whether memory stayed flat, and its figures: quarters' medians, and the slope of the second half."""
    quarters = [float(np.median(some)) for some in np.array_split(np.array(memory), 4)]
    half = np.array(memory[len(memory) // 2 :])
    slope = float(np.polyfit(np.arange(len(half)), half, 1)[0]) * len(half)
    text = f"{', '.join(f'{q:.0f}' for q in quarters)}; over the second half {slope:+.1f}"
    return quarters[3] < FLAT_WITHIN * quarters[1], text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entries", type=int, default=200_000)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument(
        "--directory", type=Path, help="where the store is made and kept; a copy of it is worked on"
    )
    parser.add_argument(
        "--quick", action="store_true", help="20,000 entries, fifteen seconds, not kept: to see that it runs"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.entries, arguments.minutes = 20_000, 1 / 4
    with tempfile.TemporaryDirectory() as scratch, Apart() as apart:
        directory = arguments.directory or Path(scratch) / "stores"
        minutes = (needed(directory, [arguments.entries]) + 90) / 60 + arguments.minutes
        print(f"about {minutes:.0f} min ...", flush=True)
        root = Path(scratch) / "root"
        shutil.copytree(
            prepared(directory, [arguments.entries], DIMENSION)[arguments.entries] / STORE, root / STORE
        )
        sys.exit(
            1
            if measure(root, arguments.entries, arguments.minutes * 60, apart, keep=not arguments.quick)
            else 0
        )


def measure(root: Path, n: int, seconds: float, apart: Apart, *, keep: bool) -> list[str]:
    """Run all of it; what did not hold."""
    build(root, 2000, DIMENSION, store="other")
    expected = Expected(root, queries(500, n, DIMENSION))
    with ours(root, "--workers", "1", "--anonymous", "admin") as (address, pid):
        rates = capacity(address, expected, *((WINDOWS, WINDOW) if seconds > 60 else (2, seconds / 6)))
        most = rates[0]
        calm = steady(address, pid, expected, 0.8 * most, seconds, apart)
        over = overload(address, expected, 3 * most, min(20.0, seconds), apart)
        under_way, lost = ending(address, pid, expected, 0.8 * most)
    answered, failed, failed_later, back = killing(root, expected, 0.5 * most)
    steady_memory, memory = flat(calm.memory)
    ratio = over.probed.p99 / calm.probed.p99
    checks = {
        "wrong answers": calm.tally.wrong + over.tally.wrong == 0,
        "good requests that failed or were refused": not (
            calm.tally.failed
            or calm.tally.codes["RESOURCE_EXHAUSTED"]
            or calm.probed.refused
            or calm.probed.failed
        ),
        "bad requests that were not refused": not calm.tally.unrefused,
        "versions and unloads": not calm.trouble
        and calm.done["versions"] > 0
        and len(calm.tally.versions) > 2,
        f"memory grew by more than {FLAT_WITHIN - 1:.0%}": steady_memory,
        "overload: p99 of the admitted above twice the calm one": ratio <= 2,
        "overload: nobody was refused": over.tally.codes["RESOURCE_EXHAUSTED"] > 0,
        "overload: other failures than RESOURCE_EXHAUSTED with a time": not (
            over.tally.failed or over.tally.without_time or over.probed.failed
        ),
        "lost at the end": not lost,
        "kill -9: nobody served on": answered > 0,
        "kill -9: failures after a second": not failed_later,
        "kill -9: not two again in a minute": back < 60,
    }
    broken = [what for what, holds in checks.items() if not holds]
    good = sum(calm.tally.codes.values())
    rows = [
        (
            f"capacity, {CONNECTIONS} connections one after the other, answers compared: lowest (median, highest) of {len(rates)} windows",
            f"{most:,.0f}/s ({np.median(rates):,.0f}, {rates[-1]:,.0f})",
        ),
        (
            f"steady at 80 %, {seconds:.0f} s: requests",
            f"{good:,} ({good / seconds:,.0f}/s): {_codes(calm.tally)}",
        ),
        (
            "... wrong, failed, bad ones not refused",
            f"{calm.tally.wrong}, {len(calm.tally.failed)}, {calm.tally.unrefused}",
        ),
        ("... queries of 500 whose answer tells the versions apart", str(expected.telling)),
        (
            "... versions made / seen by queries, unloads and loads",
            f"{calm.done['versions']} / {len(calm.tally.versions)}, {calm.done['unloads']}",
        ),
        ("... p50, p99 ms: of the load, of the caller beside it", f"{_waits(calm)}"),
        ("... own memory of the server, MiB, medians of quarters", memory),
        (
            "overload at 3 x: requests",
            f"{sum(over.tally.codes.values()) / over.seconds:,.0f}/s: {_codes(over.tally)}",
        ),
        ("... p50, p99 ms of the admitted: of the load, of the caller beside it", f"{_waits(over)}"),
        (
            "... the caller beside it: admitted, refused, p99 over the calm one",
            f"{over.probed.answered}, {over.probed.refused}, {ratio:.1f}",
        ),
        (
            "... the load itself was late by, p50, p99 ms, calm / overload",
            f"{_late(calm.tally)} / {_late(over.tally)}",
        ),
        ("SIGTERM under load: under way / lost", f"{under_way} / {len(lost)}"),
        ("kill -9 of one of two workers: answered, failed in the next second", f"{answered}, {failed}"),
        ("... failed in the 10 s after it, two processes again after", f"{failed_later}, {back:.1f} s"),
    ]
    said = (
        calm.trouble
        + [text for _, text in calm.tally.failed + over.tally.failed]
        + calm.probed.failed
        + over.probed.failed
        + lost
    )
    about = (
        f"{n:,} entries of {DIMENSION} dimensions, HNSW, one worker (two for kill -9); load and server share {os.cpu_count()} cores. Load "
        f"average at the end {os.getloadavg()[0]:.1f}."
    )
    verdict = "Did not hold: " + "; ".join(broken) + "." if broken else "Everything that must hold held."
    packages = ("grpcio", "faiss-cpu", "lmdb")
    parts = [table(["figure", "value"], rows), verdict, *(f"    {text}" for text in said[:5])]
    write("load", "A server under load", about, *parts, packages=packages, keep=keep)
    return broken


def _waits(phase: Phase) -> str:
    return f"{phase.tally.p(50):.1f}, {phase.tally.p(99):.1f}; {phase.probed.p50:.1f}, {phase.probed.p99:.1f}"


def _late(tally: Tally) -> str:
    p50, p99 = np.percentile(tally.late, [50, 99]) * 1e3
    return f"{p50:.1f}, {p99:.1f}"


def _codes(tally: Tally) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in tally.codes.most_common())


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
