"""Filters by typed metadata: the same over file:// and grpc://, in code, in a URL and in a deletion."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pictures import picture
from tagstore.client import connect
from tagstore.client.admin import administer
from tagstore.errors import InvalidInput, NotFound
from tagstore.ingestion import ingest
from tagstore.metadata_filter import filter_texts, fits, needle
from tagstore.serving.server import Server
from tagstore.upkeep.edits import Selection, delete

ROWS = (
    {"split": "train", "width": 640, "ok": True, "score": 0.5, "note": None, "tags": ["a", "b"],
     "nested": {"a": 1}, "a.b": "dot", "日": "本", "price": 3.0},
    {"split": "test", "width": 320, "ok": False, "score": 0.25, "note": "x", "tags": ["b"],
     "nested": {"a": 2}, "a.b": "x", "日": "x", "price": 1e22},
)  # fmt: skip
CASES = (
    ({"split": "train"}, {"0"}),
    ({"width": 640}, {"0"}), ({"width": "640"}, {"0"}), ({"width": 640.0}, {"0"}),
    ({"width": np.int64(320)}, {"1"}),
    ({"ok": True}, {"0"}), ({"ok": "false"}, {"1"}), ({"ok": "True"}, set()), ({"ok": 1}, set()),
    ({"score": 0.25}, {"1"}), ({"score": "2.5e-1"}, {"1"}),
    ({"price": 3}, {"0"}), ({"price": 1e22}, {"1"}), ({"price": 10**22}, {"1"}),
    ({"note": None}, {"0"}), ({"note": "x"}, {"1"}), ({"missing": None}, set()),
    ({"tags": "a"}, {"0"}), ({"tags": "b"}, {"0", "1"}), ({"tags": "b", "split": "test"}, {"1"}),
    ({"a.b": "dot"}, {"0"}), ({"日": "本"}, {"0"}),
    ({"nested": "{'a': 1}"}, set()),
)  # fmt: skip
REFUSED = (
    ({"nested": {"a": 1}}, "'nested' is dict"), ({"tags": ["a"]}, "'tags' is list"),
    ({"score": float("nan")}, "'score' is float"), ({"split": b"train"}, "'split' is bytes"),
    ({1: "a"}, "the field 1"), (["split"], "where is list"),
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory, mini) -> Path:
    folder = tmp_path_factory.mktemp("typed")
    lines = []
    for i, (row, shape) in enumerate(zip(ROWS, ("circle", "square"), strict=True)):
        (folder / f"{i}.png").write_bytes(picture("red", shape))
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a red {shape}", **row}) + "\n")
    (folder / "m.jsonl").write_text("".join(lines))
    ingest(str(folder / "m.jsonl"), root=folder / "root", store="s", encoder=mini)
    return folder / "root"


@pytest.fixture(scope="module", params=["file", "grpc"])
def url(request, root: Path):
    if request.param == "file":
        yield f"file://{root}/s"
        return
    server = Server(root, "127.0.0.1:0", device="cpu")
    server.start()
    yield f"grpc://{server.address}/s"
    server.stop(0)


def test_values_of_every_type(url: str, mini):
    vector = np.ones((1, mini.dimension), np.float32)
    with connect(url) as source:
        for where, keys in CASES:
            [answer] = source.retrieve(vectors=vector, fingerprint=mini.fingerprint, where=where)
            assert {neighbour.key for neighbour in answer.neighbours} == keys, where
        for wrong, message in REFUSED:
            with pytest.raises(InvalidInput, match=message):
                source.retrieve(vectors=vector, fingerprint=mini.fingerprint, where=wrong)
    with connect(f"{url}?where.width=320&where.ok=false") as source:
        [answer] = source.retrieve(vectors=vector, fingerprint=mini.fingerprint)
        assert [neighbour.key for neighbour in answer.neighbours] == ["1"]


def test_a_deletion_takes_what_a_filter_finds_and_no_entry_without_the_field(root: Path, url: str):
    with pytest.raises(NotFound):
        delete(root, "s", Selection(where={"missing": "None"}))
    if url.startswith("grpc"):
        with administer(url) as admin, pytest.raises(InvalidInput, match="'nested' is dict"):
            admin.delete(where={"nested": {"a": 1}})  # type: ignore[dict-item]


def test_bytes_that_a_record_must_hold_never_hide_a_value():
    for row in ROWS:
        stored = json.dumps(row, ensure_ascii=False).encode()
        for where, _ in CASES:
            texts = filter_texts(where)
            if fits(row, texts):
                assert all(needle(text) in stored for text in texts.values()), where
