"""Queries by text: as a query by vector of the encoder's own embedding, from every face, and nothing else."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import grpc
import numpy as np
import pytest
from click.testing import CliRunner

from pictures import COLOURS, picture
from tagstore import errors
from tagstore.cli import cli
from tagstore.client import aio, connect
from tagstore.client.recording import record
from tagstore.types import Exclude, Identity, Pair
from tagstore.wire import convert
from tagstore_proto.v1 import tagstore_pb2 as pb
from tagstore_proto.v1 import tagstore_pb2_grpc as pb_grpc

CAPTIONS = ["a red circle", "an orange circle on white", "two dogs, far away", "Ein Kreis 😀"]


@pytest.fixture
def urls(server_address: str, shapes_root: Path) -> tuple[str, str]:
    return f"grpc://{server_address}/shapes", f"file://{shapes_root}/shapes"


@pytest.fixture
def stub(server_address: str):
    with grpc.insecure_channel(server_address) as channel:
        yield pb_grpc.TagStoreStub(channel)


def embedded(mini, captions: list[str]) -> np.ndarray:
    return np.concatenate([mini.encode_texts([caption]) for caption in captions])


def test_a_caption_is_answered_as_its_embedding(urls: tuple[str, str], mini):
    vectors = embedded(mini, CAPTIONS)
    for url in urls:
        with connect(url) as source:
            for options in (
                {},
                {"k": 18, "max_tags": 3, "order": "relevance"},
                {"with_neighbours": False, "with_texts": False},
            ):
                by_vector = source.retrieve(vectors=vectors, fingerprint=mini.fingerprint, **options)
                assert source.retrieve(captions=CAPTIONS, **options) == by_vector
                alone = [source.retrieve(captions=[caption], **options)[0] for caption in CAPTIONS]
                assert alone == by_vector


def test_a_caption_finds_the_picture_that_it_describes(urls: tuple[str, str]):
    for url in urls:
        with connect(url) as source:
            red, orange = source.retrieve(captions=["a red circle", "an orange circle"])
            assert red.neighbours[0].key == "red-circle"
            assert orange.neighbours[0].key == "orange-circle"
            assert "red circle" in {tag.tag for tag in red}


def test_images_come_first_then_vectors_then_captions(urls: tuple[str, str], mini):
    images, vectors = [picture("blue", "circle", shift=2)], embedded(mini, CAPTIONS[:2])
    answers = []
    for url in urls:
        with connect(url) as source:
            alone = [
                *source.retrieve(images),
                *source.retrieve(vectors=vectors, fingerprint=mini.fingerprint),
                *source.retrieve(captions=CAPTIONS),
            ]
            by_vector = {"vectors": vectors, "fingerprint": mini.fingerprint}
            together = source.retrieve(images, captions=CAPTIONS, **by_vector)
            assert together == alone
            many = source.retrieve(captions=CAPTIONS * 20, k=2)  # more than fit one request
            assert many == source.retrieve(captions=CAPTIONS, k=2) * 20
            answers.append((together, many))
    assert answers[0] == answers[1]


def test_one_message_and_a_stream_take_all_kinds(stub, mini):
    vectors = convert.vectors_to_proto(embedded(mini, CAPTIONS[:1]))
    by_vector = {"store": "shapes", "vectors": vectors, "fingerprint": mini.fingerprint.digest}
    mixed = pb.RetrieveRequest(**by_vector, images=[picture("red", "circle")], texts=CAPTIONS)
    retrievals = stub.Retrieve(mixed).retrievals
    assert len(retrievals) == 6
    assert retrievals[1] == retrievals[2]
    by_text = [pb.RetrieveRequest(store="shapes", texts=[caption], k=3) for caption in CAPTIONS]
    bad = pb.RetrieveRequest(store="shapes", texts=["fine", ""])
    requests = [*by_text, bad, pb.RetrieveRequest(**by_vector, k=3), mixed]
    *answers, refused, last, both = stub.RetrieveStream(iter(requests))
    assert [answer.response for answer in answers] == [stub.Retrieve(request) for request in by_text]
    assert "text 1 of the request is empty" in refused.error.message
    assert last.response == answers[0].response
    assert list(both.response.retrievals) == list(retrievals)


def test_texts_that_mean_nothing_are_refused_by_their_place(urls: tuple[str, str]):
    for url in urls:
        with connect(url) as source:
            for bad, message in (
                ("", "text 1 of the request is empty"),
                (" \n", "text 1 of the request is empty"),
                ("a" * 4097, "text 1 of the request has 4097 characters: at most 4096"),
                ("\ud800", "caption 1 is no Unicode text"),
                (b"bytes", "caption 1 is of type bytes"),
            ):
                with pytest.raises(errors.InvalidInput, match=message):
                    source.retrieve(captions=["fine", bad])
            assert len(source.retrieve(captions=["a" * 4096])) == 1
            with pytest.raises(errors.InvalidInput, match=r"captions is a list: pass \['red'\]"):
                source.retrieve(captions="red")
            with pytest.raises(errors.InvalidInput, match=r"queries by text are captions="):
                source.retrieve(texts=["red"])
            assert source.retrieve(captions=[]) == []


def test_a_server_takes_only_so_many_texts(stub):
    with pytest.raises(grpc.RpcError) as caught:
        stub.Retrieve(pb.RetrieveRequest(store="shapes", texts=["red"] * 257))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "257 texts in one request: send at most 256" in caught.value.details()


def test_the_guard_knows_a_caption_by_its_identity_only(urls: tuple[str, str]):
    guard = Exclude(key=True)
    for url in urls:
        with connect(url) as source:
            with pytest.raises(errors.InvalidInput, match="which image a vector or caption is of"):
                source.retrieve(captions=["a red circle"], exclude="self")
            [kept] = source.retrieve(captions=["a red circle"], keys=["red-circle"], exclude="self")
            assert "red-circle" not in {neighbour.key for neighbour in kept.neighbours}
            assert kept.excluded == 1
            # identities are in the order of the queries
            of_image, of_caption = source.retrieve(
                [picture("blue", "square")],
                captions=["a red circle"],
                identities=[Identity("blue-square"), Identity("red-circle")],
                exclude=guard,
            )
            assert (of_image.excluded, of_caption) == (1, kept)
            with pytest.raises(errors.InvalidInput):
                source.retrieve(captions=["a red circle"], exclude=Exclude(sha256=True))


def test_awaited_as_well(urls: tuple[str, str]):
    async def ask(url: str) -> list:
        async with aio.connect(url) as source:
            return await source.retrieve(captions=CAPTIONS)

    with connect(urls[0]) as source:
        expected = source.retrieve(captions=CAPTIONS)
    assert [asyncio.run(ask(url)) for url in urls] == [expected, expected]


def test_the_cache_of_answers_keeps_captions_and_vectors_apart(urls: tuple[str, str], tmp_path: Path):
    with connect(f"{urls[0]}@1", cache=str(tmp_path / "cache")) as source:
        fresh = source.retrieve(captions=CAPTIONS)
        assert source.retrieve(captions=CAPTIONS[::-1]) == fresh[::-1]
        assert (source.stats().cache_hits, source.stats().cache_misses) == (len(CAPTIONS), len(CAPTIONS))
        image = picture("red", "circle")
        with pytest.raises(errors.InvalidInput):  # no image, whatever its bytes say as a text
            source.retrieve([CAPTIONS[0].encode()])
        assert source.retrieve([image]) != fresh[:1]


def test_controls_answer_captions_and_maps_refuse_them(urls: tuple[str, str], tmp_path: Path):
    with connect("null://") as nothing:
        assert [len(answer) for answer in nothing.retrieve(captions=CAPTIONS)] == [0] * len(CAPTIONS)
    with connect(f"random+{urls[0]}", seed=1) as first, connect(f"random+{urls[1]}", seed=1) as second:
        drawn, again = (
            [tuple(tag.tag for tag in answer) for answer in source.retrieve(captions=CAPTIONS)]
            for source in (first, second)
        )
        assert drawn == again
        assert len(set(drawn)) == len(CAPTIONS)
    with connect(urls[0]) as source:
        record(source, [Pair(colour, picture(colour, "circle"), ()) for colour in COLOURS], tmp_path / "map")
    with (
        connect(f"replay://{tmp_path}/map") as replayed,
        pytest.raises(errors.InvalidInput, match="none to captions: ask the store"),
    ):
        replayed.retrieve(captions=["red"], keys=["red"])


def test_the_command_line_takes_words(urls: tuple[str, str], tmp_path: Path):
    photo = tmp_path / "photo.png"
    photo.write_bytes(picture("blue", "circle"))
    outputs = []
    for url in urls:
        texts = ["--text", "a red circle", "--text", "an orange circle"]
        result = CliRunner().invoke(cli, ["query", url, str(photo), *texts, "--json"])
        assert result.exit_code == 0, result.stderr
        outputs.append([json.loads(line) for line in result.stdout.splitlines()])
    assert outputs[0] == outputs[1]
    image, red, orange = outputs[0]
    assert (image["image"], red["text"], orange["text"]) == (str(photo), "a red circle", "an orange circle")
    assert red["neighbours"][0]["key"] == "red-circle"
    table = CliRunner().invoke(cli, ["query", urls[0], "--text", "a red circle"]).stdout
    assert "a red circle  (shapes@1)" in table
    refused = CliRunner().invoke(cli, ["query", urls[0], "--text", " ", "--text", "red"])
    assert refused.exit_code == 1
    assert "text 0 of the request is empty" in refused.stderr
    assert "red  (shapes@1)" in refused.stdout
    nothing = CliRunner().invoke(cli, ["query", urls[0]])
    assert nothing.exit_code == 2
    assert "--text" in nothing.stderr
