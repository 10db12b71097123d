"""The load: callers over gRPC and in process, one after the other or many at once, and the process of its own that they run in.

A rate is what the callers got done in the time that they took, each to its own last answer: a closed loop, also where one call takes longer
than the seconds it was given. gRPC's HTTP proxy is off, and every channel is a connection.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grpc
import numpy as np
from numpy.typing import NDArray

RETRIEVE = "/tagstore.v1.TagStore/Retrieve"
STREAM = "/tagstore.v1.TagStore/RetrieveStream"
LOCAL = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 64 << 20),
]
WARM_CALLS, WARM_SECONDS, FEWEST = 50, 0.5, 20


class Rate(NamedTuple):
    """What callers got done."""

    per_second: float
    calls: int


def timed(call: Callable[[int], Any], seconds: float) -> list[float]:
    """Seconds of each call, one after the other: for so long, and at least `FEWEST` of them; a few before that do not count."""
    start = time.perf_counter()
    for i in range(WARM_CALLS):
        call(i)
        if time.perf_counter() - start > WARM_SECONDS:
            break
    spent: list[float] = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end or len(spent) < FEWEST:
        call(len(spent))
        spent.append(time.perf_counter() - start)
    return spent


def percentiles(spent: Sequence[float]) -> tuple[float, float]:
    """p50 and p99 in ms."""
    p50, p99 = np.percentile(spent, [50, 99]) * 1e3
    return float(p50), float(p99)


def one_caller(address: str, messages: Sequence[bytes], seconds: float) -> tuple[float, float]:
    """p50 and p99 of one blocking caller, ms: from the bytes of a request to the bytes of its answer."""
    with grpc.insecure_channel(address, LOCAL) as channel:
        call = channel.unary_unary(RETRIEVE)
        return percentiles(timed(lambda i: call(messages[i % len(messages)]), seconds))


def blocking_callers(address: str, messages: Sequence[bytes], clients: int, seconds: float) -> Rate:
    """So many threads with a channel each: what a program gets that calls gRPC in the plain way."""
    channels = [grpc.insecure_channel(address, LOCAL) for _ in range(clients)]
    calls = [channel.unary_unary(RETRIEVE) for channel in channels]
    for channel in channels:
        grpc.channel_ready_future(channel).result(30)
    rate = _threads(lambda i, n: calls[i](messages[(i + n) % len(messages)]), clients, seconds)
    for channel in channels:
        channel.close()
    return rate


def callers(address: str, messages: Sequence[bytes], clients: int, seconds: float) -> Rate:
    """So many callers with a channel each, on one event loop: the load that leaves a server most of the cores."""

    async def run() -> Rate:
        return await _callers(address, messages, clients, seconds)

    return _on_uvloop(run)


async def _callers(address: str, messages: Sequence[bytes], clients: int, seconds: float) -> Rate:
    channels = [grpc.aio.insecure_channel(address, options=LOCAL) for _ in range(clients)]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    start = time.perf_counter()

    async def run(i: int) -> tuple[int, float]:
        call, done = channels[i].unary_unary(RETRIEVE), 0
        while time.perf_counter() < start + seconds:
            await call(messages[(i + done) % len(messages)])
            done += 1
        return done, time.perf_counter() - start

    found = await asyncio.gather(*(run(i) for i in range(clients)))
    await asyncio.gather(*(channel.close() for channel in channels))
    return Rate(sum(done / took for done, took in found), sum(done for done, _ in found))


def streamed(address: str, messages: Sequence[bytes], ahead: int, seconds: float) -> Rate:
    """Messages of one stream with so many requests on their way, to the last answer."""

    async def run() -> Rate:
        return await _streamed(address, messages, ahead, seconds)

    return _on_uvloop(run)


async def _streamed(address: str, messages: Sequence[bytes], ahead: int, seconds: float) -> Rate:
    async with grpc.aio.insecure_channel(address, options=LOCAL) as channel:
        await channel.channel_ready()
        call = channel.stream_stream(STREAM)()
        window = asyncio.Semaphore(ahead)
        start = time.perf_counter()
        done = 0

        async def send() -> None:
            sent = 0
            while time.perf_counter() < start + seconds:
                await window.acquire()
                await call.write(messages[sent % len(messages)])
                sent += 1
            await call.done_writing()

        sender = asyncio.create_task(send())
        while await call.read() is not grpc.aio.EOF:
            done += 1
            window.release()
        await sender
        return Rate(done / (time.perf_counter() - start), done)


def threads(
    ask: Callable[[NDArray[np.float32]], Any],
    vectors: NDArray[np.float32],
    clients: int,
    rows: int,
    seconds: float,
) -> Rate:
    """Queries of an in-process way to ask, so many rows a call, with so many threads."""
    steps = len(vectors) // rows

    def call(i: int, n: int) -> None:
        at = (i * 97 + n) % steps * rows
        ask(vectors[at : at + rows])

    rate = _threads(call, clients, seconds)
    return Rate(rate.per_second * rows, rate.calls * rows)


def _threads(call: Callable[[int, int], Any], clients: int, seconds: float) -> Rate:
    found: list[tuple[int, float]] = []
    gate = threading.Barrier(clients)

    def run(i: int) -> None:
        gate.wait()
        start, done = time.perf_counter(), 0
        while time.perf_counter() < start + seconds:
            call(i, done)
            done += 1
        found.append((done, time.perf_counter() - start))

    workers = [threading.Thread(target=run, args=(i,)) for i in range(clients)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if len(found) < clients:
        raise RuntimeError(f"{clients - len(found)} of {clients} callers ended with an error, see above")
    return Rate(sum(done / took for done, took in found), sum(done for done, _ in found))


def _on_uvloop(task: Callable[[], Any]) -> Any:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(task())


class Apart:
    """A process of its own for a load: `apart(work, *arguments)` runs a function of this module there and returns what it returns."""

    def __enter__(self) -> Apart:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_obey, args=(theirs,), daemon=True)
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # gRPC's asyncio face may hang at the interpreter's end after an error
        self._process.join()

    def __call__(self, work: Callable[..., Any], *arguments: Any, patience: float = 180.0) -> Any:
        self._pipe.send((work, arguments))
        if not self._pipe.poll(patience):
            raise TimeoutError(f"{work.__name__} did not come back in {patience:g} s")
        fine, found = self._pipe.recv()
        if not fine:
            raise RuntimeError(found)
        return found


def _obey(pipe: Any) -> None:
    while True:
        try:
            work, arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            pipe.send((True, work(*arguments)))
        except Exception as error:  # noqa: BLE001  told to the parent, which raises it
            pipe.send((False, f"{work.__name__}: {error!r}"))
