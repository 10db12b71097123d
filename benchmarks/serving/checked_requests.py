"""Good and bad requests for `load.py`, with every answer compared with the one its version must give."""

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

from benchmarks.serving.callers import CHANNEL_OPTIONS, RETRIEVE, percentiles
from benchmarks.serving.query_paths import engine_in_process, request_messages
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
    """Results of the requests of a phase."""

    codes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    """Of each good request that was answered."""
    late: list[float] = field(default_factory=list)
    """Seconds after its due time that each request was sent: a late load also sees longer answers."""
    wrong: int = 0
    unrefused: int = 0
    failed: list[tuple[float, str]] = field(default_factory=list)
    """Good requests that were neither answered nor refused for load: time of sending, and error."""
    without_time: int = 0
    """RESOURCE_EXHAUSTED without a time to retry."""
    versions: set[int] = field(default_factory=set)

    def percentile(self, percent: float) -> float:
        """Milliseconds."""
        return float(np.percentile(self.seconds, percent)) * 1e3 if self.seconds else float("nan")


class Expected:
    """The answers that queries must get, in versions with all entries and in versions without some."""

    def __init__(self, root: Path, vectors: np.ndarray) -> None:
        from tagstore.storage.store import Store

        self.digest = fingerprint(vectors.shape[1]).digest
        self.messages = request_messages(vectors, 1, self.digest)
        self.exact_search = pb.RetrieveRequest.FromString(request_messages(vectors, 64, self.digest)[0])
        self.exact_search.exact = True
        whole = engine_in_process(root)(vectors)
        self.keys = sorted({answer.neighbours[0].key for answer in whole[:DELETED]})
        before = Store(root, STORE).snapshot().version.number
        version, _ = delete(root, STORE, Selection(keys=self.keys))
        without = engine_in_process(root)(vectors)
        rollback(root, STORE, before)
        self._odd = (
            version.number % 2
        )  # from now on versions come in pairs: one without the entries, one rolled back
        self._answers = {
            False: [convert.retrieval_to_proto(r) for r in whole],
            True: [convert.retrieval_to_proto(r) for r in without],
        }
        self.distinguishing = sum(a != b for a, b in zip(*self._answers.values(), strict=True))
        """Queries whose answers differ between the versions, which would show a stale or mixed answer."""
        if self.distinguishing < len(self.keys):
            raise RuntimeError(
                f"{len(self.keys)} entries were deleted, and only {self.distinguishing} answers changed"
            )

    def is_right(self, number: int, response: pb.RetrieveResponse) -> bool:
        """Whether a query's answer equals that of the version it names: entries, similarities, tags."""
        return list(response.retrievals) == [self._answers[response.version % 2 == self._odd][number]]


def bad_messages(digest: str, dimension: int) -> list[bytes]:
    """Requests that must be refused: NaN, no such store, no image, another encoder, no message."""
    return [
        request_messages(np.full((1, dimension), np.nan, np.float32), 1, digest)[0],
        pb.RetrieveRequest(store="nothing").SerializeToString(),
        pb.RetrieveRequest(store=STORE, images=[b"no image"]).SerializeToString(),
        pb.RetrieveRequest(store=STORE, fingerprint="another one").SerializeToString(),
        b"\xff\xff no message at all",
    ]


class Load:
    """Requests over `CONNECTIONS` channels, from a thread with its own event loop, during a `with` block.

    With a `rate`, each request is sent when it is due, whatever happened to earlier ones. Without one, each
    channel sends its next request when it has an answer, which measures capacity with the same work on the
    caller's side.
    """

    def __init__(
        self, address: str, expected: Expected, rate: float | None, *, seed: int = 0, bad: float = 0.0
    ) -> None:
        self.tally = Tally()
        self._address, self._expected, self._rate, self._bad_share = address, expected, rate, bad
        self._bad_messages = bad_messages(expected.digest, expected.exact_search.vectors.dimension)
        self._rng = random.Random(seed)
        self._stop = threading.Event()
        self.started: dict[int, float] = {}
        """Time of sending of each request in flight, by number."""
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
        channels = [
            grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS) for _ in range(CONNECTIONS)
        ]
        calls = [channel.unary_unary(RETRIEVE) for channel in channels]
        if self._rate is None:
            await asyncio.gather(*(self._closed_loop(calls[i], i) for i in range(CONNECTIONS)))
        else:
            await self._open_loop(calls, self._rate)
        for channel in channels:
            await channel.close()

    async def _closed_loop(self, call: Callable[..., Any], number: int) -> None:
        while not self._stop.is_set():
            await self._send(call, number)

    async def _open_loop(self, calls: Sequence[Callable[..., Any]], rate: float) -> None:
        tasks: set[asyncio.Task[None]] = set()
        due, number = time.perf_counter(), 0
        while not self._stop.is_set():
            now = time.perf_counter()
            if due > now:
                await asyncio.sleep(due - now)
            self.tally.late.append(time.perf_counter() - due)
            task = asyncio.create_task(self._send(calls[number % CONNECTIONS], number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due += self._rng.expovariate(rate)
            number += 1
            if number % 64 == 0:
                await asyncio.sleep(0)
        await asyncio.gather(*tasks)

    async def _send(self, call: Callable[..., Any], number: int) -> None:
        expected, tally = self._expected, self.tally
        bad = self._rng.random() < self._bad_share
        query = self._rng.randrange(len(expected.messages))
        message = self._rng.choice(self._bad_messages) if bad else expected.messages[query]
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
        # an empty request to the right store is valid: it has no queries, so no fingerprint is compared
        response = pb.RetrieveResponse.FromString(data)
        tally.versions.add(response.version)
        if bad:
            tally.codes["bad: OK"] += 1
            tally.unrefused += bool(response.retrievals)
            return
        tally.codes["OK"] += 1
        tally.seconds.append(time.perf_counter() - start)
        tally.wrong += not expected.is_right(query, response)


class Probed(NamedTuple):
    """What one good caller beside the load saw."""

    p50: float
    p99: float
    """Milliseconds of its answers."""
    answered: int
    refused: int
    failed: list[str]


def probe(address: str, messages: Sequence[bytes], rate: float, seconds: float) -> Probed:
    """Call at even times, or after the last answer if that is later; runs in a process of its own."""
    durations: list[float] = []
    refused, failed = 0, []
    with grpc.insecure_channel(address, CHANNEL_OPTIONS) as channel:
        call = channel.unary_unary(RETRIEVE)
        begin = time.perf_counter()
        for number in range(max(1, int(rate * seconds))):
            time.sleep(max(0.0, begin + number / rate - time.perf_counter()))
            start = time.perf_counter()
            if start > begin + seconds:
                break
            try:
                call(messages[number % len(messages)], timeout=20)
                durations.append(time.perf_counter() - start)
            except grpc.RpcError as error:
                if error.code().name == "RESOURCE_EXHAUSTED":
                    refused += 1
                else:
                    failed.append(f"{error.code().name}: {error.details()}"[:200])
    p50, p99 = percentiles(durations) if durations else (float("nan"), float("nan"))
    return Probed(p50, p99, len(durations), refused, failed)
