"""What gRPC itself costs on this machine: a bare echo, 2 KB in and 1 KB out, behind each face that it has in Python.

    python benchmarks/faces.py [--seconds 2] [--quick]

The server is a process of its own (two with SO_REUSEPORT in one row), the load another; both share the machine's cores. Rows: p50 and p99
of one client, calls a second of eight clients, messages a second over streams. `--work MICROSECONDS` makes the handler spend that much in C
without the GIL (as a search does), which shows what a face costs beside real work.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
from report import table, write

REQUEST, RESPONSE = bytes(2100), bytes(1000)
UNARY, STREAM = "/bench.Echo/Unary", "/bench.Echo/Stream"
FACES = ("sync pool", "sync pool, unix socket", "aio", "aio, uvloop", "aio, uvloop, unix socket", "aio, uvloop, 2 processes")
OPTIONS = [("grpc.so_reuseport", 1)]


def spinner(microseconds: float) -> Any:
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


def serve(face: str, address: str, work: float, ready: Any) -> None:
    spin = spinner(work)
    if not face.startswith("aio"):

        def unary(request: bytes, _: Any) -> bytes:
            spin()
            return RESPONSE

        def stream(requests: Any, _: Any) -> Any:
            for _request in requests:
                spin()
                yield RESPONSE

        server = grpc.server(ThreadPoolExecutor(8), options=OPTIONS)
        server.add_generic_rpc_handlers((handlers(unary, stream),))
        server.add_insecure_port(address)
        server.start()
        ready.set()
        server.wait_for_termination()
        return
    if "uvloop" in face:
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())

    async def main() -> None:
        async def unary(request: bytes, _: Any) -> bytes:
            spin()
            return RESPONSE

        async def stream(requests: Any, _: Any) -> Any:
            async for _request in requests:
                spin()
                yield RESPONSE

        server = grpc.aio.server(options=OPTIONS)
        server.add_generic_rpc_handlers((handlers(unary, stream),))
        server.add_insecure_port(address)
        await server.start()
        ready.set()
        await server.wait_for_termination()

    asyncio.run(main())


def handlers(unary: Any, stream: Any) -> Any:
    return grpc.method_handlers_generic_handler(
        "bench.Echo", {"Unary": grpc.unary_unary_rpc_method_handler(unary), "Stream": grpc.stream_stream_rpc_method_handler(stream)}
    )


def channel(address: str) -> Any:
    return grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)])


def one_client(address: str, seconds: float) -> tuple[float, float]:
    """p50 and p99 of one caller, in ms."""
    with channel(address) as open_channel:
        call = open_channel.unary_unary(UNARY)
        for _ in range(200):
            call(REQUEST)
        spent = []
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            call(REQUEST)
            spent.append(time.perf_counter() - start)
    return float(np.percentile(spent, 50)) * 1e3, float(np.percentile(spent, 99)) * 1e3


def sync_clients(address: str, clients: int, seconds: float) -> float:
    """Calls a second of so many threads, each with a channel of its own."""
    counts = [0] * clients
    gate = threading.Barrier(clients)

    def run(i: int) -> None:
        with channel(address) as open_channel:
            call = open_channel.unary_unary(UNARY)
            call(REQUEST)
            gate.wait()
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                call(REQUEST)
                counts[i] += 1

    threads = [threading.Thread(target=run, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


async def aio_clients(address: str, clients: int, seconds: float) -> float:
    counts = [0] * clients

    async def run(i: int) -> None:
        options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(address, options=options) as open_channel:
            call = open_channel.unary_unary(UNARY)
            await call(REQUEST)
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                await call(REQUEST)
                counts[i] += 1

    await asyncio.gather(*(run(i) for i in range(clients)))
    return sum(counts) / seconds


async def streamed(address: str, ahead: int, seconds: float) -> float:
    """Messages a second of one stream with so many requests on their way."""
    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options=options) as open_channel:
        call = open_channel.stream_stream(STREAM)()
        window = asyncio.Semaphore(ahead)
        end = time.perf_counter() + seconds
        done = 0

        async def send() -> None:
            while time.perf_counter() < end:
                await window.acquire()
                await call.write(REQUEST)
            await call.done_writing()

        sender = asyncio.create_task(send())
        while await call.read() is not grpc.aio.EOF:
            done += 1
            window.release()
        await sender
    return done / seconds


def load(address: str, seconds: float, out: Any) -> None:
    import uvloop

    p50, p99 = one_client(address, seconds)
    sync8 = sync_clients(address, 8, seconds)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        aio8 = runner.run(aio_clients(address, 8, seconds))
        ping = runner.run(streamed(address, 1, seconds))
        pipelined = runner.run(streamed(address, 32, seconds))
    out.put((p50, p99, sync8, aio8, ping, pipelined))


def measure(face: str, seconds: float, work: float) -> tuple[float, ...]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        address = f"unix:{scratch}/socket" if "unix" in face else f"127.0.0.1:{free_port()}"
        servers = []
        for _ in range(2 if "2 processes" in face else 1):
            ready = context.Event()
            servers.append(context.Process(target=serve, args=(face, address, work, ready)))
            servers[-1].start()
            ready.wait(30)
        out = context.Queue()
        client = context.Process(target=load, args=(address, seconds, out))
        client.start()
        figures = out.get(timeout=60 + 10 * seconds)
        client.join()
        for server in servers:
            server.kill()
            server.join()
    return tuple(figures)


def free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=float, default=0.0, metavar="MICROSECONDS")
    parser.add_argument("--quick", action="store_true", help="half a second each, once")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds, arguments.repeats = 0.5, 1
    found: dict[str, list[tuple[float, ...]]] = {face: [] for face in FACES}
    for _ in range(arguments.repeats):
        for face in FACES:  # in turn, so that what else the machine does falls on all of them
            found[face].append(measure(face, arguments.seconds, arguments.work))
    rows = [
        [face, *(f"{np.median(column):,.{2 if i < 2 else 0}f}" for i, column in enumerate(zip(*runs, strict=True)))]
        for face, runs in found.items()
    ]
    header = ["face", "p50 ms", "p99 ms", "8 sync clients, calls/s", "8 aio clients, calls/s", "stream, one at a time", "stream, 32 ahead"]
    about = (
        f"Echo of {len(REQUEST)} -> {len(RESPONSE)} bytes, handler's work {arguments.work:g} us, medians of {arguments.repeats}; "
        "load and server share the cores."
    )
    write("faces", "What gRPC costs by itself", about, table(header, rows), packages=("grpcio", "uvloop"))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    main()
