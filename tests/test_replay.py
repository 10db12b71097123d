"""Recorded maps give the same answers as live, and no others; an unfinished or damaged one is refused."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pictures import COLOURS, picture
from tagstore import errors
from tagstore.cli import cli
from tagstore.client import connect
from tagstore.client.mapfile import Map
from tagstore.client.recording import record
from tagstore.types import Exclude, Pair, Rejected

QUERIES = {
    f"{colour}-{shape}": picture(colour, shape, shift=s)
    for s, colour in enumerate(COLOURS)
    for shape in ("circle", "square")
}
OPTIONS = [
    {},
    {"k": 3, "max_tags": 4, "order": "similarity"},
    {"k": 7, "min_similarity": 0.5, "order": "relevance", "exact": True},
    {"k": 2, "exclude": "self"},
    {"exclude": Exclude(key=True, keys=("red-square",), entry_ids=(3,)), "with_neighbours": False},
    {"exclude": "self", "exclude_distance": 12, "exclude_keys": ["blue-circle"], "with_texts": False},
    {"where": {"brand": "none"}},
    {"k": 3, "with_provenance": True},
]


def pairs() -> list[Pair]:
    return [Pair(key, data, ()) for key, data in QUERIES.items()]


def recorded(address: str, out: Path, **options) -> Path:
    with connect(f"grpc://{address}/shapes", **options) as source:
        record(source, pairs(), out, workers=2, batch=5)
    return out


@pytest.fixture(scope="module")
def the_map(server_address: str, tmp_path_factory) -> Path:
    return recorded(server_address, tmp_path_factory.mktemp("map") / "map", k=3)


@pytest.fixture(scope="module")
def local(shapes_root: Path):
    with connect(f"file://{shapes_root}/shapes") as source:
        yield source


@pytest.fixture
def live(server_address: str):
    with connect(f"grpc://{server_address}/shapes") as source:
        yield source


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_live_directory_and_map_agree_to_the_last_byte(
    local, live, server_address: str, tmp_path: Path, options
):
    path = recorded(server_address, tmp_path / "map", **options)
    keys, images = list(QUERIES), list(QUERIES.values())
    with connect(f"replay://{path}") as replayed:
        answers = [source.retrieve(images, keys=keys, **options) for source in (live, local, replayed)]
        assert answers[0] == answers[1] == answers[2]
        assert len({repr(a) for a in answers}) == 1
        assert {a.version for a in answers[2]} == {1}
        ids = sorted({t.tag_id for a in answers[2] for t in a})
        pairs_of_tags = (source.tags(ids, embeddings=True) for source in (replayed, live))
        for ours, theirs in zip(*pairs_of_tags, strict=True):
            np.testing.assert_array_equal(ours.embedding, theirs.embedding)
            assert (ours.text, ours.kind, ours.count) == (theirs.text, theirs.kind, theirs.count)
        assert replayed.info() == live.info()
        assert replayed.pin() == live.pin()


def test_a_map_knows_samples_by_key_by_image_and_by_vector(the_map: Path, mini):
    key, data = next(iter(QUERIES.items()))
    with connect(f"replay://{the_map}") as source:
        [by_key] = source.retrieve([data], keys=[key])
        [by_image] = source.retrieve([data])
        [by_vector] = source.retrieve(
            vectors=np.ones((1, 2), np.float32), fingerprint=mini.fingerprint, keys=[key]
        )
        assert by_key == by_image == by_vector
        with pytest.raises(errors.FingerprintMismatch):
            source.retrieve(vectors=np.ones((1, 2), np.float32), fingerprint="another", keys=[key])


def test_what_is_not_in_a_map_is_refused_by_name(the_map: Path):
    data = QUERIES["red-circle"]
    with connect(f"replay://{the_map}") as source:
        with pytest.raises(errors.NotFound, match="no sample 'photo-9'"):
            source.retrieve([data], keys=["photo-9"])
        with pytest.raises(errors.NotFound, match=r"'red-circle'.*another image"):
            source.retrieve([QUERIES["blue-circle"]], keys=["red-circle"])
        with pytest.raises(errors.NotFound, match="image of query 0"):
            source.retrieve([b"no image of the map"])
        with pytest.raises(errors.InvalidInput, match="pass keys="):
            source.retrieve(vectors=np.ones((1, 2), np.float32), fingerprint=source.info().fingerprint)
        with pytest.raises(errors.InvalidInput, match="k=3, and 9 is asked for"):
            source.retrieve([data], k=9)
        with pytest.raises(errors.NotFound, match="no tag 99999"):
            source.tags([99999])
        with pytest.raises(errors.NotFound, match="version"):
            source.pin(9)
    with pytest.raises(errors.NotFound, match="no map at"):
        connect("replay:///nowhere/map")


def test_a_sample_that_was_refused_is_refused_again_with_its_reason(live, tmp_path: Path):
    bad = [Pair("broken", b"no image", ()), Rejected("gone", "cannot read gone.jpg")]
    result = record(live, [*pairs()[:3], *bad, *pairs()[3:5]], tmp_path / "map", batch=4)
    assert (result.samples, result.refused) == (5, 2)
    with connect(f"replay://{tmp_path / 'map'}") as source:
        for key, reason in (("broken", "not an image"), ("gone", "cannot read gone.jpg")):
            with pytest.raises(errors.InvalidInput, match=f"'{key}' was refused.*{reason}"):
                source.retrieve([b"no image"], keys=[key])


def test_a_recording_that_was_cut_off_goes_on_and_gives_the_same_map(server_address: str, tmp_path: Path):
    def cut_off():
        yield from pairs()[:7]
        raise KeyboardInterrupt

    whole = recorded(server_address, tmp_path / "whole")
    with connect(f"grpc://{server_address}/shapes") as source:
        with pytest.raises(KeyboardInterrupt):
            record(source, cut_off(), tmp_path / "map", workers=1, batch=2)
        with pytest.raises(errors.NotFound, match="unfinished"):
            connect(f"replay://{tmp_path / 'map'}")
        with (
            connect(f"grpc://{server_address}/shapes?k=9") as other,
            pytest.raises(errors.InvalidInput, match="was begun with options"),
        ):
            record(other, pairs(), tmp_path / "map")
        result = record(source, pairs(), tmp_path / "map", batch=2)
        assert 0 < result.asked < len(QUERIES)
        with pytest.raises(errors.AlreadyExists):
            record(source, pairs(), tmp_path / "map")
    assert result.checksum == Map(whole).meta["checksum"]
    assert (tmp_path / "map").read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.part*"))


def test_keys_that_come_twice(live, tmp_path: Path):
    first, second = pairs()[:2]
    assert record(live, [first, second, first], tmp_path / "same").samples == 2
    with pytest.raises(errors.InvalidInput, match="comes twice, with different images"):
        record(live, [first, Pair(first.key, second.image, (), origin="line 2")], tmp_path / "differs")


@pytest.mark.parametrize("column", ["key", "answer", "sha256"])
def test_damage_is_noticed_by_whoever_reads_it(the_map: Path, tmp_path: Path, column: str):
    path = tmp_path / "map"
    path.write_bytes(the_map.read_bytes())
    value = "'red-circlf'" if column == "key" else "x'" + "ab" * 32 + "'"
    with sqlite3.connect(path) as db:
        db.execute(f"UPDATE samples SET {column} = {value} WHERE key = 'red-circle'")
    with pytest.raises(errors.Damaged):
        Map(path).verify()
    with connect(f"replay://{path}") as source, pytest.raises((errors.Damaged, errors.NotFound)):
        source.retrieve([QUERIES["red-circle"]], keys=["red-circle"])


def test_what_is_no_map_and_a_map_with_other_meta_are_refused(the_map: Path, tmp_path: Path):
    (tmp_path / "text").write_text("no database at all")
    with pytest.raises(errors.Damaged, match="no map"):
        connect(f"replay://{tmp_path / 'text'}")
    path = tmp_path / "map"
    path.write_bytes(the_map.read_bytes())
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value = '2' WHERE name = 'version'")
    with pytest.raises(errors.Damaged, match="meta does not fit"):
        connect(f"replay://{path}")


def test_the_command_records_a_folder(server_address: str, tmp_path: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for key, data in QUERIES.items():
        (folder / f"{key}.png").write_bytes(data)
        (folder / f"{key}.txt").write_text("a caption")
    out = str(tmp_path / "map")
    url = f"grpc://{server_address}/shapes?k=2&exclude=self"
    result = CliRunner().invoke(cli, ["record", url, str(folder), "--out", out, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["samples"] == len(QUERIES)
    assert "is sound" in CliRunner().invoke(cli, ["verify-map", out]).stdout
    with connect(f"replay://{out}") as source:
        answers = source.retrieve(list(QUERIES.values()), keys=list(QUERIES))
        assert all(n.key != key for key, a in zip(QUERIES, answers, strict=True) for n in a.neighbours)
        assert source.stats().guarded > 0
