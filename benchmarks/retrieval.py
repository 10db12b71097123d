"""What the service adds to its parts: raw FAISS and LMDB in process, a bare gRPC echo, and a server of forty lines, all in one run.

    python benchmarks/retrieval.py [--entries 200000] [--rounds N] [--index auto|hnsw|...] [--quick] [--images FOLDER] [--others PYTHON]

Correctness first: answers of every way to ask are compared before anything is timed. The load runs in processes of its own; load and server
share the machine's cores, in every row alike. Rows are measured in turn, in so many rounds as the time allows; medians, lowest and highest.

--others PYTHON is the interpreter of an environment with the engines that users would pick instead (see `others.py`); without it they are
left out, and the report says so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from report import table, write
from synthetic import STORE, build, fingerprint, queries

from tagstore import convert
from tagstore.types import Search
from tagstore_proto.v1 import tagstore_pb2 as pb

K = 5
RAW = "raw FAISS + LMDB, in process"
RETRIEVE = "/tagstore.v1.TagStore/Retrieve"
STREAM = "/tagstore.v1.TagStore/RetrieveStream"
LOCAL = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 64 << 20)]


# the ways to ask, each a function of queries [N, D] that answers with (entry ids, tag ids) of each


def raw(root: Path) -> Callable[[np.ndarray], list[Any]]:
    """FAISS and LMDB called directly: search, get the records, decode, merge. What anybody must pay."""
    import faiss

    from tagstore.faiss_index import plan_of
    from tagstore.kinds import parameters
    from tagstore.records import decode_hot
    from tagstore.store import U64, Store

    snapshot = Store(root, STORE).snapshot()
    files = snapshot.version.index["files"]
    parts = [faiss.read_index(str(snapshot.store.index_directory / about["file"]), faiss.IO_FLAG_MMAP_IFC) for about in files]
    # an index for a budget is searched as it was tuned: raw FAISS at the same recall, not at FAISS's defaults
    told = [parameters(plan_of(about["plan"]), Search(), K, 1.0, None) if "plan" in about else None for about in files]
    env, db = snapshot.store.env, snapshot.store.db["entries"]

    def ask(vectors: np.ndarray) -> list[Any]:
        found = [part.search(vectors, K, params=how) for part, how in zip(parts, told, strict=True)]
        ids = np.concatenate([i for _, i in found], axis=1)
        if len(parts) > 1:
            order = np.argsort(-np.concatenate([s for s, _ in found], axis=1), axis=1)[:, :K]
            ids = np.take_along_axis(ids, order, axis=1)
        answers = []
        with env.begin(buffers=True) as txn:
            for row in ids.tolist():
                votes: dict[int, int] = {}
                for entry in row:
                    for tag in decode_hot(txn.get(U64.pack(entry), db=db))[1]:
                        votes[tag] = votes.get(tag, 0) + 1
                answers.append((row, sorted(votes, key=lambda t: -votes[t])))
        return answers

    return ask


def in_process(root: Path) -> Callable[[np.ndarray], list[Any]]:
    """Our engine without the wire."""
    from tagstore.engine import Engine
    from tagstore.store import Store

    engine = Engine(Store(root, STORE).snapshot())
    search = Search(k=K)
    return lambda vectors: engine.retrieve(vectors, search)


def minimal(root: str, ready: Any, port: int) -> None:
    """The server of forty lines: a thread pool, FAISS, LMDB, a protobuf with the entry ids and merged tags."""
    ask = raw(Path(root))
    texts = _texts(root)

    def retrieve(data: bytes, _: Any) -> bytes:
        request = pb.RetrieveRequest.FromString(data)
        vectors = np.frombuffer(request.vectors.data, np.float32).reshape(-1, request.vectors.dimension)
        response = pb.RetrieveResponse(store=request.store)
        for entries, tags in ask(vectors):
            answer = response.retrievals.add()
            for entry in entries:
                answer.neighbours.add(entry_id=entry)
            for tag in tags:
                answer.tags.add(tag_id=tag, tag=texts(tag))
        return response.SerializeToString()

    server = grpc.server(ThreadPoolExecutor(8))
    handler = grpc.unary_unary_rpc_method_handler(retrieve)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("tagstore.v1.TagStore", {"Retrieve": handler}),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    ready.set()
    server.wait_for_termination()


def _texts(root: str) -> Callable[[int], str]:
    from tagstore.store import Store

    snapshot = Store(root, STORE).snapshot()
    return lambda tag: snapshot.tags([tag])[0][0]


def echo(answer: bytes, ready: Any, port: int) -> None:
    """Nothing but gRPC: bytes of the sizes that our calls have."""
    server = grpc.server(ThreadPoolExecutor(8))
    unary = grpc.unary_unary_rpc_method_handler(lambda request, _: answer)
    stream = grpc.stream_stream_rpc_method_handler(lambda requests, _: (answer for _request in requests))
    methods = {"Retrieve": unary, "RetrieveStream": stream}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("tagstore.v1.TagStore", methods),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    ready.set()
    server.wait_for_termination()


# the load


def requests_of(vectors: np.ndarray, rows: int, digest: str) -> list[bytes]:
    """Serialized requests of so many queries each."""
    messages = []
    for start in range(0, len(vectors) - rows + 1, rows):
        request = pb.RetrieveRequest(store=STORE, vectors=convert.vectors_to_proto(vectors[start : start + rows]), fingerprint=digest, k=K)
        messages.append(request.SerializeToString())
    return messages


def latency(address: str, messages: Sequence[bytes], seconds: float) -> list[float]:
    """p50 and p99 of one caller, ms."""
    with grpc.insecure_channel(address, LOCAL) as channel:
        call = channel.unary_unary(RETRIEVE)
        spent = _timed(lambda i: call(messages[i % len(messages)]), seconds)
    return [float(np.percentile(spent, 50)) * 1e3, float(np.percentile(spent, 99)) * 1e3]


def _timed(call: Callable[[int], Any], seconds: float) -> list[float]:
    for i in range(50):
        call(i)
    spent: list[float] = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        call(len(spent))
        spent.append(time.perf_counter() - start)
    return spent


async def _unary(address: str, messages: Sequence[bytes], clients: int, seconds: float) -> list[float]:
    counts = [0] * clients

    async def run(i: int) -> None:
        async with grpc.aio.insecure_channel(address, options=LOCAL) as channel:
            call = channel.unary_unary(RETRIEVE)
            await call(messages[i % len(messages)])
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                await call(messages[(i + counts[i]) % len(messages)])
                counts[i] += 1

    await asyncio.gather(*(run(i) for i in range(clients)))
    return [sum(counts) / seconds]


async def _streamed(address: str, messages: Sequence[bytes], ahead: int, seconds: float) -> list[float]:
    async with grpc.aio.insecure_channel(address, options=LOCAL) as channel:
        call = channel.stream_stream(STREAM)()
        window = asyncio.Semaphore(ahead)
        end = time.perf_counter() + seconds
        done = 0

        async def send() -> None:
            sent = 0
            while time.perf_counter() < end:
                await window.acquire()
                await call.write(messages[sent % len(messages)])
                sent += 1
            await call.done_writing()

        sender = asyncio.create_task(send())
        while await call.read() is not grpc.aio.EOF:
            done += 1
            window.release()
        await sender
    return [done / seconds]


def throughput(address: str, messages: Sequence[bytes], clients: int, seconds: float) -> list[float]:
    return _run(_unary(address, messages, clients, seconds))


def streamed(address: str, messages: Sequence[bytes], ahead: int, seconds: float) -> list[float]:
    return _run(_streamed(address, messages, ahead, seconds))


def _run(task: Any) -> list[float]:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found: list[float] = runner.run(task)
    return found


def threads(ask: Callable[[np.ndarray], Any], vectors: np.ndarray, clients: int, rows: int, seconds: float) -> list[float]:
    """Queries a second of an in-process way to ask, with so many threads."""
    counts = [0] * clients

    def run(i: int) -> None:
        end = time.perf_counter() + seconds
        at = i * 97
        while time.perf_counter() < end:
            at = (at + rows) % (len(vectors) - rows)
            ask(vectors[at : at + rows])
            counts[i] += rows

    workers = [threading.Thread(target=run, args=(i,)) for i in range(clients)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return [sum(counts) / seconds]


def _child(work: Callable[..., list[float]], arguments: Sequence[Any], out: Any) -> None:
    try:
        out.put(work(*arguments))
    except BaseException as error:  # noqa: BLE001  told to the parent, which raises it
        out.put(repr(error))
    out.close()
    out.join_thread()
    os._exit(0)  # gRPC's asyncio face may hang at the interpreter's end after an error


def apart(work: Callable[..., list[float]], *arguments: Any) -> list[float]:
    """Run a load in a process of its own."""
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    child = context.Process(target=_child, args=(work, arguments, out))
    child.start()
    try:
        found = out.get(timeout=120)
    finally:
        child.join(10)
        child.kill()
    if isinstance(found, str):
        raise RuntimeError(found)
    return list(found)


# the servers


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def child_server(target: Callable[..., None], first: Any) -> Iterator[str]:
    context = multiprocessing.get_context("spawn")
    ready, port = context.Event(), free_port()
    process = context.Process(target=target, args=(first, ready, port))
    process.start()
    try:
        assert ready.wait(60)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.join()


@contextmanager
def ours(root: Path, *options: str) -> Iterator[tuple[str, int]]:
    """`tagstore serve`: its address and process."""
    command = [sys.executable, "-m", "tagstore.cli", "serve", "--root", str(root), "--address", "127.0.0.1:0", "--device", "cpu", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


# correctness


def check(address: str, root: Path, vectors: np.ndarray, digest: str) -> float:
    """Every way to ask gives the same answer; returns the recall@5 of the index against exact search."""
    local = in_process(root)(vectors)
    exact_search = Search(k=K, exact=True)
    from tagstore.engine import Engine
    from tagstore.store import Store

    exact = Engine(Store(root, STORE).snapshot()).retrieve(vectors, exact_search)
    recall = float(
        np.mean(
            [len({n.entry_id for n in a.neighbours} & {n.entry_id for n in b.neighbours}) / K for a, b in zip(local, exact, strict=True)]
        )
    )
    singles = [pb.RetrieveRequest.FromString(m) for m in requests_of(vectors, 1, digest)]
    with grpc.insecure_channel(address, LOCAL) as channel:
        call = channel.unary_unary(RETRIEVE, pb.RetrieveRequest.SerializeToString, pb.RetrieveResponse.FromString)
        stream = channel.stream_stream(STREAM, pb.RetrieveRequest.SerializeToString, pb.RetrieveStreamResponse.FromString)
        with ThreadPoolExecutor(8) as pool:
            unary = [convert.retrievals_from_proto(r)[0] for r in pool.map(call, singles)]
        streams = [convert.retrievals_from_proto(r.response)[0] for r in stream(iter(singles))]
    assert unary == local, "answers over gRPC differ from those in process"
    assert streams == local, "answers on a stream differ from those in process"
    found = raw(root)(vectors)
    assert np.mean([len(set(ids) & {n.entry_id for n in b.neighbours}) / K for (ids, _), b in zip(found, exact, strict=True)]) > 0.9
    return recall


# the report


class Rows:
    """Figures by row and column, over rounds."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], list[float]] = {}

    def add(self, row: str, column: str, value: float) -> None:
        self.found.setdefault((row, column), []).append(value)

    def median(self, row: str, column: str) -> float:
        return float(np.median(self.found.get((row, column), [float("nan")])))

    def ratio(self, row: str, column: str, other: str, other_column: str) -> str:
        return f"{self.median(row, column) / self.median(other, other_column):.2f}"

    def table(self, rows: Sequence[str], columns: Sequence[tuple[str, int]]) -> str:
        return table(["", *(c for c, _ in columns)], [[row, *(self._cell(row, c, digits) for c, digits in columns)] for row in rows])

    def _cell(self, row: str, column: str, digits: int) -> str:
        values = self.found.get((row, column))
        if not values:
            return ""
        middle, low, high = np.median(values), min(values), max(values)
        return f"{middle:,.{digits}f} ({low:,.{digits}f}–{high:,.{digits}f})"


COLUMNS = (("p50 ms", 3), ("p99 ms", 3), ("8 clients, /s", 0), ("64 clients, /s", 0), ("batch 64, /s", 0), ("stream, 64 ahead, /s", 0))


def one_round(rows: Rows, root: Path, addresses: dict[str, str], vectors: np.ndarray, digest: str, seconds: float) -> None:
    ones, batches = requests_of(vectors, 1, digest), requests_of(vectors, 64, digest)
    for name, make in ((RAW, raw), ("our engine, in process", in_process)):
        ask = make(root)
        spent = _timed(lambda i, ask=ask: ask(vectors[i % len(vectors)][None]), seconds)
        rows.add(name, "p50 ms", float(np.percentile(spent, 50)) * 1e3)
        rows.add(name, "p99 ms", float(np.percentile(spent, 99)) * 1e3)
        rows.add(name, "8 clients, /s", threads(ask, vectors, 8, 1, seconds)[0])
        rows.add(name, "batch 64, /s", threads(ask, vectors, 1, 64, seconds)[0])
    for name, address in addresses.items():
        p50, p99 = apart(latency, address, ones, seconds)
        rows.add(name, "p50 ms", p50)
        rows.add(name, "p99 ms", p99)
        rows.add(name, "8 clients, /s", apart(throughput, address, ones, 8, seconds)[0])
        rows.add(name, "64 clients, /s", apart(throughput, address, ones, 64, seconds)[0])
        if not name.startswith("bare"):
            rows.add(name, "batch 64, /s", apart(throughput, address, batches, 2, seconds)[0] * 64)
        if not name.startswith("a server"):
            rows.add(name, "stream, 64 ahead, /s", apart(streamed, address, ones, 64, seconds)[0])


def by_image(images: Path, seconds: float) -> str:
    """By image bytes: what the whole takes, and how much of it is not the encoder."""
    from tagstore.encoder import load_encoder
    from tagstore.images import decode

    paths = sorted(p for p in images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))[:64]
    data = [path.read_bytes() for path in paths]
    encoder = load_encoder("mini", device="cpu")
    pixels = [encoder.prepare(decode(d)) for d in data]
    sizes = {
        n: _timed(lambda i, n=n: encoder.encode_images(np.stack([pixels[(i + j) % len(pixels)] for j in range(n)])), seconds)
        for n in (1, 4)
    }
    alone = float(np.median(sizes[1]))
    with tempfile.TemporaryDirectory() as scratch:
        from tagstore.builder import ingest_pairs
        from tagstore.types import Pair

        pairs = (Pair(str(i), d, (f"a picture of thing {i % 7}",)) for i, d in enumerate(data))
        ingest_pairs(pairs, root=scratch, store="pictures", encoder=encoder)
        with ours(Path(scratch)) as (address, _), grpc.insecure_channel(address, LOCAL) as channel:
            call = channel.unary_unary(RETRIEVE, pb.RetrieveRequest.SerializeToString)
            whole = float(np.median(_timed(lambda i: call(pb.RetrieveRequest(store="pictures", images=[data[i % len(data)]])), seconds)))
    share = 1 - alone / whole
    size = f"{np.mean([len(d) for d in data]) / 1024:.0f} KiB"
    return table(
        ["by image", "value"],
        [
            ["images", f"{len(data)} files, {size} on average"],
            ["p50 of a call: decode, embed, search, tags, wire", f"{whole * 1e3:.1f} ms"],
            ["p50 of the encoder alone, one image", f"{alone * 1e3:.1f} ms"],
            ["p50 of the encoder, of four together, an image", f"{float(np.median(sizes[4])) / 4 * 1e3:.1f} ms"],
            ["share that is not the encoder", f"{share:.0%}"],
        ],
    )


def compare_others(python: str | None, root: Path, vectors: np.ndarray, n: int, seconds: float) -> str:
    if not python:
        return "Other engines: left out; pass --others PYTHON, an interpreter that has them (`benchmarks/others.py` says which)."
    from tagstore.store import Store

    snapshot = Store(root, STORE).snapshot()
    ids = snapshot.live()
    with tempfile.TemporaryDirectory() as scratch:
        np.save(f"{scratch}/vectors.npy", snapshot.vectors(ids).astype(np.float32))
        np.save(f"{scratch}/queries.npy", vectors)
        (Path(scratch) / "tags.json").write_text(json.dumps([tags for _, tags in snapshot.keys_and_tags(ids.tolist())]))
        command = [python, str(Path(__file__).parent / "others.py"), scratch, "--seconds", str(seconds)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        return f"Other engines: `others.py` ended with {done.returncode}: {done.stderr[-500:]}"
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=200_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--index", default="", help="kind of index, as of `tagstore build-index --kind`; what an ingest makes if not given")
    parser.add_argument("--recall", type=float, default=0.95, help="for --index auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each figure")
    parser.add_argument("--images", type=Path, help="folder of pictures for the figures by image bytes")
    parser.add_argument("--others", metavar="PYTHON", help="interpreter with other engines")
    parser.add_argument("--directory", type=Path, help="where to make the store, or where one is from a run before")
    parser.add_argument("--quick", action="store_true", help="20,000 entries, one round of half seconds: to see that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.entries, arguments.rounds, arguments.seconds = 20_000, 1, 0.5
    with tempfile.TemporaryDirectory() as scratch:
        measure(Path(arguments.directory or scratch), arguments)


def measure(root: Path, arguments: argparse.Namespace) -> None:
    n, dimension, seconds = arguments.entries, arguments.dimension, arguments.seconds
    root.mkdir(exist_ok=True)
    if not (root / STORE).exists():
        build(root, n, dimension)
    if arguments.index:
        build_index(root, arguments.index, arguments.recall)
    digest = fingerprint(dimension).digest
    vectors = queries(2048, n, dimension)
    rows = Rows()
    with ours(root, "--workers", "1") as (address, _):
        recall = check(address, root, vectors[:200], digest)
        answer = _answer(address, requests_of(vectors, 1, digest)[0])
        with child_server(echo, answer) as bare, child_server(minimal, str(root)) as small:
            addresses = {"bare gRPC echo": bare, "a server of forty lines": small, "tagstore serve": address}
            for _ in range(arguments.rounds):
                one_round(rows, root, addresses, vectors, digest, seconds)
    with ours(root, "--workers", "2") as (address, _):
        for _ in range(arguments.rounds):
            rows.add(
                "tagstore serve, 2 workers", "8 clients, /s", apart(throughput, address, requests_of(vectors, 1, digest), 8, seconds)[0]
            )
            rows.add(
                "tagstore serve, 2 workers", "64 clients, /s", apart(throughput, address, requests_of(vectors, 1, digest), 64, seconds)[0]
            )
    ours_, two = "tagstore serve", "tagstore serve, 2 workers"
    names = [RAW, "our engine, in process", *addresses, two]
    added = rows.median(ours_, "p50 ms") - rows.median("bare gRPC echo", "p50 ms") - rows.median(RAW, "p50 ms")
    eight, sixty_four, stream = "8 clients, /s", "64 clients, /s", "stream, 64 ahead, /s"
    ratios = table(
        ["figure", "value", "target"],
        [
            ["p50 added over echo + search", f"{added:.2f} ms", "0.3 ms at most"],
            ["8 clients, beside the server of forty lines", rows.ratio(ours_, eight, "a server of forty lines", eight), "above 1"],
            ["batch 64, beside raw in process", rows.ratio(ours_, "batch 64, /s", RAW, "batch 64, /s"), "0.95 at least"],
            ["stream, beside raw in process, batch 64", rows.ratio(ours_, stream, RAW, "batch 64, /s"), "0.95 at least"],
            ["2 workers, beside 1, 64 clients", rows.ratio(two, sixty_four, ours_, sixty_four), "1.7 where cores allow"],
        ],
    )
    from tagstore.store import Store

    about = Store(root, STORE).snapshot().info().index
    fifth = float(np.median([r.neighbours[-1].similarity for r in in_process(root)(vectors[:200])]))
    load = os.getloadavg()[0]
    text = [
        f"{n:,} entries of {dimension} dimensions, index {about.get('kind')}, recall@{K} {recall:.3f} against exact search; the fifth "
        f"neighbour at cosine {fifth:.2f} (median). Medians of {arguments.rounds} rounds, lowest and highest in parentheses; load and "
        f"server share the {os.cpu_count()} cores. Load average at the end {load:.1f}. Answers of all ways to ask were compared: equal.",
        rows.table(names, COLUMNS),
        ratios,
    ]
    text.append(by_image(arguments.images, seconds) if arguments.images else "By image bytes: left out; pass --images FOLDER.")
    text.append(compare_others(arguments.others, root, vectors, n, seconds))
    write("retrieval", "Retrieval: the service beside its parts", *text, packages=("grpcio", "faiss-cpu", "lmdb", "numpy", "protobuf"))


def _answer(address: str, message: bytes) -> bytes:
    with grpc.insecure_channel(address, LOCAL) as channel:
        data: bytes = channel.unary_unary(RETRIEVE)(message)
    return data


def build_index(root: Path, kind: str, recall: float) -> None:
    command = [sys.executable, "-m", "tagstore.cli", "build-index", f"file://{root}/{STORE}", "--recall", str(recall)]
    subprocess.run(command if kind == "auto" else [*command, "--kind", kind], check=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
