"""The servers that are measured: bare echoes behind each face of gRPC, one of forty lines, and `tagstore serve`; and what they use up."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.serving.query_paths import raw
from benchmarks.synthetic import STORE
from tagstore_proto.v1 import tagstore_pb2 as pb

SERVICE = "tagstore.v1.TagStore"
REUSE = [("grpc.so_reuseport", 1)]
TICK = os.sysconf("SC_CLK_TCK")


# the forty lines: what one would write with FAISS, LMDB and gRPC in an afternoon


def minimal(root: str, version: int, ready: Any, address: str) -> None:
    """A thread pool, FAISS, LMDB, a protobuf with the entry ids and merged tags."""
    from tagstore.storage.store import Store

    ask, snapshot = raw(Path(root), version), Store(root, STORE).snapshot(version or None)

    def retrieve(data: bytes, _: Any) -> bytes:
        request = pb.RetrieveRequest.FromString(data)
        vectors = np.frombuffer(request.vectors.data, np.float32).reshape(-1, request.vectors.dimension)
        response = pb.RetrieveResponse(store=request.store)
        for entries, tags in ask(vectors):
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


def echo(face: str, answer: bytes, work: float, ready: Any, address: str) -> None:
    """The same answer to everything, behind a face: "sync pool", or "aio" with uvloop and threads where its name says so.

    `work` microseconds in C without the GIL, as a search has, are spent in the handler; "in threads" in a pool; "one search thread" gives
    all that waits to one thread as one batch, and the loop is woken once for it.
    """
    spin = spinner(work)
    if not face.startswith("aio"):
        _echo_of_a_pool(answer, spin, ready, address)
        return
    if "uvloop" in face:
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())

    async def main() -> None:
        loop = asyncio.get_running_loop()
        pool = ThreadPoolExecutor(os.cpu_count())
        searching = _OneThread(loop, spin) if "one search thread" in face else None

        async def worked() -> None:
            if searching is not None:
                await searching.work()
            elif "in threads" in face:
                await loop.run_in_executor(pool, spin)
            else:
                spin()

        async def unary(request: bytes, _: Any) -> bytes:
            await worked()
            return answer

        async def stream(requests: Any, _: Any) -> Any:
            async for _request in requests:
                await worked()
                yield answer

        server = grpc.aio.server(options=REUSE)
        server.add_generic_rpc_handlers((_handlers(unary, stream),))
        server.add_insecure_port(address)
        await server.start()
        ready.set()
        await server.wait_for_termination()

    asyncio.run(main())


def _echo_of_a_pool(answer: bytes, spin: Callable[[], Any], ready: Any, address: str) -> None:
    def unary(request: bytes, _: Any) -> bytes:
        spin()
        return answer

    def stream(requests: Any, _: Any) -> Any:
        for _request in requests:
            spin()
            yield answer

    server = grpc.server(ThreadPoolExecutor(8), options=REUSE)
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


class _OneThread:
    """Takes whatever waits as one batch, and tells the loop once when it is done."""

    def __init__(self, loop: asyncio.AbstractEventLoop, spin: Callable[[], Any]) -> None:
        self._loop, self._spin = loop, spin
        self._waiting: queue.SimpleQueue[asyncio.Future[None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def work(self) -> asyncio.Future[None]:
        future = self._loop.create_future()
        self._waiting.put(future)
        return future

    def _run(self) -> None:
        while True:
            batch = [self._waiting.get()]
            while not self._waiting.empty():
                batch.append(self._waiting.get())
            for _ in batch:
                self._spin()
            self._loop.call_soon_threadsafe(_answer, batch)


def _answer(batch: list[asyncio.Future[None]]) -> None:
    for future in batch:
        if not future.done():
            future.set_result(None)


def spinner(microseconds: float) -> Callable[[], Any]:
    """Something that takes about so long in C with the GIL let go."""
    if not microseconds:
        return lambda: None
    a = np.ones((1, 512), np.float32)
    rows = np.ones((512, 64), np.float32)
    start = time.perf_counter()
    for _ in range(2000):
        a @ rows
    each = (time.perf_counter() - start) / 2000 * 1e6
    wide = np.ones((512, max(1, int(64 * microseconds / each))), np.float32)
    return lambda: a @ wide


# how they are run


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def child_server(
    target: Callable[..., None], *first: Any, address: str = "", processes: int = 1
) -> Iterator[tuple[str, list[int]]]:
    """One of the servers above in so many processes of its own: address and processes."""
    context = multiprocessing.get_context("spawn")
    address = address or f"127.0.0.1:{free_port()}"
    running = []
    try:
        for _ in range(processes):
            ready = context.Event()
            process = context.Process(target=target, args=(*first, ready, address))
            process.start()
            running.append(process)
            if not ready.wait(60):
                raise RuntimeError(f"{target.__name__} {first[0]} did not start")
        yield address, [process.pid for process in running if process.pid]
    finally:
        for process in running:
            process.kill()
            process.join()


def serving(root: Path, *options: str) -> subprocess.Popen[str]:
    """`tagstore serve`, just started; its first line is its address, written when it is ready."""
    command = [
        sys.executable,
        "-m",
        "tagstore.cli",
        "serve",
        "--root",
        str(root),
        "--address",
        "127.0.0.1:0",
        "--device",
        "cpu",
        *options,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@contextmanager
def ours(root: Path, *options: str) -> Iterator[tuple[str, int]]:
    """`tagstore serve`: its address and process."""
    process = serving(root, *options)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError(
                f"`tagstore serve {' '.join(options)}` ended with {process.wait()} before it was ready"
            )
        yield address, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


# what they use up


def family(pid: int) -> list[int]:
    """A process and its children, and theirs."""
    children = [
        child
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    return [pid, *(one for child in children for one in family(int(child)))]


def cpu_seconds(*pids: int) -> float:
    """User and system time that processes and their children have had."""
    total = 0
    for pid in [one for top in pids for one in family(top)]:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICK


def private_mib(pid: int) -> float:
    """A process's own memory, its children's included: what is not a mapped file."""
    lines = [
        line
        for one in family(pid)
        for line in Path(f"/proc/{one}/status").read_text().splitlines()
        if line.startswith("RssAnon")
    ]
    return sum(int(line.split()[1]) for line in lines) / 1024
