"""Traffic for `load.py`: good and bad requests at their times, and every answer compared with what its version must say."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np

from benchmarks.serving.callers import LOCAL, RETRIEVE, percentiles
from benchmarks.serving.query_paths import in_process, requests_of
from benchmarks.synthetic import STORE, fingerprint
from tagstore.upkeep.edits import Selection, delete, rollback
from tagstore.wire import convert
from tagstore.wire.status import RETRY_AFTER
from tagstore_proto.v1 import tagstore_pb2 as pb

CONNECTIONS = 16
DELETED = 100
"""Entries that every second version lacks: each the first neighbour of some query."""


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
    failed: list[tuple[float, str]] = field(default_factory=list)
    """Good requests that ended otherwise than answered or refused for load: when they were sent, and how they ended."""
    without_time: int = 0
    """RESOURCE_EXHAUSTED that did not say when to come again."""
    versions: set[int] = field(default_factory=set)

    def p(self, percent: float) -> float:
        return float(np.percentile(self.seconds, percent)) * 1e3 if self.seconds else float("nan")


class Expected:
    """What each query must find, tags and all: in versions with all entries, and in those without the ones that are deleted."""

    def __init__(self, root: Path, vectors: np.ndarray) -> None:
        from tagstore.storage.store import Store

        self.digest = fingerprint(vectors.shape[1]).digest
        self.messages = requests_of(vectors, 1, self.digest)
        self.heavy = pb.RetrieveRequest.FromString(requests_of(vectors, 64, self.digest)[0])
        self.heavy.exact = True
        whole = in_process(root)(vectors)
        self.keys = sorted({answer.neighbours[0].key for answer in whole[:DELETED]})
        before = Store(root, STORE).snapshot().version.number
        version, _ = delete(root, STORE, Selection(keys=self.keys))
        without = in_process(root)(vectors)
        rollback(root, STORE, before)
        self._odd = version.number % 2  # from here on versions come in pairs: one without, one rolled back
        self._answers = {
            False: [convert.retrieval_to_proto(r) for r in whole],
            True: [convert.retrieval_to_proto(r) for r in without],
        }
        self.telling = sum(a != b for a, b in zip(*self._answers.values(), strict=True))
        """Queries whose answer tells the versions apart: a stale or mixed answer to one of them is seen."""
        if self.telling < len(self.keys):
            raise RuntimeError(
                f"{len(self.keys)} entries were deleted, and only {self.telling} answers changed"
            )

    def right(self, number: int, response: pb.RetrieveResponse) -> bool:
        """Whether a query's answer is that of the version it says it comes from: entries, similarities, tags."""
        retrievals = list(response.retrievals)
        return retrievals == [self._answers[response.version % 2 == self._odd][number]]


def bad_messages(digest: str, dimension: int) -> list[bytes]:
    """Requests that must be refused: NaN, no such store, no image, another encoder, no message at all."""
    return [
        requests_of(np.full((1, dimension), np.nan, np.float32), 1, digest)[0],
        pb.RetrieveRequest(store="nothing").SerializeToString(),
        pb.RetrieveRequest(store=STORE, images=[b"no image"]).SerializeToString(),
        pb.RetrieveRequest(store=STORE, fingerprint="another one").SerializeToString(),
        b"\xff\xff no message at all",
    ]


class Load:
    """Requests over `CONNECTIONS` channels, in a thread with an event loop of its own, from `with` to the end of it.

    With a `rate`, they are sent when they are due, whatever came of those before; without one, each channel asks again as soon as it is
    answered, which measures capacity with the very same work on the caller's side.
    """

    def __init__(
        self, address: str, expected: Expected, rate: float | None, *, seed: int = 0, bad: float = 0.0
    ) -> None:
        self.tally = Tally()
        self._address, self._expected, self._rate, self._bad = address, expected, rate, bad
        self._wrong_ones, self._rng = (
            bad_messages(expected.digest, expected.heavy.vectors.dimension),
            random.Random(seed),
        )
        self._stop = threading.Event()
        self.started: dict[int, float] = {}
        """When each request that is under way was sent."""
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
        if self._rate is None:
            await asyncio.gather(*(self._again_and_again(calls[i], i) for i in range(CONNECTIONS)))
        else:
            await self._when_due(calls, self._rate)
        for channel in channels:
            await channel.close()

    async def _again_and_again(self, call: Callable[..., Any], number: int) -> None:
        while not self._stop.is_set():
            await self._one(call, number)

    async def _when_due(self, calls: Sequence[Callable[..., Any]], rate: float) -> None:
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
            due += self._rng.expovariate(rate)
            number += 1
            if number % 64 == 0:
                await asyncio.sleep(0)
        await asyncio.gather(*tasks)

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
                tally.failed.append((start, f"{code}: {error.details()}"[:200]))
            return
        finally:
            del self.started[number]
        # an empty request of the right store is no mistake: it has no queries, so no fingerprint is compared
        response = pb.RetrieveResponse.FromString(data)
        tally.versions.add(response.version)
        if bad:
            tally.codes["bad: OK"] += 1
            tally.unrefused += bool(response.retrievals)
            return
        tally.codes["OK"] += 1
        tally.seconds.append(time.perf_counter() - start)
        tally.wrong += not expected.right(which, response)


class Probed(NamedTuple):
    """What one good caller beside the load met."""

    p50: float
    p99: float
    """Of its answers, ms."""
    answered: int
    refused: int
    failed: list[str]


def probe(address: str, messages: Sequence[bytes], rate: float, seconds: float) -> Probed:
    """One good caller beside the load, in a process that is never late itself.

    It asks at even times, or as soon as it is answered where that is later.
    """
    spent: list[float] = []
    refused, failed = 0, []
    with grpc.insecure_channel(address, LOCAL) as channel:
        call = channel.unary_unary(RETRIEVE)
        begin = time.perf_counter()
        for number in range(max(1, int(rate * seconds))):
            time.sleep(max(0.0, begin + number / rate - time.perf_counter()))
            start = time.perf_counter()
            if start > begin + seconds:
                break
            try:
                call(messages[number % len(messages)], timeout=20)
                spent.append(time.perf_counter() - start)
            except grpc.RpcError as error:
                if error.code().name == "RESOURCE_EXHAUSTED":
                    refused += 1
                else:
                    failed.append(f"{error.code().name}: {error.details()}"[:200])
    p50, p99 = percentiles(spent) if spent else (float("nan"), float("nan"))
    return Probed(p50, p99, len(spent), refused, failed)
