"""A server under load, with everything that happens to one: new versions, stores that come and go, bad requests, too many, its end.

    python benchmarks/load.py [--minutes 10] [--quick]

1. Capacity: calls a second of 16 connections that ask one after the other.
2. Steady: 80 % of that, whenever they are due, for --minutes. Meanwhile versions are deleted from and rolled back, another store is loaded
   and unloaded, and 1 % of the requests are bad. Every good answer is compared with what its version must say; every bad request must be
   refused.
3. Overload: three times the capacity. Whoever is admitted must not wait long, everybody else must get RESOURCE_EXHAUSTED and a time.
4. The end: SIGTERM under load; what was under way must be answered.
5. kill -9 of one of two workers under load: the other goes on, and there are two again.

Load and server share the machine's cores. Exits with 1 if anything that must hold does not.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from report import table, write
from retrieval import LOCAL, RETRIEVE, K, apart, ours, requests_of, throughput
from synthetic import STORE, build, fingerprint, queries

from tagstore.engine import Engine
from tagstore.remote_admin import administer
from tagstore.status import RETRY_AFTER
from tagstore.store import Store
from tagstore.types import Search
from tagstore_proto.v1 import tagstore_pb2 as pb

CONNECTIONS = 16
DIMENSION = 512


@dataclass
class Tally:
    """What came of the requests of a phase."""

    codes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    """Of good requests that were answered."""
    late: list[float] = field(default_factory=list)
    """How long after its time each request was sent: a load that is late itself sees longer answers too."""
    wrong: int = 0
    unrefused: int = 0
    """Bad requests that were not refused as such."""
    failed: list[str] = field(default_factory=list)
    without_time: int = 0
    """RESOURCE_EXHAUSTED that did not say when to come again."""
    versions: set[int] = field(default_factory=set)

    def p(self, percent: float) -> float:
        return float(np.percentile(self.seconds, percent)) * 1e3 if self.seconds else float("nan")


class Expected:
    """What each query must find: in versions with all entries, and in those without the ones that are deleted and rolled back."""

    def __init__(self, root: Path, vectors: np.ndarray, digest: str) -> None:
        from tagstore.maintenance import Selection, delete, rollback

        self.messages = requests_of(vectors, 1, digest)
        store = Store(root, STORE)
        whole = Engine(store.snapshot()).retrieve(vectors, Search(k=K))
        self.keys = sorted({r.neighbours[0].key for r in whole})[:20]
        version, _ = delete(root, STORE, Selection(keys=self.keys))
        without = Engine(Store(root, STORE).snapshot()).retrieve(vectors, Search(k=K))
        rollback(root, STORE, version.number - 1)
        self.odd = version.number % 2
        self.answers = {False: [_ids(r) for r in whole], True: [_ids(r) for r in without]}

    def right(self, number: int, response: pb.RetrieveResponse) -> bool:
        [retrieval] = response.retrievals
        return [n.entry_id for n in retrieval.neighbours] == self.answers[response.version % 2 == self.odd][number]


def _ids(retrieval: Any) -> list[int]:
    return [n.entry_id for n in retrieval.neighbours]


def bad_messages(digest: str) -> list[bytes]:
    vectors = requests_of(np.full((1, DIMENSION), np.nan, np.float32), 1, digest)
    return [
        vectors[0],
        pb.RetrieveRequest(store="nothing").SerializeToString(),
        pb.RetrieveRequest(store=STORE, images=[b"no image"]).SerializeToString(),
        pb.RetrieveRequest(store=STORE, fingerprint="another one").SerializeToString(),
        b"\xff\xff no message at all",
    ]


class Load:
    """Requests at their times, in a thread with an event loop of its own."""

    def __init__(self, address: str, expected: Expected, digest: str, rate: float, *, seed: int = 0, bad: float = 0.0) -> None:
        self.tally = Tally()
        self._address, self._expected, self._rate, self._bad = address, expected, rate, bad
        self._wrong_ones, self._rng = bad_messages(digest), random.Random(seed)
        self._stop = threading.Event()
        self.started: dict[int, float] = {}
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        channels = [grpc.aio.insecure_channel(self._address, options=LOCAL) for _ in range(CONNECTIONS)]
        calls = [channel.unary_unary(RETRIEVE) for channel in channels]
        tasks: set[asyncio.Task[None]] = set()
        due, number = time.perf_counter(), 0
        while not self._stop.is_set():
            now = time.perf_counter()
            if due > now:
                await asyncio.sleep(due - now)
            self.tally.late.append(time.perf_counter() - due)
            task = asyncio.create_task(self._one(calls[number % CONNECTIONS], number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due += self._rng.expovariate(self._rate)
            number += 1
            if number % 64 == 0:
                await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        for channel in channels:
            await channel.close()

    async def _one(self, call: Callable[..., Any], number: int) -> None:
        expected, tally = self._expected, self.tally
        bad = self._rng.random() < self._bad
        which = self._rng.randrange(len(expected.messages))
        message = self._rng.choice(self._wrong_ones) if bad else expected.messages[which]
        start = time.perf_counter()
        self.started[number] = start
        try:
            data = await call(message, timeout=20)
        except grpc.RpcError as error:
            code = error.code().name
            tally.codes[("bad: " if bad else "") + code] += 1
            if code == "RESOURCE_EXHAUSTED":
                tally.without_time += RETRY_AFTER not in dict(error.trailing_metadata() or ())
            elif bad:
                tally.unrefused += code not in ("INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION")
            else:
                tally.failed.append(f"{code} {start:.3f} {error.details()}"[:200])
            return
        finally:
            del self.started[number]
        tally.seconds.append(time.perf_counter() - start)
        tally.codes["OK"] += 1
        # an empty request of the right store is no mistake: it has no queries, so no fingerprint is compared
        response = pb.RetrieveResponse.FromString(data)
        tally.versions.add(response.version)
        if bad:
            tally.unrefused += bool(response.retrievals)
        elif not expected.right(which, response):
            tally.wrong += 1


def private(pid: int) -> int:
    """MiB of a process's own memory, its children included."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    own = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return own // 1024 + sum(private(child) for child in children)


def disturb(address: str, expected: Expected, stop: threading.Event, done: Counter[str]) -> None:
    """New versions and stores that come and go, until told to stop."""
    with administer(f"grpc://{address}/{STORE}") as admin, administer(f"grpc://{address}/other") as other:
        while not stop.wait(1.0):
            version, _ = admin.delete(keys=expected.keys)
            if stop.wait(1.0):
                pass
            admin.rollback(version.number - 1)
            other.unload()
            other.load()
            done["versions"] += 2
            done["unloads"] += 1


def steady(address: str, pid: int, expected: Expected, digest: str, rate: float, seconds: float) -> tuple[Tally, list[int], Counter[str]]:
    stop, done, memory = threading.Event(), Counter[str](), []
    disturber = threading.Thread(target=disturb, args=(address, expected, stop, done))
    with Load(address, expected, digest, rate, bad=0.01) as load:
        disturber.start()
        for _ in range(10):
            time.sleep(seconds / 10)
            memory.append(private(pid))
        stop.set()
        disturber.join()
    return load.tally, memory, done


def ending(address: str, pid: int, expected: Expected, digest: str, rate: float) -> tuple[int, list[str]]:
    """SIGTERM under load: how many were under way, and which of them were lost."""
    with Load(address, expected, digest, rate) as load:
        time.sleep(2)
        told = time.perf_counter()
        os.kill(pid, signal.SIGTERM)
        under_way = sum(start < told - 0.02 for start in list(load.started.values()))
        time.sleep(1.5)
    # what was sent as the door closed was not taken; what had been sent before it was
    lost = [text for text in load.tally.failed if float(text.split()[1]) < told - 0.02]
    return under_way, lost


def killing(root: Path, expected: Expected, digest: str, rate: float) -> tuple[int, int, float]:
    """kill -9 of one of two workers: calls answered in the second after, calls that failed, seconds until there were two again."""
    with ours(root, "--workers", "2") as (address, pid), Load(address, expected, digest, rate) as load:
        time.sleep(3)
        children = Path(f"/proc/{pid}/task/{pid}/children")
        first = children.read_text().split()
        before = load.tally.codes["OK"]
        os.kill(int(first[0]), signal.SIGKILL)
        start = time.perf_counter()
        time.sleep(1)
        after = load.tally.codes["OK"] - before
        while len(now := children.read_text().split()) < 2 or now == first:
            time.sleep(0.01)
        back = time.perf_counter() - start
        time.sleep(3)
    return after, len(load.tally.failed), back


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=200_000)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--quick", action="store_true", help="20,000 entries, ten seconds: to see that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.entries, arguments.minutes = 20_000, 1 / 6
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(1 if measure(Path(scratch), arguments.entries, arguments.minutes * 60) else 0)


def measure(root: Path, n: int, seconds: float) -> list[str]:
    """Run all of it; what did not hold."""
    from tagstore.tuning import Budget, build_index

    build(root, n, DIMENSION)
    build(root, 2000, DIMENSION, store="other")
    build_index(root, STORE, Budget(recall=0.9), kind="hnsw")
    digest = fingerprint(DIMENSION).digest
    expected = Expected(root, queries(500, n, DIMENSION), digest)
    with ours(root, "--workers", "1", "--anonymous", "admin") as (address, pid):
        [capacity] = apart(throughput, address, expected.messages, CONNECTIONS, 5.0)
        calm, memory, done = steady(address, pid, expected, digest, 0.8 * capacity, seconds)
        start = time.perf_counter()
        with Load(address, expected, digest, 3 * capacity) as flood:
            time.sleep(min(20.0, seconds))
        flooded = time.perf_counter() - start
        under_way, lost = ending(address, pid, expected, digest, 0.8 * capacity)
    after, failed, back = killing(root, expected, digest, 0.5 * capacity)
    over = flood.tally
    checks = {
        "wrong answers": calm.wrong + over.wrong == 0,
        "good requests that failed": not calm.failed and not calm.codes["RESOURCE_EXHAUSTED"],
        "bad requests that were not refused": not calm.unrefused,
        "memory grew by more than 10 %": memory[-1] < 1.1 * memory[2],
        "overload: p99 of the admitted above twice the calm one": over.p(99) <= 2 * calm.p(99),
        "overload: other failures than RESOURCE_EXHAUSTED with a time": not over.failed and not over.without_time,
        "lost at the end": not lost,
        "kill -9: nobody served on": after > 0,
    }
    broken = [what for what, holds in checks.items() if not holds]
    good = sum(calm.codes.values())
    write(
        "load",
        "A server under load",
        f"{n:,} entries of {DIMENSION} dimensions, hnsw, one worker (two for kill -9); load and server share {os.cpu_count()} cores. Load "
        f"average at the end {os.getloadavg()[0]:.1f}.",
        _table(
            ("capacity, 16 connections one after the other", f"{capacity:,.0f}/s"),
            (f"steady at 80 %, {seconds:.0f} s: requests", f"{good:,} ({good / seconds:,.0f}/s): {_codes(calm)}"),
            ("... wrong, failed, bad ones not refused", f"{calm.wrong}, {len(calm.failed)}, {calm.unrefused}"),
            ("... versions made / seen by queries, unloads and loads", f"{done['versions']} / {len(calm.versions)}, {done['unloads']}"),
            ("... p50, p99 ms", f"{calm.p(50):.1f}, {calm.p(99):.1f}"),
            ("... own memory of the server, MiB, at tenths", ", ".join(map(str, memory))),
            ("overload at 3 x: requests", f"{sum(over.codes.values()) / flooded:,.0f}/s: {_codes(over)}"),
            ("... p50, p99 ms of the admitted", f"{over.p(50):.1f}, {over.p(99):.1f} ({over.p(99) / calm.p(99):.1f} x the calm p99)"),
            ("... the load itself was late by, p50, p99 ms, calm / overload", f"{_late(calm)} / {_late(over)}"),
            ("SIGTERM under load: under way, lost", f"{under_way}, {len(lost)}"),
            ("kill -9 of one of two workers: answered in the next second, failed, back to two", f"{after}, {failed}, after {back:.1f} s"),
        ),
        "Did not hold: " + "; ".join(broken) + "." if broken else "Everything that must hold held.",
        *(f"    {text}" for text in (calm.failed + over.failed + lost)[:5]),
        packages=("grpcio", "faiss-cpu", "lmdb"),
    )
    return broken


def _late(tally: Tally) -> str:
    p50, p99 = np.percentile(tally.late, [50, 99]) * 1e3
    return f"{p50:.1f}, {p99:.1f}"


def _codes(tally: Tally) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in tally.codes.most_common())


def _table(*rows: Sequence[str]) -> str:
    return table(["figure", "value"], rows)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
