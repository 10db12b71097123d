"""Tag embeddings learnt from the store's own pictures: the formula, and every operation that keeps them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pictures import picture, write_shapes
from tagstore.bundles import export, import_
from tagstore.client import connect
from tagstore.encoding import grounding
from tagstore.encoding.encoder import load_encoder
from tagstore.errors import InvalidInput
from tagstore.ingestion import ingest
from tagstore.mining import load_rules
from tagstore.serving.server import Server
from tagstore.storage.store import Store
from tagstore.upkeep.compact import compact
from tagstore.upkeep.edits import Selection, delete, rollback
from tagstore.upkeep.reprocessing import ground, reembed, retag
from tagstore.upkeep.takedown import purge
from tagstore.upkeep.verify import verify


def by_the_formula(vectors: np.ndarray, tags_of_each: list[list[int]], tags: int) -> np.ndarray:
    """The docstring of `encoding.grounding`, read slowly."""
    x = vectors.astype(np.float64)
    n, d = x.shape
    covariance = np.cov(x.T, bias=True)
    mean = x.mean(0)
    trace, square = np.trace(covariance), np.trace(covariance @ covariance)
    rho = ((1 - 2 / d) * square + trace**2) / ((n + 1 - 2 / d) * (square - trace**2 / d))
    moment = covariance + np.outer(mean, mean)
    shrinkage = rho / (1 - rho) * trace / d + 1e-6 * np.trace(moment) / d
    inverse = np.linalg.inv(moment + shrinkage * np.eye(d))
    r = np.sqrt(np.mean([np.linalg.norm(inverse @ row) ** 2 for row in x]))
    flattest = np.linalg.svd(x)[2][-1]
    rows = []
    for tag in range(tags):
        carried = [row for row, ids in zip(x, tags_of_each, strict=True) if tag in ids]
        w = inverse @ np.sum(carried, axis=0) if carried else np.zeros(d)
        w /= np.sqrt(w @ w + (10 * r) ** 2)
        w -= (w @ flattest) * flattest
        rows.append((w, np.sqrt(1 - w @ w) * flattest))
    sign = np.sign(flattest[np.abs(flattest).argmax()])
    return np.array([w + sign * rest for w, rest in rows])


def some_pictures(n: int = 60, d: int = 12, tags: int = 7) -> tuple[np.ndarray, list[list[int]]]:
    rng = np.random.default_rng(3)
    centres = rng.normal(size=(tags, d)) + 2
    kinds = rng.integers(0, tags - 1, size=(n, 2))  # the last tag has no picture
    vectors = centres[kinds].mean(1) + 0.3 * rng.normal(size=(n, d))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), [sorted({int(a), int(b)}) for a, b in kinds]


@pytest.mark.parametrize(("piece", "tags_at_once", "mentions"), [(60, 1 << 15, 1 << 14), (7, 3, 4)])
def test_embeddings_are_what_the_formula_says(monkeypatch, piece, tags_at_once, mentions):
    monkeypatch.setattr(grounding, "TAGS_AT_ONCE", tags_at_once)
    monkeypatch.setattr(grounding, "MENTIONS_AT_ONCE", mentions)
    vectors, tags = some_pictures()

    def pictures():
        for start in range(0, len(vectors), piece):
            yield vectors[start : start + piece], tags[start : start + piece]

    learnt = np.concatenate(list(grounding.learn(pictures, 7, 12)))
    np.testing.assert_allclose(learnt, by_the_formula(vectors, tags, 7), atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(learnt, axis=1), 1, atol=1e-6)
    cosines = vectors @ learnt.T
    assert np.abs(cosines[:, 6]).max() < 0.3  # the tag without a picture fits none
    truth = np.array([[tag in ids for tag in range(6)] for ids in tags])
    above = cosines[:, :6][truth].mean() - cosines[:, :6][~truth].mean()
    assert above > 0.05


@pytest.mark.parametrize("n", [2, 3, 5])
def test_few_pictures_give_sound_embeddings(n: int):
    vectors, tags = some_pictures(n)
    learnt = np.concatenate(list(grounding.learn(lambda: iter([(vectors, tags)]), 7, 12)))
    np.testing.assert_allclose(np.linalg.norm(learnt, axis=1), 1, atol=1e-6)
    same = np.repeat(vectors[:1], n, axis=0)
    learnt = np.concatenate(list(grounding.learn(lambda: iter([(same, tags)]), 7, 12)))
    np.testing.assert_allclose(np.linalg.norm(learnt, axis=1), 1, atol=1e-6)


@pytest.fixture
def root(tmp_path: Path, mini) -> Path:
    ingest(str(write_shapes(tmp_path / "shapes")), root=tmp_path / "root", store="s", encoder=mini)
    return tmp_path / "root"


def relevance(
    root: Path, version: int = 0, image: bytes = picture("red", "circle", shift=4)
) -> dict[str, float]:
    with connect(f"file://{root}/s" + (f"@{version}" if version else "")) as source:
        [answer] = source.retrieve([image], k=18)
        return {tag.tag: tag.relevance for tag in answer}


def expected(root: Path) -> dict[str, np.ndarray]:
    """What the tags' embeddings of the current version should be."""
    snapshot = Store(root, "s").snapshot()
    ids = snapshot.live()
    tags = [tags for _, tags in snapshot.keys_and_tags(ids.tolist())]
    vectors = snapshot.vectors(ids)
    rows = np.concatenate(
        list(grounding.learn(lambda: iter([(vectors, tags)]), snapshot.version.next_tag_id, 512))
    )
    vocabulary = snapshot.vocabulary()
    return {text: rows[i] for i, (text, _, _) in zip(vocabulary, snapshot.tags(vocabulary), strict=True)}


def assert_grounded(root: Path) -> None:
    with connect(f"file://{root}/s") as source:
        assert source.info().tag_embeddings["pictures"] == source.info().entries
        stored = {tag.text: tag.embedding for tag in source.vocabulary(embeddings=True)}
    for text, row in expected(root).items():
        np.testing.assert_allclose(stored[text], row, atol=1e-3)
    assert verify(root, "s", full=True) == []


def test_the_relevance_of_a_grounded_store_comes_from_its_pictures(root: Path):
    before = relevance(root)
    files = Store(root, "s").snapshot().version.index["files"]
    version = ground(root, "s")
    assert (version.number, version.operation, version.entries) == (2, "ground", 18)
    assert version.index["files"] == files  # the vectors are the same
    assert_grounded(root)
    learnt = relevance(root)
    assert learnt.keys() == before.keys()
    assert max(learnt, key=lambda tag: learnt[tag]) in ("red circle", "red", "circle")
    assert relevance(root, 1) == before
    assert rollback(root, "s", 1).tag_embeddings == {}
    assert relevance(root) == before


def test_an_ingest_into_a_grounded_store_learns_again_without_the_text_tower(
    root: Path, tmp_path, mini, monkeypatch
):
    ground(root, "s")
    (tmp_path / "shapes" / "new.png").write_bytes(picture("black", "circle"))
    (tmp_path / "shapes" / "new.txt").write_text("A black hole.")
    monkeypatch.setattr(mini, "encode_texts", None)
    assert ingest(str(tmp_path / "shapes"), root=root, store="s", encoder=mini).version == 3
    assert_grounded(root)
    assert "black hole" in expected(root)
    assert ingest(str(tmp_path / "shapes"), root=root, store="s", encoder=mini).version == 3


def test_retag_and_reembed_learn_again_and_delete_keeps_what_was_learnt(root: Path, mini):
    ground(root, "s")
    delete(root, "s", Selection(keys=["red-circle"]))
    assert Store(root, "s").snapshot().version.tag_embeddings["pictures"] == 18
    retag(root, "s", vocabulary=load_rules(minimum=2))
    assert_grounded(root)
    version = reembed(root, "s", load_encoder("RN50/random", device="cpu"))
    assert version.tag_embeddings["pictures"] == 17
    assert verify(root, "s", full=True) == []


def test_what_was_learnt_survives_compaction_and_bundles(root: Path, tmp_path: Path):
    ground(root, "s")
    learnt = relevance(root)
    compact(root, "s")
    assert relevance(root) == learnt
    assert_grounded(root)
    export(root, "s", tmp_path / "s.tagstore")
    import_(tmp_path / "other", tmp_path / "s.tagstore")
    assert relevance(tmp_path / "other") == learnt
    assert_grounded(tmp_path / "other")


def test_a_takedown_leaves_nothing_in_what_was_learnt(root: Path, tmp_path: Path, mini):
    ground(root, "s")
    purge(root, "s", Selection(keys=["red-circle"]), reason="asked for")
    learnt = expected(root)
    with connect(f"file://{root}/s") as source:
        for tag in source.vocabulary(embeddings=True):
            np.testing.assert_allclose(tag.embedding, learnt[tag.text], atol=1e-3)
    assert verify(root, "s", full=True) == []


def test_a_server_answers_and_describes_a_grounded_store_as_a_file_does(root: Path):
    ground(root, "s")
    server = Server(root, "127.0.0.1:0", device="cpu")
    server.start()
    with connect(f"grpc://{server.address}/s") as remote, connect(f"file://{root}/s") as local:
        assert remote.info() == local.info()
        image = picture("blue", "square", shift=4)
        assert remote.retrieve([image], k=5) == local.retrieve([image], k=5)
    server.stop(0)


def test_one_picture_is_too_few(tmp_path: Path, mini):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.png").write_bytes(picture("red", "circle"))
    (tmp_path / "one" / "a.txt").write_text("A red circle.")
    ingest(str(tmp_path / "one"), root=tmp_path / "root", store="s", encoder=mini)
    with pytest.raises(InvalidInput, match="too few pictures"):
        ground(tmp_path / "root", "s")
