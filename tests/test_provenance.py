"""Where a tag came from reaches the user: words, caption, miner and score, over every source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from pictures import ToyEncoder, picture
from tagstore.client import connect
from tagstore.errors import BadAnswer, InvalidInput
from tagstore.ingestion import ingest_pairs
from tagstore.mining.compose import Composed
from tagstore.mining.loading import load_miner
from tagstore.mining.pictures import ImageMiner
from tagstore.types import MAX_MENTIONS, Pair, Provenance, Retrieval
from tagstore.wire import convert
from tagstore_proto.v1 import tagstore_pb2 as pb
from test_mining_pictures import ShapeTagger

CAPTIONS = ("A bus, not a train", "Two red squares on a table", "a red square")


@pytest.fixture(scope="module")
def encoder() -> ToyEncoder:
    return ToyEncoder()


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, encoder: ToyEncoder) -> Retrieval:
    """The answer of a store that three miners made."""
    from tagstore.retrieval.engine import Engine
    from tagstore.storage.store import Store
    from tagstore.types import Search

    root = tmp_path_factory.mktemp("root")
    miner = Composed(
        [load_miner("rules"), load_miner("metadata", columns="brand"), ImageMiner(tagger=ShapeTagger())]
    )
    pairs = [
        Pair("captioned", picture("red", "square"), CAPTIONS, {"brand": "Puma"}),
        Pair("bare", picture("red", "circle"), ()),
    ]
    ingest_pairs(pairs, root=root, store="s", encoder=encoder, miner=miner)
    engine = Engine(Store(root, "s").snapshot())
    from tagstore.encoding.images import decode

    vectors = encoder.encode_images([decode(picture("red", "square"))])
    [plain] = engine.retrieve(vectors)
    [answer] = engine.retrieve(vectors, Search(with_provenance=True))
    assert (plain.miner, plain.tags[0].mentions, plain.neighbours[0].captions) == ("", (), ())
    assert plain == replace(
        answer,
        miner="",
        tags=tuple(replace(tag, mentions=()) for tag in answer.tags),
        neighbours=tuple(replace(neighbour, captions=()) for neighbour in answer.neighbours),
    )
    return answer


def test_one_call_traces_a_tag_to_its_words(traced: Retrieval):
    assert traced.why("red squares") == (
        Provenance(
            "captioned", "caption", CAPTIONS[1], "red squares", "rules", pytest.approx(0.95, abs=0.01)
        ),
        Provenance("captioned", "caption", CAPTIONS[2], "red square", "rules", pytest.approx(0.95, abs=0.01)),
    )
    [brand] = traced.why("Puma")
    assert (brand.source, brand.caption, brand.words, brand.miner) == ("metadata", "", "", "metadata")
    seen = traced.why("red things")
    assert [(place.source, place.miner) for place in seen] == [("picture", "image")] * 2
    assert {place.key for place in seen} == {"captioned", "bare"}
    assert seen[0].score == pytest.approx(0.9, abs=0.01)
    with pytest.raises(KeyError, match="no tag 'train'"):
        traced.why("train")


def test_the_wire_keeps_it_and_believes_no_mention_beside_its_caption(traced: Retrieval):
    message = convert.retrieval_to_proto(traced)
    response = pb.RetrieveResponse(store=traced.store, version=traced.version, fingerprint=traced.fingerprint)
    response.retrievals.append(message)
    assert convert.retrievals_from_proto(response) == [traced]
    [tag, *_] = [tag for tag in response.retrievals[0].tags if tag.mentions[0].caption >= 0]
    for field, value in (("end", 9999), ("caption", 7), ("neighbour", 9), ("caption", -2), ("score", 1.5)):
        broken = pb.RetrieveResponse.FromString(response.SerializeToString())
        [wrong, *_] = [t for t in broken.retrievals[0].tags if t.tag_id == tag.tag_id]
        setattr(wrong.mentions[0], field, value)
        with pytest.raises(BadAnswer):
            convert.retrievals_from_proto(broken)


def test_every_source_says_the_same_and_only_on_request(
    shapes_root: Path, server_address: str, tmp_path: Path
):
    from tagstore.client.recording import record

    image = picture("red", "circle")
    answers = []
    for url in (f"file://{shapes_root}/shapes", f"grpc://{server_address}/shapes"):
        with connect(url, with_provenance=True) as source:
            answers += source.retrieve([image], keys=["red-circle"])
            assert source.retrieve([image], with_provenance=False)[0].miner == ""
            assert source.retrieve([image], with_neighbours=False)[0].tags[0].mentions == ()
    with connect(f"grpc://{server_address}/shapes", with_provenance=True) as source:
        record(source, [Pair("red-circle", image, ())], tmp_path / "map")
    with connect(f"replay://{tmp_path}/map", with_provenance=True) as source:
        answers += source.retrieve([image], keys=["red-circle"])
    with (
        connect(f"replay://{tmp_path}/map", with_provenance=False) as source,
        pytest.raises(InvalidInput, match="recorded with with_provenance=True"),
    ):
        source.retrieve([image], keys=["red-circle"])
    assert answers[0] == answers[1] == answers[2]
    places = answers[0].why("red circle")
    assert places[0] == Provenance(
        "red-circle",
        "caption",
        "A red circle on a white table in Paris.",
        "red circle",
        "rules",
        places[0].score,
    )
    assert all(1 <= len(tag.mentions) <= MAX_MENTIONS for tag in answers[0].tags)


def test_query_prints_why(shapes_root: Path, tmp_path: Path):
    from tagstore.cli import cli

    file = tmp_path / "query.png"
    file.write_bytes(picture("red", "circle"))
    url = f"file://{shapes_root}/shapes"
    shown = CliRunner().invoke(cli, ["query", url, str(file), "--k", "1", "--why"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "red circle (A red circle on a white table in Paris.)" in shown.output
    values = CliRunner().invoke(cli, ["query", url, str(file), "--k", "1", "--why", "--json"])
    assert '"words": "red circle"' in values.output
    plain = CliRunner().invoke(cli, ["query", url, str(file), "--k", "1", "--json"])
    assert '"why"' not in plain.output
