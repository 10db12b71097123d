"""Servers to compare with: bare echoes behind each API of gRPC, and one of forty lines."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.processes import free_port
from benchmarks.serving.query_paths import raw_faiss_lmdb
from benchmarks.synthetic import STORE
from tagstore_proto.v1 import tagstore_pb2 as pb

SERVICE = "tagstore.v1.TagStore"
REUSE_PORT = [("grpc.so_reuseport", 1)]


# the forty lines: what one would write with FAISS, LMDB and gRPC in an afternoon


def forty_line_server(root: str, version: int, ready: Any, address: str) -> None:
    """A thread pool, FAISS, LMDB, a protobuf with the entry ids and merged tags."""
    from tagstore.storage.store import Store

    query, snapshot = raw_faiss_lmdb(Path(root), version), Store(root, STORE).snapshot(version or None)

    def retrieve(data: bytes, _: Any) -> bytes:
        request = pb.RetrieveRequest.FromString(data)
        vectors = np.frombuffer(request.vectors.data, np.float32).reshape(-1, request.vectors.dimension)
        response = pb.RetrieveResponse(store=request.store)
        for entries, tags in query(vectors):
            answer = response.retrievals.add()
            for entry in entries:
                answer.neighbours.add(entry_id=entry)
            for tag in tags:
                answer.tags.add(tag_id=tag, tag=snapshot.tags([tag])[0][0])
        return response.SerializeToString()

    server = grpc.server(ThreadPoolExecutor(8))
    handler = grpc.unary_unary_rpc_method_handler(retrieve)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Retrieve": handler}),))
    server.add_insecure_port(address)
    server.start()
    ready.set()
    server.wait_for_termination()


# bare gRPC: bytes in, bytes out


def echo_server(api: str, answer: bytes, microseconds: float, ready: Any, address: str) -> None:
    """Give the same answer to every call.

    `api` is "sync pool", or "aio" with words that add uvloop and threads. The handler works for so many
    microseconds in C without the GIL, as a search does: in the loop, "in threads" of a pool, or in "one
    search thread" that takes all waiting calls as one batch and wakes the loop once for it.
    """
    work = c_work(microseconds)
    if not api.startswith("aio"):
        _thread_pool_echo(answer, work, ready, address)
        return
    if "uvloop" in api:
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())

    async def main() -> None:
        loop = asyncio.get_running_loop()
        pool = ThreadPoolExecutor(os.cpu_count())
        batches = _BatchThread(loop, work) if "one search thread" in api else None

        async def do_work() -> None:
            if batches is not None:
                await batches.submit()
            elif "in threads" in api:
                await loop.run_in_executor(pool, work)
            else:
                work()

        async def unary(request: bytes, _: Any) -> bytes:
            await do_work()
            return answer

        async def stream(requests: Any, _: Any) -> Any:
            async for _request in requests:
                await do_work()
                yield answer

        server = grpc.aio.server(options=REUSE_PORT)
        server.add_generic_rpc_handlers((_handlers(unary, stream),))
        server.add_insecure_port(address)
        await server.start()
        ready.set()
        await server.wait_for_termination()

    asyncio.run(main())


def _thread_pool_echo(answer: bytes, work: Callable[[], Any], ready: Any, address: str) -> None:
    def unary(request: bytes, _: Any) -> bytes:
        work()
        return answer

    def stream(requests: Any, _: Any) -> Any:
        for _request in requests:
            work()
            yield answer

    server = grpc.server(ThreadPoolExecutor(8), options=REUSE_PORT)
    server.add_generic_rpc_handlers((_handlers(unary, stream),))
    server.add_insecure_port(address)
    server.start()
    ready.set()
    server.wait_for_termination()


def _handlers(unary: Any, stream: Any) -> Any:
    methods = {
        "Retrieve": grpc.unary_unary_rpc_method_handler(unary),
        "RetrieveStream": grpc.stream_stream_rpc_method_handler(stream),
    }
    return grpc.method_handlers_generic_handler(SERVICE, methods)


class _BatchThread:
    """A thread that takes all waiting calls as one batch, and wakes the loop once when it is done."""

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Callable[[], Any]) -> None:
        self._loop, self._work = loop, work
        self._waiting: queue.SimpleQueue[asyncio.Future[None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self) -> asyncio.Future[None]:
        future = self._loop.create_future()
        self._waiting.put(future)
        return future

    def _run(self) -> None:
        while True:
            batch = [self._waiting.get()]
            while not self._waiting.empty():
                batch.append(self._waiting.get())
            for _ in batch:
                self._work()
            self._loop.call_soon_threadsafe(_resolve, batch)


def _resolve(batch: list[asyncio.Future[None]]) -> None:
    for future in batch:
        if not future.done():
            future.set_result(None)


def c_work(microseconds: float) -> Callable[[], Any]:
    """A function that takes about so long in C without the GIL."""
    if not microseconds:
        return lambda: None
    row = np.ones((1, 512), np.float32)
    matrix = np.ones((512, 64), np.float32)
    start = time.perf_counter()
    for _ in range(2000):
        row @ matrix
    each = (time.perf_counter() - start) / 2000 * 1e6
    wide = np.ones((512, max(1, int(64 * microseconds / each))), np.float32)
    return lambda: row @ wide


@contextmanager
def in_processes(
    server: Callable[..., None], *arguments: Any, address: str = "", processes: int = 1
) -> Iterator[tuple[str, list[int]]]:
    """Run one of the servers above in its own processes; gives its address and process ids."""
    context = multiprocessing.get_context("spawn")
    address = address or f"127.0.0.1:{free_port()}"
    running = []
    try:
        for _ in range(processes):
            ready = context.Event()
            process = context.Process(target=server, args=(*arguments, ready, address))
            process.start()
            running.append(process)
            if not ready.wait(60):
                raise RuntimeError(f"{server.__name__} {arguments[0]} did not start")
        yield address, [process.pid for process in running if process.pid]
    finally:
        for process in running:
            process.kill()
            process.join()
