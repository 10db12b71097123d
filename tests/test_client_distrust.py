"""Servers and files that lie: the client believes no answer that does not fit its question."""

from __future__ import annotations

import gc
import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import lmdb
import numpy as np
import pytest

from pictures import picture
from scripted import Scripted
from tagstore import errors
from tagstore.client import aio, channels, connect
from tagstore.client.admin import administer
from tagstore.client.answer_cache import _SEAL_BYTES, _seal
from tagstore.client.mapfile import meta_seal, seal
from tagstore.client.recording import record
from tagstore.types import Pair
from tagstore_proto.v1 import tagstore_pb2 as pb
from waiting import wait_until

NAN, INFINITE = float("nan"), float("inf")
Tamper = Callable[..., object]


@pytest.fixture
def server() -> Iterator[Scripted]:
    server = Scripted()
    yield server
    server.stop()


def set_tag(**fields: object) -> Tamper:
    """Change the tag of each answer, which the server shares among all queries of a request."""

    def tamper(response: pb.RetrieveResponse) -> None:
        for answer in response.retrievals:
            for name, value in fields.items():
                setattr(answer.tags[0], name, value)

    return tamper


def set_fields(**fields: object) -> Tamper:
    def tamper(response: object) -> None:
        for name, value in fields.items():
            setattr(response, name, value)

    return tamper


def add_neighbours(*similarities: float) -> Tamper:
    def tamper(response: pb.RetrieveResponse) -> None:
        for similarity in similarities:
            response.retrievals[0].neighbours.add(entry_id=1, key="a", similarity=similarity)

    return tamper


LIES: dict[str, tuple[Tamper, str]] = {
    "another store": (set_fields(store="other"), "m@7 was asked for, and 'other@7' answered"),
    "another version": (set_fields(version=3), "m@7 was asked for, and 'm@3' answered"),
    "no version": (set_fields(version=0), "'m@0' answered"),
    "an answer too few": (lambda r: r.retrievals.pop(), "2 answers to 3 queries"),
    "an answer too many": (lambda r: r.retrievals.add(), "4 answers to 3 queries"),
    "no answer at all": (lambda r: r.ClearField("retrievals"), "0 answers to 3 queries"),
    "more neighbours than k": (add_neighbours(*[0.5] * 6), "6 neighbours"),
    "more tags than the limit": (lambda r: r.retrievals[1].tags.add(), "2 tags, more than"),
    "a neighbour that is not there": (
        lambda r: r.retrievals[0].tags[0].neighbours.append(999),
        "a neighbour",
    ),
    "a similarity that is NaN": (set_tag(similarity=NAN), "no finite number"),
    "a relevance that is NaN": (set_tag(relevance=NAN), "no finite number"),
    "an infinite similarity": (set_tag(similarity=-INFINITE), "no finite number"),
    "a neighbour at NaN": (add_neighbours(0.5, NAN), "no finite number"),
}


@pytest.mark.parametrize("lie", LIES)
async def test_an_answer_that_does_not_fit_its_question_is_as_good_as_none(server: Scripted, lie: str):
    server.tamper, reason = LIES[lie]
    url, images = f"grpc://{server.address}/m@7?max_tags=1&retries=0", [b"1", b"2", b"3"]
    with connect(url) as source, pytest.raises(errors.BadAnswer, match=reason) as raised:
        source.retrieve(images)
    assert server.address in str(raised.value)
    async with aio.connect(url) as awaited:
        with pytest.raises(errors.BadAnswer, match=reason):
            await awaited.retrieve(images)
    with connect(url, on_failure="empty") as source:
        answers = source.retrieve(images)
        assert [answer.degraded for answer in answers] == [True] * 3
        assert (source.stats().degraded, source.stats().failures) == (3, 1)
        assert reason.split(" ")[0] in source.stats().last_error
    async with aio.connect(url, on_failure="empty") as awaited:
        assert all(answer.degraded for answer in await awaited.retrieve(images))


def test_vectors_are_not_answered_by_another_encoders_store(server: Scripted):
    server.tamper = set_fields(fingerprint="another")
    with (
        connect(f"grpc://{server.address}/m?retries=0") as source,
        pytest.raises(errors.BadAnswer, match="encoder mine was asked for, and 'another' answered"),
    ):
        source.retrieve(vectors=np.ones((1, 2), np.float32), fingerprint="mine")


async def test_a_liar_is_left_for_a_server_that_fits(server: Scripted):
    liar = Scripted("liar")
    liar.tamper = set_tag(relevance=NAN)
    try:
        url = f"grpc://{liar.address},{server.address}/m?breaker=1&cooldown=600"
        with connect(url) as source:
            assert {source.retrieve([b"1"])[0][0].tag for _ in range(4)} == {"one"}
            assert source.stats().addresses == {liar.address: "open", server.address: "closed"}
        async with aio.connect(url, hedge=0.5) as awaited:
            assert {(await awaited.retrieve([b"1"]))[0][0].tag for _ in range(4)} == {"one"}
    finally:
        liar.stop()


async def test_a_kind_of_a_later_server_is_custom(server: Scripted):
    server.tamper = set_tag(kind=77)
    with connect(f"grpc://{server.address}/m") as source:
        assert source.retrieve([b"1"])[0][0].kind == "custom"
        server.tamper = lambda response: setattr(response.tags[0], "kind", 77)
        assert source.tags([5])[0].kind == "custom"


TAG_LIES: dict[str, tuple[Tamper, str]] = {
    "another tag": (lambda r: setattr(r.tags[0], "tag_id", 9), "not those that were asked for"),
    "a tag too few": (lambda r: r.tags.pop(), "not those that were asked for"),
    "another version": (set_fields(version=3), "'m@3' answered"),
    "an embedding too few": (lambda r: setattr(r.embeddings, "data", b"\0\0"), "1 embeddings of 2 tags"),
    "half an embedding": (lambda r: setattr(r.embeddings, "data", b"\0"), "no whole number"),
    "an embedding of NaN": (lambda r: setattr(r.embeddings, "data", b"\x00\x7e" * 2), "not finite"),
    "numbers of the future": (lambda r: setattr(r.embeddings, "dtype", 99), "dtype 99"),
}


@pytest.mark.parametrize("lie", TAG_LIES)
async def test_tags_that_do_not_fit_are_refused(server: Scripted, lie: str):
    server.tamper, reason = TAG_LIES[lie]
    url = f"grpc://{server.address}/m@7?retries=0"
    with connect(url) as source, pytest.raises(errors.BadAnswer, match=reason):
        source.tags([1, 2], embeddings=True)
    async with aio.connect(url) as awaited:
        with pytest.raises(errors.BadAnswer, match=reason):
            await awaited.tags([1, 2], embeddings=True)
    with connect(url, preload=True, on_failure="empty") as source:
        server.tamper = lambda r: TAG_LIES[lie][0](r) if hasattr(r, "embeddings") else None
        if lie not in ("an embedding too few", "a tag too few"):  # an answer has one tag only
            assert source.retrieve([b"1"])[0].degraded


def test_a_vocabulary_that_leads_nowhere_ends(server: Scripted):
    server.tamper = set_fields(next_tag_id=1)
    with connect(f"grpc://{server.address}/m?retries=0") as source:
        with pytest.raises(errors.BadAnswer, match="not in order"):
            list(source.vocabulary())
        server.tamper = lambda r: [r.tags.add(tag_id=i) for i in (3, 3)]
        with pytest.raises(errors.BadAnswer, match="not in order"):
            list(source.vocabulary())


@pytest.fixture
def no_collection() -> Iterator[None]:
    """No finaliser of other tests' objects runs where a deep JSON has used up the stack, and fails there."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]"])
def test_descriptions_that_are_no_json_are_refused(server: Scripted, text: str, no_collection: None):
    with connect(f"grpc://{server.address}/m?retries=0") as source:
        server.tamper = lambda r: setattr(r.store, "index", text)
        with pytest.raises(errors.BadAnswer, match="index of a store is no JSON"):
            source.info()
        server.tamper = lambda r: setattr(r.store.fingerprint, "preprocess", text)
        with pytest.raises(errors.BadAnswer, match="preprocessing of a fingerprint is no JSON"):
            source.pin()


class Noise(grpc.GenericRpcHandler):
    """Answers every call with the same bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def service(self, _: object) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(lambda request, context: self.data)


@contextmanager
def noise(data: bytes) -> Iterator[str]:
    """Serve noise. Gives the address."""
    server = grpc.server(ThreadPoolExecutor(1), handlers=[Noise(data)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0)


@pytest.mark.parametrize("data", [b"\xff" * 40, b"\x00" * 2000], ids=["no message", "too large"])
async def test_bytes_that_are_no_message_are_a_bad_answer(data: bytes, monkeypatch):
    monkeypatch.setattr(channels, "MAX_MESSAGE_BYTES", 1000)
    with noise(data) as address:
        url = f"grpc://{address}/m?retries=0"
        with connect(url) as source, pytest.raises(errors.BadAnswer, match="does not fit the question"):
            source.retrieve([b"1"])
        async with aio.connect(url) as awaited:
            with pytest.raises(errors.BadAnswer, match="does not fit the question"):
                await awaited.retrieve([b"1"])
            assert (await awaited.retrieve([b"1"], on_failure="empty"))[0].degraded


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (pb.LoadResponse(store=pb.StoreInfo(store="x", version=1)).SerializeToString(), "m was asked for"),
        (pb.LoadResponse(store=pb.StoreInfo(store="m", version=1)).SerializeToString(), "is no JSON"),
        (b"\xff" * 40, "deserializing"),
    ],
)
def test_an_administrator_believes_no_server_either(data: bytes, reason: str):
    with (
        noise(data) as address,
        administer(f"grpc://{address}/m") as admin,
        pytest.raises(errors.BadAnswer, match=reason),
    ):
        admin.load()


def test_a_cache_that_somebody_else_wrote_is_a_miss_and_not_a_crash(server: Scripted, tmp_path: Path):
    url = f"grpc://{server.address}/m@7"
    with connect(url, cache=str(tmp_path)) as source:
        [fresh] = source.retrieve([b"1"])
    with lmdb.open(str(tmp_path), map_size=1 << 22) as env, env.begin(write=True) as txn:
        [(key, value)] = list(txn.cursor())
        response = pb.RetrieveResponse.FromString(value[_SEAL_BYTES:])
    lies = [b"\xff", b""]
    for tamper in (LIES["a neighbour that is not there"][0], set_tag(similarity=NAN), set_fields(version=9)):
        lie = pb.RetrieveResponse()
        lie.CopyFrom(response)
        tamper(lie)
        lies.append(lie.SerializeToString())
    for message in lies:
        with lmdb.open(str(tmp_path), map_size=1 << 22) as env, env.begin(write=True) as txn:
            txn.put(key, _seal(key, message) + message)
        with connect(url, cache=str(tmp_path)) as source:
            assert source.retrieve([b"1"]) == [fresh]
            assert source.stats().cache_hits == 0


def test_a_map_that_lies_under_good_checksums_is_damaged(server_address: str, tmp_path: Path):
    path, image = tmp_path / "map", picture("red", "circle")
    with connect(f"grpc://{server_address}/shapes") as source:
        record(source, [Pair("a", image, ())], path)
    [good] = connect(f"replay://{path}").retrieve([image])

    def sealed(table: str, change: str, value: object) -> None:
        with sqlite3.connect(path) as db:
            db.execute(f"UPDATE {table} SET {change} = ?", [value])
            first = "position" if table == "samples" else "tag_id"
            for *fields, _ in list(db.execute(f"SELECT * FROM {table}")):
                db.execute(f"UPDATE {table} SET seal = ? WHERE {first} = ?", [seal(*fields), fields[0]])

    lie = pb.Retrieval(tags=[pb.RetrievedTag(tag_id=1, kind=77, neighbours=[3])])
    for answer in (lie.SerializeToString(), b"\xff"):
        sealed("samples", "answer", answer)
        with connect(f"replay://{path}") as source:
            with pytest.raises(errors.Damaged, match="answer to sample 'a' cannot be read"):
                source.retrieve([image])
            assert source.retrieve([image], on_failure="empty")[0].degraded
    for embedding in (b"\0", b"\x00\x7e"):
        sealed("tags", "embedding", embedding)
        with connect(f"replay://{path}") as source, pytest.raises(errors.Damaged, match="embedding of tag"):
            source.tags([good[0].tag_id], embeddings=True)
    sealed("tags", "kind", "hologram")
    with connect(f"replay://{path}") as source:
        assert source.tags([good[0].tag_id])[0].kind == "custom"
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value = ? WHERE name = 'info'", [json.dumps({"store": "x"})])
        meta = dict(db.execute("SELECT name, value FROM meta"))
        db.execute("UPDATE meta SET value = ? WHERE name = 'seal'", [meta_seal(meta)])
    with pytest.raises(errors.Damaged, match="its meta cannot be read"):
        connect(f"replay://{path}")


def sockets() -> int:
    links = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    return sum(os.path.exists(link) and os.readlink(link).startswith("socket:") for link in links)


async def test_a_source_that_is_dropped_gives_its_socket_back(server: Scripted):
    gc.collect()
    before = sockets()
    for options in ({}, {"hedge": 5.0}):
        source = connect(f"grpc://{server.address}/m", **options)
        source.retrieve([b"1"])
        assert sockets() > before
        del source
        wait_until(lambda: sockets() <= before)
    awaited = aio.connect(f"grpc://{server.address}/m")
    await awaited.retrieve([b"1"])
    del awaited
    gc.collect()
    wait_until(lambda: sockets() <= before)
