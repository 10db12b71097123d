"""A store, bundles and a recorded map of an earlier revision open, verify and answer exactly as before.

`written_before/` holds what revision 9230e88 wrote: a store of five versions (ingest, delete, ingest,
rollback, build-index hnsw), bundles of versions 4 and 5, a map recorded with `k=4&exclude=self`, and the
answers of all of them as JSON.
"""

from __future__ import annotations

import json
import lzma
import tarfile
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pictures import COLOURS, picture
from tagstore.bundles import export, import_
from tagstore.client import connect
from tagstore.client.mapfile import Map
from tagstore.serving.server import Server
from tagstore.upkeep.verify import verify

WRITTEN = Path(__file__).parent / "written_before"
VERSIONS = ("1", "2", "3", "4", "5")


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads(lzma.decompress((WRITTEN / "answers.json.xz").read_bytes()))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("written")
    with tarfile.open(WRITTEN / "root.tar.xz") as archive:
        archive.extractall(path, filter="data")
    return path


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    return np.load(WRITTEN / "queries.npy").astype(np.float32)


ADDED = {"captions": [], "mentions": [], "miner": "", "tag_embeddings": {}}
"""Fields that answers have since the files were written, and what they hold where nobody asked for them."""


def as_json(value: Any) -> Any:
    """A value as it was before fields were added, which say nothing here."""
    fields = json.loads(json.dumps(asdict(value)))
    return _as_then(fields)


def _as_then(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_then(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {k: _as_then(v) for k, v in value.items() if k not in ADDED or v != ADDED[k]}


def check(url: str, version: str, expected: dict[str, Any], queries: np.ndarray) -> None:
    then = expected["answers"][version]
    with connect(f"{url}@{version}") as source:
        info = source.info()
        assert as_json(info) == then["info"]
        assert [[t.tag_id, t.text, t.kind, t.count] for t in source.vocabulary()] == then["tags"]
        for options, retrievals in zip(expected["options"], then["retrievals"], strict=True):
            answers = source.retrieve(vectors=queries, fingerprint=info.fingerprint, **options)
            assert [as_json(answer) for answer in answers] == retrievals, options


@pytest.mark.parametrize("version", VERSIONS)
def test_a_store_answers_as_it_did(version: str, root: Path, expected, queries):
    check(f"file://{root}/shapes", version, expected, queries)


def test_a_store_answers_over_grpc_as_it_did(root: Path, expected, queries):
    server = Server(root, "127.0.0.1:0", device="cpu")
    server.start()
    try:
        for version in VERSIONS:
            check(f"grpc://{server.address}/shapes", version, expected, queries)
    finally:
        server.stop(0)


def test_a_store_is_sound(root: Path):
    assert verify(root, "shapes") == []


@pytest.mark.parametrize(("name", "version"), [("shapes", 4), ("tuned", 5)])
def test_bundles_come_out_the_same_and_go_in(
    name: str, version: int, root: Path, tmp_path: Path, expected, queries
):
    bundle = WRITTEN / f"{name}.tagstore"
    export(root, "shapes", tmp_path / "again.tagstore", version=version)
    assert (tmp_path / "again.tagstore").read_bytes() == bundle.read_bytes()
    import_(tmp_path / "root", bundle)
    with connect(f"file://{tmp_path}/root/shapes") as source:
        answers = source.retrieve(vectors=queries, fingerprint=source.info().fingerprint)
    assert [as_json(answer) for answer in answers] == expected["answers"][str(version)]["retrievals"][0]


def test_a_recorded_map_answers_as_it_did(expected):
    keys = [f"{colour}-{shape}" for colour in COLOURS for shape in ("circle", "square")]
    images = [
        picture(colour, shape, shift=i) for i, colour in enumerate(COLOURS) for shape in ("circle", "square")
    ]
    with closing(Map(WRITTEN / "answers.map")) as recorded:
        recorded.verify()
    with connect(f"replay://{WRITTEN}/answers.map") as source:
        assert [as_json(answer) for answer in source.retrieve(images, keys=keys)] == expected["answers"][
            "map"
        ]
