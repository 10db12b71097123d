"""Malformed messages against a server: none may be a fault of its own, none may stop it.

    python -m benchmarks.serving.malformed_messages [--minutes 5] [--quick]

Valid requests of every method are damaged at random (bits, pieces, lengths, fields of other messages) and sent as raw bytes, unary and on
streams. An answer is an answer, or a status that names the caller's mistake. Anything else, a log line of a fault, or a call that is still
in hand at the end fails the run.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import grpc
import numpy as np

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
REFUSED = (
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "FAILED_PRECONDITION",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "ABORTED",
)


def seeds(store: str, fingerprint: str, dimension: int) -> list[bytes]:
    """Requests that mean something."""
    vectors = convert.vectors_to_proto(
        np.random.default_rng(0).standard_normal((2, dimension)).astype(np.float16)
    )
    exclude = pb.Exclude(key=True, sha256=True, perceptual_hash=4, keys=["a"], entry_ids=[1])
    identities = [pb.Identity(key="a", sha256=bytes(32), perceptual_hash=1)] * 2
    messages = [
        pb.RetrieveRequest(
            store=store, vectors=vectors, fingerprint=fingerprint, k=3, exclude=exclude, identities=identities
        ),
        pb.RetrieveRequest(
            store=store,
            vectors=vectors,
            fingerprint=fingerprint,
            where={"a": "b"},
            min_similarity=0.5,
            order=2,
            exact=True,
        ),
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
    value = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(value) + 1)
        match rng.randrange(6):
            case 0 if value:
                value[at % len(value)] ^= 1 << rng.randrange(8)
            case 1:
                value[at:at] = rng.randbytes(rng.randint(1, 9))
            case 2:
                del value[at : at + rng.randint(1, 20)]
            case 3:
                value = value[:at]
            case 4:
                value += rng.choice(others)
            case _:
                value[at:at] = b"\xff" * rng.randint(1, 10)
    return bytes(value)


def fuzz(
    address: str,
    store: str,
    fingerprint: str,
    dimension: int,
    *,
    messages: int = 0,
    seconds: float = 0.0,
    seed: int = 0,
) -> Counter[str]:
    """Send so many damaged messages, or for so long; what they were answered with, by status."""
    rng = random.Random(seed)
    valid = seeds(store, fingerprint, dimension)
    found: Counter[str] = Counter()
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
                    name = rng.choice(STREAMS)
                    for _ in streams[name](iter(batch), timeout=30):
                        found["OK"] += 1
                    continue
                for data in batch:
                    calls[rng.choice(list(METHODS))](data, timeout=30)
                    found["OK"] += 1
            except grpc.RpcError as error:
                name = error.code().name
                if name == "INTERNAL":
                    raise AssertionError(f"a fault of the server: {error.details()}") from error
                found[name] += 1
    return found


class _Faults(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("tagstore"):
            self.records.append(self.format(record))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--quick", action="store_true", help="ten seconds")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from benchmarks.report import table, write
    from benchmarks.synthetic import build, fingerprint
    from tagstore.serving.server import Server
    from tagstore.serving.settings import Settings

    faults = _Faults()
    logging.getLogger().addHandler(faults)
    with tempfile.TemporaryDirectory() as scratch:
        build(Path(scratch), 500, 64)
        server = Server(scratch, "127.0.0.1:0", device="cpu", settings=Settings(anonymous="admin"))
        server.start()
        seconds = 10.0 if arguments.quick else arguments.minutes * 60
        found = fuzz(
            server.address, "bench", fingerprint(64).digest, 64, seconds=seconds, seed=arguments.seed
        )
        start = time.monotonic()
        server.stop(5)
        if time.monotonic() - start > 5:
            faults.records.append("calls were in hand after their end")
    strange = [name for name in found if name not in (*REFUSED, "OK")]
    rows = [[name, n] for name, n in found.most_common()]
    how = f"unary and on streams, seed {arguments.seed}"
    about = f"{found.total():,} calls in {seconds:.0f} s, {how}; {len(faults.records)} faults of the server."
    write(
        "fuzz",
        "Malformed messages",
        about,
        table(["answered with", "calls"], rows),
        packages=("grpcio", "protobuf"),
        keep=not arguments.quick,
    )
    if strange or faults.records:
        sys.exit(f"unexpected: {strange} {faults.records[:3]}")


if __name__ == "__main__":
    main()
