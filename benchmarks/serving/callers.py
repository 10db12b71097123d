"""Callers over gRPC and in process, one after the other or many at once, and the process that they run in.

A rate counts the calls of each caller over the time to its own last answer: a closed loop, even if one call
takes longer than the given seconds. gRPC's HTTP proxy is off, and every channel has its own connection.
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
CHANNEL_OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 64 << 20),
]
MAX_WARM_CALLS, MAX_WARM_SECONDS, MIN_TIMED_CALLS = 50, 0.5, 20


class Rate(NamedTuple):
    """Calls that callers made."""

    per_second: float
    calls: int


def call_seconds(call: Callable[[int], Any], seconds: float) -> list[float]:
    """Seconds of each call, one after the other, after some warm-up calls that do not count."""
    start = time.perf_counter()
    for i in range(MAX_WARM_CALLS):
        call(i)
        if time.perf_counter() - start > MAX_WARM_SECONDS:
            break
    durations: list[float] = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end or len(durations) < MIN_TIMED_CALLS:
        call(len(durations))
        durations.append(time.perf_counter() - start)
    return durations


def percentiles(durations: Sequence[float]) -> tuple[float, float]:
    """p50 and p99 in ms."""
    p50, p99 = np.percentile(durations, [50, 99]) * 1e3
    return float(p50), float(p99)


def one_caller(address: str, messages: Sequence[bytes], seconds: float) -> tuple[float, float]:
    """p50 and p99 of one blocking caller, ms, from request bytes to answer bytes."""
    with grpc.insecure_channel(address, CHANNEL_OPTIONS) as channel:
        call = channel.unary_unary(RETRIEVE)
        return percentiles(call_seconds(lambda i: call(messages[i % len(messages)]), seconds))


def blocking_callers(address: str, messages: Sequence[bytes], clients: int, seconds: float) -> Rate:
    """Threads with a channel each: the rate of a program that calls gRPC in the plain way."""
    channels = [grpc.insecure_channel(address, CHANNEL_OPTIONS) for _ in range(clients)]
    calls = [channel.unary_unary(RETRIEVE) for channel in channels]
    for channel in channels:
        grpc.channel_ready_future(channel).result(30)
    rate = _thread_rate(lambda i, n: calls[i](messages[(i + n) % len(messages)]), clients, seconds)
    for channel in channels:
        channel.close()
    return rate


def async_callers(address: str, messages: Sequence[bytes], clients: int, seconds: float) -> Rate:
    """Callers with a channel each on one event loop: the load that leaves a server most of the cores."""

    async def run() -> Rate:
        channels = [grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) for _ in range(clients)]
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        start = time.perf_counter()

        async def caller(i: int) -> tuple[int, float]:
            call, done = channels[i].unary_unary(RETRIEVE), 0
            while time.perf_counter() < start + seconds:
                await call(messages[(i + done) % len(messages)])
                done += 1
            return done, time.perf_counter() - start

        results = await asyncio.gather(*(caller(i) for i in range(clients)))
        await asyncio.gather(*(channel.close() for channel in channels))
        return _total(results)

    return _on_uvloop(run)


def stream_caller(address: str, messages: Sequence[bytes], ahead: int, seconds: float) -> Rate:
    """Messages of one stream with at most `ahead` requests unanswered, to the last answer."""

    async def run() -> Rate:
        async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
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

    return _on_uvloop(run)


def threads_in_process(
    query: Callable[[NDArray[np.float32]], Any],
    vectors: NDArray[np.float32],
    clients: int,
    rows: int,
    seconds: float,
) -> Rate:
    """Queries of an in-process function, `rows` a call, from `clients` threads."""
    steps = len(vectors) // rows

    def call(i: int, n: int) -> None:
        offset = (i * 97 + n) % steps * rows
        query(vectors[offset : offset + rows])

    rate = _thread_rate(call, clients, seconds)
    return Rate(rate.per_second * rows, rate.calls * rows)


def _thread_rate(call: Callable[[int, int], Any], clients: int, seconds: float) -> Rate:
    results: list[tuple[int, float]] = []
    barrier = threading.Barrier(clients)

    def run(i: int) -> None:
        barrier.wait()
        start, done = time.perf_counter(), 0
        while time.perf_counter() < start + seconds:
            call(i, done)
            done += 1
        results.append((done, time.perf_counter() - start))

    workers = [threading.Thread(target=run, args=(i,)) for i in range(clients)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if len(results) < clients:
        raise RuntimeError(f"{clients - len(results)} of {clients} callers ended with an error, see above")
    return _total(results)


def _total(results: Sequence[tuple[int, float]]) -> Rate:
    return Rate(sum(done / took for done, took in results), sum(done for done, _ in results))


def _on_uvloop(task: Callable[[], Any]) -> Any:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(task())


class LoadProcess:
    """A process for the load: `load(work, *arguments)` runs a function there and returns its result."""

    def __enter__(self) -> LoadProcess:
        context = multiprocessing.get_context("spawn")
        self._pipe, child_pipe = context.Pipe()
        self._process = context.Process(target=_run_tasks, args=(child_pipe,), daemon=True)
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # gRPC's asyncio API may hang at the interpreter's end after an error
        self._process.join()

    def __call__(self, work: Callable[..., Any], *arguments: Any, timeout: float = 180.0) -> Any:
        self._pipe.send((work, arguments))
        if not self._pipe.poll(timeout):
            raise TimeoutError(f"{work.__name__} did not return in {timeout:g} s")
        succeeded, result = self._pipe.recv()
        if not succeeded:
            raise RuntimeError(result)
        return result


def _run_tasks(pipe: Any) -> None:
    while True:
        try:
            work, arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            pipe.send((True, work(*arguments)))
        except Exception as error:  # noqa: BLE001  sent to the parent, which raises it
            pipe.send((False, f"{work.__name__}: {error!r}"))
