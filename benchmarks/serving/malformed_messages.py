"""Malformed messages against a server: none may cause a fault or stop the server.

    python -m benchmarks.serving.malformed_messages [--minutes 5] [--quick]

Valid requests of every method are damaged at random (bits, pieces, lengths, fields of other messages) and
sent as raw bytes, unary and on streams. Each must get an answer or a status that names the caller's mistake.
The run fails on any other status, on a logged fault, and on a call that is still in flight at the end.
"""

from __future__ import annotations

import logging
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import grpc
import numpy as np

from benchmarks.report import arguments_parser, table, write
from benchmarks.synthetic import build, fingerprint
from tagstore.wire import convert
from tagstore_proto.v1 import tagstore_pb2 as pb

METHODS = {
    "TagStore/Retrieve": pb.RetrieveRequest,
    "TagStore/GetTags": pb.GetTagsRequest,
    "TagStore/GetStore": pb.GetStoreRequest,
    "TagStore/ListStores": pb.ListStoresRequest,
    "Admin/Delete": pb.DeleteRequest,
    "Admin/Rollback": pb.RollbackRequest,
    "Admin/ListVersions": pb.ListVersionsRequest,
    "Admin/Diff": pb.DiffRequest,
}
STREAMS = ("TagStore/RetrieveStream", "Admin/Ingest")
REFUSED = {
    "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED",
    "ABORTED",
}  # fmt: skip


def valid_messages(store: str, digest: str, dimension: int) -> list[bytes]:
    rows = np.random.default_rng(0).standard_normal((2, dimension)).astype(np.float16)
    query = {"store": store, "vectors": convert.vectors_to_proto(rows), "fingerprint": digest}
    exclude = pb.Exclude(key=True, sha256=True, perceptual_hash=4, keys=["a"], entry_ids=[1])
    identities = [pb.Identity(key="a", sha256=bytes(32), perceptual_hash=1)] * 2
    messages = [
        pb.RetrieveRequest(**query, k=3, exclude=exclude, identities=identities),
        pb.RetrieveRequest(**query, where={"a": "b"}, min_similarity=0.5, order=2, exact=True),
        pb.RetrieveRequest(store=store, images=[b"\x89PNG\r\n\x1a\n" + bytes(50)], version=1),
        pb.GetTagsRequest(store=store, tag_ids=[1, 2, 3], embeddings=True),
        pb.GetTagsRequest(store=store, first_tag_id=5, page_size=10),
        pb.GetStoreRequest(store=store, version=1),
        pb.DiffRequest(store=store, before=1, after=1),
        pb.DeleteRequest(
            store=store, keys=["nobody"], near=[pb.Near(perceptual_hash=1, distance=0)], where={"x": "y"}
        ),
        pb.IngestRequest(start=pb.IngestStart(store=store)),
        pb.IngestRequest(pair=pb.Pair(key="k", image=b"\xff\xd8\xff", captions=["c"], metadata="{}")),
    ]
    return [message.SerializeToString() for message in messages]


def damage(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Change bits, insert, delete, cut off or append bytes, one to four times."""
    value = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        offset = rng.randrange(len(value) + 1)
        match rng.randrange(6):
            case 0 if value:
                value[offset % len(value)] ^= 1 << rng.randrange(8)
            case 1:
                value[offset:offset] = rng.randbytes(rng.randint(1, 9))
            case 2:
                del value[offset : offset + rng.randint(1, 20)]
            case 3:
                value = value[:offset]
            case 4:
                value += rng.choice(others)
            case _:
                value[offset:offset] = b"\xff" * rng.randint(1, 10)
    return bytes(value)


def fuzz(
    address: str,
    store: str,
    digest: str,
    dimension: int,
    *,
    messages: int = 0,
    seconds: float = 0.0,
    seed: int = 0,
    token: str = "",
) -> Counter[str]:
    """Send `messages` damaged messages, or for `seconds`; returns the number of calls by status."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    rng = random.Random(seed)
    valid = valid_messages(store, digest, dimension)
    outcomes: Counter[str] = Counter()
    end = time.monotonic() + seconds if seconds else float("inf")
    sent = 0
    with grpc.insecure_channel(address) as channel:
        calls = {name: channel.unary_unary(f"/tagstore.v1.{name}") for name in METHODS}
        streams = {name: channel.stream_stream(f"/tagstore.v1.{name}") for name in STREAMS}
        while sent < (messages or float("inf")) and time.monotonic() < end:
            batch = [damage(rng.choice(valid), rng, valid) for _ in range(rng.randint(1, 4))]
            sent += len(batch)
            try:
                if rng.random() < 0.2:
                    for _ in streams[rng.choice(STREAMS)](iter(batch), timeout=30, metadata=metadata):
                        outcomes["OK"] += 1
                    continue
                for data in batch:
                    calls[rng.choice(list(METHODS))](data, timeout=30, metadata=metadata)
                    outcomes["OK"] += 1
            except grpc.RpcError as error:
                code = error.code().name
                if code == "INTERNAL":
                    raise AssertionError(f"a fault of the server: {error.details()}") from error
                outcomes[code] += 1
    return outcomes


class _Faults(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("tagstore"):
            self.records.append(self.format(record))


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--quick", action="store_true", help="ten seconds; not kept")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from tagstore.serving.server import Server
    from tagstore.serving.settings import Settings

    faults = _Faults()
    logging.getLogger().addHandler(faults)
    seconds, seed, digest = arguments.minutes * 60, arguments.seed, fingerprint(64).digest
    if arguments.quick:
        seconds = 10.0
    with tempfile.TemporaryDirectory() as scratch:
        build(Path(scratch), 500, 64)
        server = Server(scratch, "127.0.0.1:0", device="cpu", settings=Settings(anonymous="admin"))
        server.start()
        outcomes = fuzz(server.address, "bench", digest, 64, seconds=seconds, seed=seed)
        start = time.monotonic()
        server.stop(5)
        if time.monotonic() - start > 5:
            faults.records.append("calls were still in flight at the end")
    about = (
        f"{outcomes.total():,} calls in {seconds:.0f} s, unary and on streams, seed {seed}; "
        f"{len(faults.records)} faults of the server."
    )
    rows = table(["answered with", "calls"], outcomes.most_common())
    packages = ("grpcio", "protobuf")
    write("fuzz", "Malformed messages", about, rows, packages=packages, keep=not arguments.quick)
    unexpected = set(outcomes) - REFUSED - {"OK"}
    if unexpected or faults.records:
        sys.exit(f"unexpected: {sorted(unexpected)} {faults.records[:3]}")


if __name__ == "__main__":
    main()
