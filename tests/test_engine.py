"""The engine against its specification: FAISS proposes, the stored vectors decide, ties go by entry id."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tagstore.errors import BadVector, Damaged, InvalidInput
from tagstore.indexing import faiss_index
from tagstore.indexing.faiss_index import FaissIndex
from tagstore.indexing.protocol import NumpyIndex
from tagstore.mining import MergedTag
from tagstore.retrieval.engine import Engine
from tagstore.storage.staging import Draft
from tagstore.storage.store import Store
from tagstore.storage.writer import Writer
from tagstore.types import Fingerprint, Search

D = 32
FINGERPRINT = Fingerprint("toy", "00", {}, False, True, D)
WORDS = [f"tag {i}" for i in range(40)]


def make(root: Path, vectors: np.ndarray, tags: list[list[str]], name: str = "toy") -> Engine:
    drafts = [
        Draft(f"k{i}", bytes(32), 0, ("c",), tuple(MergedTag(t, "object", t, 1.0, 1, ()) for t in words))
        for i, words in enumerate(tags)
    ]
    with Writer(root, name, FINGERPRINT) as writer:
        writer.append(drafts, vectors)
        texts = writer.new_tags(limit=1 << 20)
        embeddings = np.random.default_rng(1).standard_normal((len(texts), D), dtype=np.float32)
        writer.embed_tags(embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True))
        writer.commit(operation="ingest", miner={}, indexer=faiss_index.extend)
    return Engine(Store(root, name).snapshot())


def clustered(rng: np.random.Generator, n: int) -> np.ndarray:
    centres = rng.standard_normal((20, D), dtype=np.float32)
    vectors = centres[rng.integers(20, size=n)] + 0.3 * rng.standard_normal((n, D), dtype=np.float32)
    vectors[n - n // 4 :] = vectors[: n // 4]  # duplicates: their order is decided by id
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    rng = np.random.default_rng(0)
    tags = [list(rng.choice(WORDS, size=rng.integers(0, 6), replace=False)) for _ in range(700)]
    return make(tmp_path_factory.mktemp("engine"), clustered(rng, 700), tags)


def test_neighbours_are_those_of_the_specification(engine: Engine, rng: np.random.Generator) -> None:
    ids = engine.snapshot.live()
    stored = engine.snapshot.vectors(ids)
    queries = np.concatenate([stored[:30], clustered(rng, 50)])
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    similarities = np.clip((stored[None] * queries[:, None]).sum(-1), -1, 1)
    for k in (1, 5, 50):
        answers = engine.retrieve(queries, Search(k=k))
        for answer, row in zip(answers, similarities, strict=True):
            best = sorted(zip(-row, ids, strict=True))[:k]
            assert [n.entry_id for n in answer.neighbours] == [i for _, i in best]
            assert [n.similarity for n in answer.neighbours] == pytest.approx(
                [min(-s, 1.0) for s, _ in best], abs=1e-6
            )


def test_the_index_agrees_with_the_numpy_index(engine: Engine, rng: np.random.Generator) -> None:
    ids = engine.snapshot.live()
    oracle = NumpyIndex(engine.snapshot.vectors(ids), ids)
    queries = clustered(rng, 64)
    ours, theirs = engine.index.search(queries, 10), oracle.search(queries, 10)
    # as sets of vectors: which of two equal vectors comes first is the engine's business
    sims = [
        np.take_along_axis(queries @ engine.snapshot.vectors(ids).T, found, axis=1)
        for found in (ours, theirs)
    ]
    np.testing.assert_allclose(sims[0], sims[1], atol=1e-6)


def test_an_answer_does_not_depend_on_its_batch_or_its_dtype(
    engine: Engine, rng: np.random.Generator
) -> None:
    queries = clustered(rng, 200)
    together = engine.retrieve(queries, Search(k=7))
    assert together == [engine.retrieve(q[None], Search(k=7))[0] for q in queries]
    halves = queries.astype(np.float16)
    assert engine.retrieve(halves, Search(k=3)) == engine.retrieve(halves.astype(np.float64), Search(k=3))
    assert engine.retrieve(queries * 8, Search(k=7)) == together


def test_signals_are_what_they_say(engine: Engine, rng: np.random.Generator) -> None:
    for answer, query in zip(engine.retrieve(q := clustered(rng, 20), Search(k=9)), q, strict=True):
        records = {
            n.entry_id: {t.tag_id for t in engine.snapshot.entry(n.entry_id).tags} for n in answer.neighbours
        }
        assert {t.tag_id for t in answer.tags} == set().union(*records.values())
        for tag in answer.tags:
            carriers = [n for n in answer.neighbours if tag.tag_id in records[n.entry_id]]
            assert tag.neighbours == tuple(n.entry_id for n in carriers)
            assert tag.votes == len(carriers)
            assert tag.similarity == carriers[0].similarity
            [info] = engine.tags([tag.tag_id], embeddings=True)
            assert info.text == tag.tag
            assert tag.relevance == pytest.approx(float(info.embedding @ query), abs=1e-5)
        order = [(-t.votes, -t.similarity, -t.relevance, t.tag_id) for t in answer.tags]
        assert order == sorted(order)
        assert engine.retrieve(query[None], Search(k=9, max_tags=3))[0].tags == answer.tags[:3]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 1000), st.integers(0, 50))
def test_any_k_and_any_cap(engine: Engine, k: int, max_tags: int) -> None:
    [answer] = engine.retrieve(np.ones((1, D), np.float32), Search(k=k, max_tags=max_tags))
    assert len(answer.neighbours) == min(k, 700)
    assert len(answer) <= (max_tags or 1 << 30)


@pytest.mark.parametrize("k", [0, -1, 1001])
def test_k_out_of_range_is_refused(engine: Engine, k: int) -> None:
    with pytest.raises(InvalidInput, match=f"k is {k}"):
        engine.retrieve(np.ones((1, D)), Search(k=k))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e38, 0.0])
def test_a_vector_without_a_direction_is_refused(engine: Engine, bad: float) -> None:
    queries = np.ones((3, D), np.float32)
    queries[1] = bad
    if bad == 0.0 or not np.isfinite(bad) or bad > 1e30:
        with pytest.raises(BadVector, match="query 1 holds"):
            engine.retrieve(queries)


@pytest.mark.parametrize("shape", [(D,), (1, D + 1), (1, 0), (1, 1, D)])
def test_vectors_of_another_shape_are_refused(engine: Engine, shape: tuple[int, ...]) -> None:
    with pytest.raises(BadVector, match=rf"takes \[N, {D}\]"):
        engine.retrieve(np.ones(shape, np.float32))


def test_too_many_queries_are_refused_and_none_are_fine(engine: Engine) -> None:
    with pytest.raises(InvalidInput, match="send at most"):
        engine.retrieve(np.ones((5000, D), np.float32), Search(k=1))
    with pytest.raises(InvalidInput, match="ask for 200000 neighbours"):
        engine.retrieve(np.ones((200, D), np.float32), Search(k=1000))
    assert engine.retrieve(np.ones((0, D), np.float32)) == []


def test_a_store_without_tags_and_one_with_fewer_entries_than_k_answer(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    small = make(tmp_path, clustered(rng, 60)[:2], [[], []])
    [answer] = small.retrieve(np.ones((1, D), np.float32), Search(k=5))
    assert (len(answer.neighbours), len(answer.tags)) == (2, 0)


def test_tags_are_paged_and_counted(engine: Engine) -> None:
    everything = engine.tags(limit=1000)
    assert [t.tag_id for t in everything] == list(range(40))
    assert [t.tag_id for t in engine.tags(first=30, limit=5)] == list(range(30, 35))
    assert engine.tags(first=40) == []
    counts = {t.tag_id: 0 for t in everything}
    for entry in engine.snapshot.entries():
        for tag in entry.tags:
            counts[tag.tag_id] += 1
    assert {t.tag_id: t.count for t in everything} == counts


@pytest.mark.parametrize("rows", [64, 1 << 20])
def test_many_equal_vectors_are_cut_by_id_whatever_the_files(
    tmp_path: Path, rng: np.random.Generator, monkeypatch, rows: int
) -> None:
    monkeypatch.setattr(faiss_index, "MAX_ROWS", rows)
    vectors = np.concatenate([np.eye(D, dtype=np.float32)[:1].repeat(200, 0), clustered(rng, 40)])
    vectors[200:202] = np.eye(D, dtype=np.float32)[0] + np.eye(D, dtype=np.float32)[1] * 0.1
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    small = make(tmp_path, vectors, [[]] * 240)
    query = np.eye(D, dtype=np.float32)[0] + np.eye(D, dtype=np.float32)[1] * 0.1
    [answer] = small.retrieve(query[None], Search(k=6))
    assert [n.entry_id for n in answer.neighbours] == [200, 201, 0, 1, 2, 3]


def test_an_index_of_other_contents_or_none_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    make(tmp_path, clustered(rng, 60), [[]] * 60, "a")
    [file] = Store(tmp_path, "a").index_directory.iterdir()
    for rows, complaint in (70, "holds 70 vectors"), (50, "cut off"):
        other = make(tmp_path, clustered(rng, rows), [[]] * rows, f"b{rows}")
        name = other.version.index["files"][0]["file"]
        file.write_bytes((Store(tmp_path, f"b{rows}").index_directory / name).read_bytes())
        with pytest.raises(Damaged, match=complaint):
            FaissIndex(Store(tmp_path, "a").snapshot())
    file.write_bytes(b"IxSQ")
    with pytest.raises(Damaged, match="cannot be read"):
        FaissIndex(Store(tmp_path, "a").snapshot())
    file.unlink()
    with pytest.raises(Damaged, match="cannot be read"):
        FaissIndex(Store(tmp_path, "a").snapshot())


def test_a_large_index_is_several_files_that_answer_as_one(
    tmp_path: Path, rng: np.random.Generator, monkeypatch
) -> None:
    vectors = clustered(rng, 300)
    one = make(tmp_path, vectors, [[]] * 300, "one")
    monkeypatch.setattr(faiss_index, "MAX_ROWS", 64)
    many = make(tmp_path, vectors, [[]] * 300, "many")
    assert [f["rows"] for f in many.version.index["files"]] == [64, 64, 64, 64, 44]
    queries = clustered(rng, 40)
    assert [a.neighbours for a in many.retrieve(queries, Search(k=9))] == [
        a.neighbours for a in one.retrieve(queries, Search(k=9))
    ]
