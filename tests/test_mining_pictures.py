"""A miner that reads pictures: alone, beside captions, in an ingest without a second forward."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pictures import ToyEncoder, picture, write_shapes
from tagstore.encoding.images import decode
from tagstore.errors import InvalidInput
from tagstore.ingestion import ingest, ingest_pairs
from tagstore.mining import load_miner
from tagstore.mining.pictures import ImageMiner, ImageNetTagger, Labels
from tagstore.storage.store import Store
from tagstore.types import PICTURE_SPAN, Entry, Pair


class ShapeTagger:
    """Calls a picture by the colour of its middle: what anybody may plug in."""

    identity = "shapes 1"
    size = (8, 8)
    encoder = ""

    def read_pixels(self, pixels: NDArray[np.uint8]) -> list[Labels]:
        assert pixels.shape[1:] == (8, 8, 3)
        red = pixels[:, 4, 4, 0] > 200
        return [[("Red Things" if one else "other thing", 0.9), ("blob", 0.4)] for one in red]

    def read_pooled(self, pooled: NDArray[np.float32]) -> list[Labels]:
        raise AssertionError("it has no tower of its own")


def entries(root: Path) -> Iterator[tuple[Entry, dict[str, tuple[float, tuple[tuple[int, int, int], ...]]]]]:
    """Each entry with its tags: text to (score, mentions)."""
    snapshot = Store(root, "s").snapshot()
    for entry in snapshot.entries():
        texts = [text for text, *_ in snapshot.tags([tag.tag_id for tag in entry.tags])]
        yield entry, {t: (tag.score, tag.mentions) for t, tag in zip(texts, entry.tags, strict=True)}


def test_pictures_without_captions_become_a_store(tmp_path: Path):
    source = write_shapes(tmp_path / "shapes")
    for file in source.glob("*.txt"):
        file.unlink()
    miner = ImageMiner(tagger=ShapeTagger())
    report = ingest(str(source), root=tmp_path, store="s", encoder=ToyEncoder(), miner=miner)
    assert (report.added, report.reasons) == (18, {})
    for entry, tags in entries(tmp_path):
        assert entry.captions == ()
        (text,) = tags
        assert text == ("red things" if entry.key.startswith(("red", "yellow", "orange")) else "other thing")
        assert tags[text] == (pytest.approx(0.9, abs=1 / 255), ((-1, *PICTURE_SPAN),))
    assert Store(tmp_path, "s").snapshot().version.miner["settings"] == {
        "tagger": "shapes 1",
        "threshold": 0.5,
    }


def test_captions_where_there_are_some_and_pictures_beside_them(tmp_path: Path):
    pairs = [
        Pair("captioned", picture("red", "square"), ("A red square on a table.",)),
        Pair("bare", picture("blue", "square"), ()),
    ]
    from tagstore.mining.compose import Composed

    miner = Composed([load_miner("rules"), ImageMiner(tagger=ShapeTagger())])
    report = ingest_pairs(pairs, root=tmp_path, store="s", encoder=ToyEncoder(), miner=miner)
    assert report.added == 2
    tags = {entry.key: mined for entry, mined in entries(tmp_path)}
    assert set(tags["captioned"]) == {"square", "red square", "table", "red things"}
    assert tags["captioned"]["square"][1] == ((0, 6, 12),)
    assert tags["captioned"]["red things"][1] == ((-1, *PICTURE_SPAN),)
    assert set(tags["bare"]) == {"other thing"}


def test_without_a_miner_of_pictures_a_pair_needs_a_caption(tmp_path: Path):
    with pytest.raises(InvalidInput, match="no caption"):
        ingest_pairs(
            [Pair("bare", picture("blue", "square"), ())], root=tmp_path, store="s", encoder=ToyEncoder()
        )


def test_the_imagenet_head_reads_what_the_tower_of_mini_pooled(mini):
    image = decode(picture("orange", "circle"))
    pooled, vectors = mini.encode_pooled([image, image])
    assert pooled.shape == (2, 1280)
    np.testing.assert_array_equal(vectors, mini.encode_images([image, image]))
    tagger = ImageNetTagger()
    (labels, again) = tagger.read_pooled(pooled)
    assert labels == again
    assert len(tagger.names) == 1000
    assert [p for _, p in labels] == sorted((p for _, p in labels), reverse=True)
    assert 0 < sum(p for _, p in labels) <= 1


def test_an_ingest_with_mini_runs_its_tower_once(tmp_path: Path, mini, monkeypatch: pytest.MonkeyPatch):
    source = write_shapes(tmp_path / "shapes")
    seen = 0
    trunk = mini._model.visual.trunk
    handle = trunk.register_forward_hook(lambda module, inputs, output: note(len(output)))

    def note(pictures: int) -> None:
        nonlocal seen
        seen += pictures

    try:
        miner = load_miner("rules+image", threshold=0.02)
        ingest(str(source), root=tmp_path, store="s", encoder=mini, miner=miner)
        assert seen == 18
        plain = ingest(str(source), root=tmp_path, store="plain", encoder=mini)
    finally:
        handle.remove()
    mined = [tags for _, tags in entries(tmp_path)]
    assert any(mentions == ((-1, *PICTURE_SPAN),) for tags in mined for _, mentions in tags.values())
    vectors = [Store(tmp_path, name).snapshot() for name in ("s", "plain")]
    ids = np.arange(1, plain.entries)
    np.testing.assert_array_equal(*(snapshot.vectors(ids) for snapshot in vectors))


def test_pictures_are_decoded_where_nobody_has_read_them():
    miner = ImageMiner(tagger=ShapeTagger(), threshold=0.3)
    (tags,) = miner.mine([Pair("a", picture("red", "circle"), ("nothing of it",))])
    assert [(t.text, t.kind, t.canonical, t.score, t.label, t.caption) for t in tags] == [
        ("red things", "object", "red thing", 0.9, "image", -1),
        ("blob", "object", "blob", 0.4, "image", -1),
    ]
    with pytest.raises(InvalidInput, match=r"'a' comes without its image.*ingest the source again"):
        list(miner.mine([Pair("a", b"", ("a dog",))]))
    with pytest.raises(InvalidInput, match="threshold is 1"):
        load_miner("image", threshold=1)
