"""Memory of a server at default limits under requests that are made to take much of it.

    python -m benchmarks.serving.memory_peak [--seconds 10] [--only NAME ...] [--quick]

Each kind of request is sent from many connections for --seconds, then all kinds together. The server's
private memory must stay less than `MAX_PEAK` above that of the idle server, and must come back to within
`MAX_KEPT` of it afterwards. After each kind the server must still answer.
"""

from __future__ import annotations

import asyncio
import io
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from multiprocessing.synchronize import Barrier
from pathlib import Path

import grpc
import numpy as np
from PIL import Image

from benchmarks.processes import memory_mib, running_server
from benchmarks.report import arguments_parser, table, write
from benchmarks.serving.callers import CHANNEL_OPTIONS, RETRIEVE, STREAM
from benchmarks.synthetic import build, fingerprint
from tagstore.ingestion import ingest
from tagstore.serving.settings import Limits
from tagstore.wire import convert
from tagstore_proto.v1 import tagstore_pb2 as pb

MAX_PEAK = 1_500_000_000 / (1 << 20)
"""MiB above the idle server, whatever is asked of it."""
MAX_KEPT = 200.0
"""MiB above the idle server, `SETTLE_SECONDS` after the last request."""
SETTLE_SECONDS = 20.0
DIMENSION, ENTRIES = 512, 20_000
INGEST, DELETE, GET_TAGS = (
    f"/tagstore.v1.{name}" for name in ("Admin/Ingest", "Admin/Delete", "TagStore/GetTags")
)
LIMITS = Limits()
Attack = Callable[[str], Awaitable[None]]


def channel(address: str) -> grpc.aio.Channel:
    options = [*CHANNEL_OPTIONS, ("grpc.max_send_message_length", 256 << 20)]
    return grpc.aio.insecure_channel(address, options=options)


async def repeat(address: str, method: str, messages: Sequence[bytes], connections: int, calls: int) -> None:
    """Send messages without end, `calls` at a time on each of several connections."""

    async def caller(call: grpc.aio.UnaryUnaryMultiCallable, place: int) -> None:
        while True:
            with suppress(grpc.RpcError):
                await call(messages[place % len(messages)], timeout=60)
            place += 1
            await asyncio.sleep(0)

    opened = [channel(address) for _ in range(connections)]
    await asyncio.gather(
        *(caller(c.unary_unary(method), i + j) for i, c in enumerate(opened) for j in range(calls))
    )


async def unread(address: str, method: str, message: bytes, connections: int, calls: int) -> None:
    """Send a message on many calls and read no answer."""
    opened = [channel(address) for _ in range(connections)]
    while True:
        begun = [c.stream_stream(method)() for c in opened for _ in range(calls)]
        for call in begun:
            with suppress(grpc.RpcError, asyncio.InvalidStateError, TimeoutError):
                for _ in range(64 if method == STREAM else 1):
                    await asyncio.wait_for(call.write(message), 0.2)
        await asyncio.sleep(3)
        for call in begun:
            call.cancel()


@lru_cache
def encoded(format: str, mode: str = "RGB", side: int = 8000, **options: object) -> bytes:
    """A picture of one colour: small as a file."""
    picture = Image.new(mode, (side, side))
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def query(**fields: object) -> bytes:
    data: bytes = pb.RetrieveRequest(**fields).SerializeToString()
    return data


def vectors(rows: int, **fields: object) -> bytes:
    values = np.random.default_rng(0).standard_normal((rows, DIMENSION)).astype(np.float16)
    digest = fingerprint(DIMENSION).digest
    return query(store="bench", vectors=convert.vectors_to_proto(values), fingerprint=digest, **fields)


async def large_messages(address: str) -> None:
    image = bytes(LIMITS.image_bytes)
    await repeat(address, RETRIEVE, [query(store="shapes", images=[image])], 16, 4)


def pictures() -> list[bytes]:
    """Pictures that are small as files and as large as a server takes."""
    return [
        encoded("PNG"),
        encoded("PNG", "RGBA"),
        encoded("TIFF", "I", compression="tiff_deflate"),
        encoded("WEBP", side=5700, lossless=True, method=0),
        encoded("JPEG", side=7200, quality=20, progressive=True),
    ]


async def large_pictures(address: str) -> None:
    messages = [query(store="shapes", images=[picture] * 2) for picture in pictures()]
    messages.append(query(store="shapes", images=pictures()))
    await repeat(address, RETRIEVE, messages, 8, 2)


async def many_pictures(address: str) -> None:
    await repeat(address, RETRIEVE, [query(store="shapes", images=[encoded("PNG", side=300)] * 256)], 8, 4)


async def unread_answers(address: str) -> None:
    await unread(address, RETRIEVE, vectors(65, k=1000), 32, 32)


async def unread_streams(address: str) -> None:
    await unread(address, STREAM, vectors(65, k=1000), 4, 2)


async def many_answers(address: str) -> None:
    messages = [vectors(65, k=1000, max_tags=n, exact=n % 2 == 0) for n in range(8)]
    messages.append(vectors(4096, k=15))
    await repeat(address, RETRIEVE, messages, 8, 8)


async def vocabulary(address: str) -> None:
    request = pb.GetTagsRequest(store="bench", page_size=10_000, embeddings=True)
    await repeat(address, GET_TAGS, [request.SerializeToString()], 8, 16)


async def empty_fields(address: str) -> None:
    """Messages of fields that are a few bytes on the wire and many in memory."""
    size = LIMITS.message_bytes - 64
    store = query(store="bench")

    def filled(field: bytes) -> bytes:
        return store + field * ((size - len(store)) // len(field))

    def nested(field: bytes, number: int) -> bytes:
        inside = field * ((size - 16) // len(field))
        length, varint = len(inside), b""
        while length > 127:
            varint, length = varint + bytes([length & 127 | 128]), length >> 7
        return store + bytes([number << 3 | 2]) + varint + bytes([length]) + inside

    numbers = {name: field.number for name, field in pb.RetrieveRequest.DESCRIPTOR.fields_by_name.items()}

    def tag(name: str, value: bytes = b"") -> bytes:
        key = numbers[name] << 3 | 2
        head = bytes([key]) if key < 128 else bytes([key & 127 | 128, key >> 7])
        return head + bytes([len(value)]) + value

    keys = pb.Exclude.DESCRIPTOR.fields_by_name["keys"].number
    messages = [
        filled(tag("identities")),
        filled(tag("texts")),
        filled(tag("images")),
        filled(tag("where")),
        filled(tag("where", b"\x0a\x01a")),
        nested(bytes([keys << 3 | 2, 1, 97]), numbers["exclude"]),
    ]
    near = pb.DeleteRequest.DESCRIPTOR.fields_by_name["near"].number
    deletes = [pb.DeleteRequest(store="bench").SerializeToString() + bytes([near << 3 | 2, 0]) * (size // 3)]
    await asyncio.gather(repeat(address, RETRIEVE, messages, 4, 2), repeat(address, DELETE, deletes, 2, 2))


async def half_messages(address: str) -> None:
    """Messages of the largest size of which the last bytes never come, on streams and calls."""
    host, _, port = address.rpartition(":")
    message = query(store="shapes", images=[bytes(LIMITS.image_bytes)])
    limit = len(message) - 4096

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream = await asyncio.open_connection(host, int(port))

        async def forward(source: asyncio.StreamReader, sink: asyncio.StreamWriter, most: float) -> None:
            passed = 0
            with suppress(OSError):
                while (data := await source.read(1 << 16)) and passed < most:
                    sink.write(data)
                    await sink.drain()
                    passed += len(data)
                if passed < most:
                    sink.close()

        await asyncio.gather(forward(reader, upstream, limit), forward(upstream_reader, writer, float("inf")))

    proxy = await asyncio.start_server(connection, "127.0.0.1", 0)
    through = f"127.0.0.1:{proxy.sockets[0].getsockname()[1]}"

    async def stalled(method: str) -> None:
        while True:
            async with channel(through) as opened:
                call = opened.stream_stream(method)()
                with suppress(grpc.RpcError, asyncio.InvalidStateError, TimeoutError):
                    await asyncio.wait_for(call.write(message), 20)
                    await asyncio.wait_for(call.read(), 20)
                call.cancel()

    await asyncio.gather(*(stalled(method) for method in [RETRIEVE] * 20 + [STREAM] * 12 + [INGEST] * 8))


async def ingests(address: str) -> None:
    picture, large = encoded("PNG", side=300) + bytes(1 << 20), pictures()[0]

    async def stream(number: int) -> None:
        while True:
            async with channel(address) as opened:
                call = opened.stream_stream(INGEST)()
                reader = asyncio.create_task(_drain(call))
                with suppress(grpc.RpcError, asyncio.InvalidStateError):
                    start = pb.IngestStart(store=f"made{number}", encoder="mini")
                    await call.write(pb.IngestRequest(start=start).SerializeToString())
                    for i in range(10_000):
                        image = large if i % 50 == 49 else picture
                        pair = pb.Pair(key=str(i), image=image, captions=["a picture"])
                        await call.write(pb.IngestRequest(pair=pair).SerializeToString())
                reader.cancel()
                await asyncio.sleep(0.1)

    await asyncio.gather(*(stream(number) for number in range(12)))


async def _drain(call: grpc.aio.StreamStreamCall) -> None:
    with suppress(grpc.RpcError, asyncio.CancelledError):
        while await call.read() is not grpc.aio.EOF:
            pass


ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        large_messages,
        large_pictures,
        many_pictures,
        unread_answers,
        unread_streams,
        many_answers,
        vocabulary,
        empty_fields,
        half_messages,
        ingests,
    )
}


def _attack(name: str, address: str, begun: Barrier) -> None:
    pictures()  # takes a while
    begun.wait(300)
    asyncio.run(ATTACKS[name](address))


def under_attack(names: Sequence[str], address: str, pid: int, seconds: float) -> float:
    """Run attacks, each in a process; returns the largest private memory of the server, MiB."""
    context = multiprocessing.get_context("spawn")
    begun = context.Barrier(len(names) + 1)
    processes = [
        context.Process(target=_attack, args=(name, address, begun), name=name, daemon=True) for name in names
    ]
    for process in processes:
        process.start()
    begun.wait(300)
    with watched(pid) as peak:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.1)
            if not Path(f"/proc/{pid}").exists():
                raise RuntimeError(f"the server died under {', '.join(names)}")
        broken = [process.name for process in processes if not process.is_alive()]
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
    if broken:
        raise RuntimeError(f"{', '.join(broken)} ended by itself")
    return peak[0]


@contextmanager
def watched(pid: int) -> Iterator[list[float]]:
    """Give a list with the largest private memory of a process, MiB, until the block ends."""
    peak, stop = [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], memory_mib(pid)[0])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def settled(pid: int, limit: float) -> float:
    """Wait until the server's private memory is at most `limit`, or for long enough; returns it in MiB."""
    end = time.monotonic() + SETTLE_SECONDS
    while (now := memory_mib(pid)[0]) > limit and time.monotonic() < end:
        time.sleep(0.2)
    return now


def make_stores(root: Path, folder: Path) -> None:
    """A store of pictures with the encoder `mini`, and one of synthetic vectors."""
    folder.mkdir()
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (64, 64), colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {colour} square")
    ingest(str(folder), root=root, store="shapes", encoder="mini", device="cpu")
    build(root, ENTRIES, DIMENSION)


def measure(names: Sequence[str], seconds: float, together: float) -> tuple[list[list[object]], list[str]]:
    """Return a row for each attack, and what did not hold."""
    rows: list[list[object]] = []
    broken: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "root"
        make_stores(root, Path(scratch) / "source")
        with running_server(root, "--workers", "1", "--anonymous", "ingest") as (address, pid):
            time.sleep(1)
            idle = memory_mib(pid)[0]
            rounds = [([name], seconds) for name in names]
            if together:
                rounds.append((list(names), together))
            for attack, duration in rounds:
                name = attack[0] if len(attack) == 1 else "all together"
                peak = under_attack(attack, address, pid, duration) - idle
                kept = settled(pid, idle + MAX_KEPT) - idle
                print(f"{name}: peak {peak:.0f} MiB above {idle:.0f}, kept {kept:.0f}", flush=True)
                rows.append([name, f"{peak:.0f}", f"{kept:.0f}"])
                if peak > MAX_PEAK or kept > MAX_KEPT:
                    broken.append(name)
                with grpc.insecure_channel(address, CHANNEL_OPTIONS) as opened:
                    opened.unary_unary(RETRIEVE)(vectors(1), timeout=60)
    return rows, broken


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--only", nargs="*", choices=sorted(ATTACKS), default=sorted(ATTACKS))
    parser.add_argument("--quick", action="store_true", help="three seconds each, not kept")
    arguments = parser.parse_args()
    seconds = 3.0 if arguments.quick else arguments.seconds
    rows, broken = measure(arguments.only, seconds, 3 * seconds if len(arguments.only) > 1 else 0.0)
    about = (
        f"One worker at default limits, {os.cpu_count()} cores shared with the callers; stores of 3 pictures "
        f"(mini) and of {ENTRIES:,} entries of {DIMENSION} dimensions. Private memory above that of the idle "
        f"server; the limit is {MAX_PEAK:.0f} MiB, of what is kept {MAX_KEPT:.0f} MiB."
    )
    verdict = f"Did not hold: {', '.join(broken)}." if broken else "Everything that must hold held."
    parts = [table(["requests", "peak, MiB", "kept, MiB"], rows), verdict]
    write("memory", "Memory of a server under attack", about, *parts, packages=("grpcio", "pillow"),
          keep=not arguments.quick and len(arguments.only) == len(ATTACKS))  # fmt: skip
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
