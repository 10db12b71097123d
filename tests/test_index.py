"""Every kind of index equals the numpy specification; filters and leak guard equal a full pass."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tagstore.cli import cli
from tagstore.errors import BadVector, InvalidInput
from tagstore.indexing import exact, faiss_index, plans
from tagstore.indexing.faiss_index import FaissIndex
from tagstore.indexing.protocol import NumpyIndex
from tagstore.mining import MergedTag
from tagstore.retrieval import filters, tag_votes
from tagstore.retrieval.engine import Engine
from tagstore.storage.rows import Allowed, widened
from tagstore.storage.staging import Draft
from tagstore.storage.store import Snapshot, Store
from tagstore.storage.writer import Writer
from tagstore.types import Exclude, Fingerprint, Identity, Search
from tagstore.upkeep.compact import compact
from tagstore.upkeep.edits import Selection, delete, rollback
from tagstore.upkeep.takedown import purge
from tagstore.upkeep.tuning import Budget, OverBudget, build_index
from tagstore.upkeep.verify import repair, verify

D, N = 32, 10_500
FINGERPRINT = Fingerprint("toy", "00", {}, False, True, D)
COLOURS = ("red", "green", "blue", "None", 'a "quoted\\ ü"')
APPROXIMATE = ("hnsw", "ivf", "ivfpq")


def clustered(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((max(1, n // 10), D), dtype=np.float32)
    vectors = centres[rng.integers(len(centres), size=n)]
    vectors = vectors + 0.4 * rng.standard_normal((n, D), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def draft(i: int, prefix: str = "k") -> Draft:
    """A draft; every tenth picture equals the one before, and hashes of close numbers differ in few bits."""
    colour = COLOURS[i % len(COLOURS)]
    metadata = {"colour": None if colour == "None" else colour, "size": i % 3, "sharp": i % 2 == 0}
    picture = i - 1 if i % 10 == 0 else i
    words = [f"tag {i % 40}", f"tag {i % 11}"]
    tags = tuple(MergedTag(t, "object", t, 1.0, 1, ()) for t in dict.fromkeys(words))
    digest = picture.to_bytes(32, "little", signed=True)
    return Draft(f"{prefix}{i}", digest, picture & 0xFFFF, ("red and blue",), tags, metadata if i % 7 else {})


def append(root: Path, name: str, vectors: np.ndarray, prefix: str = "k") -> Snapshot:
    with Writer(root, name, FINGERPRINT) as writer:
        writer.append([draft(i, prefix) for i in range(len(vectors))], vectors)
        while texts := writer.new_tags(limit=4096):
            rows = np.random.default_rng(1).standard_normal((len(texts), D), dtype=np.float32)
            writer.embed_tags(rows / np.linalg.norm(rows, axis=1, keepdims=True))
        writer.commit(operation="ingest", indexer=faiss_index.extend)
    return Store(root, name).snapshot()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A root with store "large": version 1 is flat, and there is one for each other kind."""
    root = tmp_path_factory.mktemp("indexes")
    append(root, "large", clustered(N))
    for number, kind in enumerate(("hnsw", "ivf", "ivfpq", "flat32"), 2):
        version = build_index(root, "large", Budget(recall=0.9), kind=kind).version
        assert version.number == number
        assert version.index["files"][0]["plan"] == version.index["tuned"]
    return root


VERSION = {"flat": 1, "hnsw": 2, "ivf": 3, "ivfpq": 4, "flat32": 5}


@pytest.fixture(scope="module")
def engines(root: Path) -> dict[str, Engine]:
    return {kind: Engine(Store(root, "large").snapshot(number)) for kind, number in VERSION.items()}


@pytest.fixture(scope="module")
def oracle(root: Path) -> NumpyIndex:
    snapshot = Store(root, "large").snapshot()
    return NumpyIndex(snapshot.vectors(snapshot.live()), snapshot.live())


def in_threads(function: Callable[..., None], *arguments: object) -> None:
    """Call a function with each argument, each call in a thread of its own."""
    threads = [threading.Thread(target=function, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def similarities(oracle: NumpyIndex, queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Similarities of each query with its ids, which equal the oracle's rows if nothing was deleted."""
    return np.einsum("nd,nkd->nk", queries, oracle.vectors[ids])


@pytest.mark.parametrize("kind", VERSION)
@pytest.mark.parametrize("batch", [1, 3, 70])
def test_every_kind_finds_what_numpy_finds(
    engines: dict[str, Engine], oracle: NumpyIndex, kind: str, batch: int
):
    queries = clustered(70, 5)
    best = similarities(oracle, queries, oracle.search(queries, 10))
    pieces = [engines[kind].index.search(queries[i : i + batch], 10)[:, :10] for i in range(0, 70, batch)]
    reached = similarities(oracle, queries, np.concatenate(pieces))
    if kind in APPROXIMATE:
        assert np.mean(reached >= best[:, -1:] - 1e-6) > 0.85
    else:
        np.testing.assert_allclose(reached, best, atol=2e-6)
    exactly = engines[kind].index.search(queries, 10, search=Search(exact=True))
    np.testing.assert_allclose(similarities(oracle, queries, exactly), best, atol=2e-6)


@pytest.mark.parametrize("kind", VERSION)
def test_answers_do_not_depend_on_the_batch_whatever_the_kind(engines: dict[str, Engine], kind: str):
    queries = clustered(40, 6)
    together = engines[kind].retrieve(queries, Search(k=4))
    assert together == [engines[kind].retrieve(q[None], Search(k=4))[0] for q in queries]


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_where_the_candidates_cover_the_truth_the_answer_is_the_exact_one(
    engines: dict[str, Engine], kind: str
):
    queries = clustered(30, 7)
    wide = Search(k=3, nprobe=1 << 20, ef_search=2048)
    got, true = (engines[kind].nearest(queries, s) for s in (wide, replace(wide, exact=True)))
    share = np.mean([a == b for a, b in zip(got, true, strict=True)])
    assert share == 1.0 if kind == "ivf" else share > 0.9
    assert engines[kind].nearest(queries, replace(wide, exact=True)) == engines["flat"].nearest(queries, wide)


def test_request_parameters_change_nothing_that_is_shared(engines: dict[str, Engine]):
    queries = clustered(300, 8)
    narrow, wide = Search(ef_search=1, nprobe=1), Search(ef_search=500, nprobe=100)
    for kind in APPROXIMATE:
        expected = {s.ef_search: engines[kind].nearest(queries, s) for s in (narrow, wide)}
        wrong: list[Search] = []

        def ask(
            search: Search, engine: Engine = engines[kind], expected: dict = expected, wrong: list = wrong
        ) -> None:
            for i in range(0, 300, 50):
                if engine.nearest(queries[i : i + 50], search) != expected[search.ef_search][i : i + 50]:
                    wrong.append(search)

        in_threads(ask, *(narrow, wide) * 2)
        assert not wrong, kind


def test_masked_searches_in_many_threads_agree(root: Path, tmp_path: Path):
    """FAISS writes into the parameters of a filtered search: threads must not share them."""
    append(tmp_path, "s", clustered(600))
    delete(tmp_path, "s", Selection(keys=[f"k{i}" for i in range(250)]))
    engine = Engine(Store(tmp_path, "s").snapshot())
    queries = clustered(64, 9)
    expected = [engine.nearest(q[None]) for q in queries]
    wrong: list[int] = []

    def ask(_: int) -> None:
        for _ in range(4):
            wrong.extend(i for i, q in enumerate(queries) if engine.nearest(q[None]) != expected[i])

    in_threads(ask, *range(4))
    assert not wrong


def brute(
    snapshot: Snapshot, oracle: NumpyIndex, query: np.ndarray, search: Search, own: Identity
) -> tuple[list[int], int]:
    """Neighbours and the number excluded, by a pass over all entries."""
    rows = [(e, int(i)) for i, e in enumerate(snapshot.entries())]
    exclude = search.exclude
    cosines = np.clip((oracle.vectors * (query / np.linalg.norm(query))).sum(axis=1), -1, 1)
    ranked = sorted(rows, key=lambda r: (-cosines[r[1]], r[0].entry_id))
    kept: list[int] = []
    out = 0
    for entry, row in ranked:
        values = {n: v if isinstance(v, str) else json.dumps(v) for n, v in entry.metadata.items()}
        if not search.where.items() <= values.items():
            continue
        if cosines[row] < search.min_similarity or len(kept) == search.k:
            break
        distance = (entry.perceptual_hash ^ (own.perceptual_hash or 0)).bit_count()
        if (
            (exclude.key and entry.key == own.key)
            or (exclude.sha256 and entry.sha256 == own.sha256)
            or distance <= exclude.hash_distance
            or entry.key in exclude.keys
            or entry.entry_id in exclude.entry_ids
        ):
            out += 1
        else:
            kept.append(entry.entry_id)
    return kept, out


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Engine:
    return Engine(append(tmp_path_factory.mktemp("small"), "small", clustered(400)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    at=st.integers(0, 399),
    k=st.integers(1, 30),
    least=st.sampled_from([-1.0, 0.2, 0.9]),
    where=st.dictionaries(
        st.sampled_from(["colour", "size", "sharp", "none"]),
        st.sampled_from([*COLOURS, "0", "1", "true", "false"]),
        max_size=2,
    ),
    key=st.booleans(),
    digest=st.booleans(),
    bits=st.sampled_from([-1, 0, 2, 6, 64]),
    keys=st.lists(st.integers(0, 410).map(lambda i: f"k{i}"), max_size=40),
    ids=st.lists(st.integers(-3, 410), max_size=40),
)
def test_filters_and_exclusions_are_what_a_look_at_every_entry_gives(
    small: Engine, at: int, k: int, least: float, where: dict, key, digest, bits: int, keys: list, ids: list
):
    oracle = NumpyIndex(small.snapshot.vectors(small.snapshot.live()), small.snapshot.live())
    entry = small.snapshot.entry(at)
    own = Identity(entry.key, entry.sha256, entry.perceptual_hash)
    search = Search(
        k=k, min_similarity=least, where=where, exclude=Exclude(key, digest, bits, tuple(keys), tuple(ids))
    )
    [(found, _, out)] = small.nearest(oracle.vectors[at : at + 1], search, [own])
    assert (found, out) == brute(small.snapshot, oracle, oracle.vectors[at], search, own)


@pytest.mark.parametrize("kind", VERSION)
def test_k_neighbours_come_back_whatever_is_kept_out(
    engines: dict[str, Engine], oracle: NumpyIndex, kind: str
):
    engine, snapshot = engines[kind], engines[kind].snapshot
    queries = oracle.vectors[:6]
    near = {n for ids, _, _ in engines["flat"].nearest(queries, Search(k=200)) for n in ids}
    exclude = Exclude(key=True, sha256=True, hash_distance=1, entry_ids=tuple(near))
    search = Search(k=7, exclude=exclude, where={"size": "1"})
    identities = [Identity(e.key, e.sha256, e.perceptual_hash) for e in snapshot.entries(np.arange(6))]
    answers = engine.retrieve(queries, search, identities)
    for answer, own in zip(answers, identities, strict=True):
        assert len(answer.neighbours) == 7
        assert not near & {n.entry_id for n in answer.neighbours}
        for n in answer.neighbours:
            entry = snapshot.entry(n.entry_id)
            assert entry.metadata["size"] == 1
            assert entry.sha256 != own.sha256
    rare = Search(k=50, where={"colour": "green", "size": "2", "sharp": "true"}, exact=kind == "flat")
    assert engine.nearest(queries, rare) == engines["flat"].nearest(queries, rare) or kind in APPROXIMATE
    assert all(len(ids) == 50 for ids, _, _ in engine.nearest(queries, rare))


def test_a_guard_that_could_not_hold_is_refused(small: Engine):
    query = np.ones((1, D), np.float32)
    for exclude, missing in (
        (Exclude(key=True), "key"),
        (Exclude(sha256=True), "sha256"),
        (Exclude(hash_distance=3), "perceptual_hash"),
    ):
        for identities in ([], [Identity()]):
            message = f"excluded by {missing}, but that of query 0 is not known"
            with pytest.raises(InvalidInput, match=message):
                small.retrieve(query, Search(exclude=exclude), identities)
    for search, identities, what in (
        (Search(exclude=Exclude(hash_distance=65)), [], "0 to 64 bits"),
        (Search(), [Identity(sha256=b"short")], "has 5 bytes"),
        (Search(), [Identity(perceptual_hash=1 << 64)], "64 bits, unsigned"),
        (Search(), [Identity()] * 2, "2 identities for 1 queries"),
        (Search(exclude=Exclude(entry_ids=tuple(range(10_001)))), [], "at most 10000"),
        (Search(min_similarity=float("nan")), [], "min_similarity"),
        (Search(order="best"), [], "order is 'best'"),  # type: ignore[arg-type]
        (Search(nprobe=-1), [], "nprobe is -1"),
        (Search(ef_search=4096), [], "at most 2048"),
        (Search(where={str(i): "" for i in range(33)}), [], "names 33 fields"),
    ):
        with pytest.raises(InvalidInput, match=what):
            small.retrieve(query, search, identities)


def test_tags_come_in_the_order_asked_for_and_only_as_much_of_them(small: Engine):
    query = clustered(1, 3)
    [whole] = small.retrieve(query, Search(k=9))
    for order in ("votes", "similarity", "relevance"):
        [answer] = small.retrieve(query, Search(k=9, order=order))
        signals = {
            "votes": lambda t: -t.votes,
            "similarity": lambda t: -t.similarity,
            "relevance": lambda t: -t.relevance,
        }
        first = signals.pop(order)
        ranked = sorted(whole.tags, key=lambda t: (first(t), *(s(t) for s in signals.values()), t.tag_id))
        assert list(answer.tags) == ranked
    [bare] = small.retrieve(query, Search(k=9, with_neighbours=False, with_texts=False))
    assert bare.neighbours == ()
    assert [replace(t, tag="", neighbours=()) for t in whole.tags] == list(bare.tags)


def test_filters_are_kept_within_their_memory(small: Engine, monkeypatch):
    monkeypatch.setattr(filters, "FILTER_BYTES", 100)
    engine = Engine(small.snapshot)
    for i in range(5):
        engine.retrieve(np.ones((1, D), np.float32), Search(where={"size": str(i)}))
    assert len(engine._filters._kept) == 2


def test_tags_at_hand_are_let_go_when_they_are_too_many(small: Engine, monkeypatch):
    queries = clustered(30, 11)
    expected = small.retrieve(queries)
    monkeypatch.setattr(tag_votes, "TABLE_BYTES", 12 * (4 * D + 300))
    crowded = Engine(small.snapshot)
    assert crowded.retrieve(queries) == [crowded.retrieve(q[None])[0] for q in queries] == expected
    assert len(crowded._tags._rows.names) <= 18  # one query may need more than there is room for


def test_an_index_file_lends_the_stored_vectors_without_a_copy(
    root: Path, engines: dict[str, Engine], tmp_path: Path
):
    append(tmp_path, "s", clustered(900))
    delete(tmp_path, "s", Selection(keys=[f"k{i}" for i in range(0, 900, 7)]))
    append(tmp_path, "s", clustered(50, 78), "late")
    compact(tmp_path, "s")
    holes = Engine(append(tmp_path, "s", clustered(40, 77), "new"))
    assert any(part._ids is not None for part in holes.index.parts)
    for kind, engine in {**engines, "holes": holes}.items():
        ids = np.random.default_rng(0).permutation(engine.snapshot.live())[:300]
        assert engine._stored_vectors(ids).tobytes() == engine.snapshot.vectors(ids).tobytes()
        assert bool(engine._index_files) == (kind not in ("ivf", "ivfpq"))
        for part in engine._index_files:
            assert not part._codes.flags.owndata
            assert not part._codes.flags.writeable


def test_float16_is_widened_bit_for_bit():
    finite = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = finite[np.isfinite(finite)]
    np.testing.assert_array_equal(widened(finite).view(np.uint32), finite.astype(np.float32).view(np.uint32))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(*(st.integers(*bounds) for bounds in ((0, 400), (0, 400), (1, 450), (1, 9), (0, 2**32 - 1))))
def test_exact_search_over_any_run_and_any_set(
    small: Engine, first: int, end: int, k: int, n: int, seed: int
):
    rng = np.random.default_rng(seed)
    kept = rng.random(400) < rng.random()
    allowed = Allowed.of(np.packbits(kept, bitorder="little"))
    ids = np.flatnonzero(kept[: max(first, end)])
    ids = ids[ids >= first]
    queries = clustered(20, seed % 1000)[:n]
    got = exact.search(small.snapshot, queries, k, allowed, first, max(first, end))
    expected = NumpyIndex(small.snapshot.vectors(ids), ids).search(queries, k)
    there = got[1] >= 0
    assert (there.sum(axis=1) == expected.shape[1]).all()
    assert allowed.between(first, max(first, end)) == len(ids)
    if len(ids):
        vectors = small.snapshot.vectors(np.arange(400))
        ours = np.einsum("nd,nkd->nk", queries, vectors[got[1][:, : expected.shape[1]]])
        theirs = np.einsum("nd,nkd->nk", queries, vectors[expected])
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_exact_search_in_threads_and_with_merges(engines: dict[str, Engine], oracle: NumpyIndex, monkeypatch):
    monkeypatch.setattr(exact, "MAX_HELD", 1)
    monkeypatch.setattr(exact, "cores", lambda: 2)
    queries = clustered(20, 12)
    live = Allowed(engines["flat"].snapshot.array("live", np.uint8), N)
    ids = exact.search(engines["flat"].snapshot, queries, 50, live)[1]
    expected = similarities(oracle, queries, oracle.search(queries, 50))
    np.testing.assert_allclose(similarities(oracle, queries, ids), expected, atol=2e-6)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A store with a tuned index that a test may write to."""
    append(tmp_path, "s", clustered(900))
    build_index(tmp_path, "s", Budget(recall=0.9), kind="hnsw")
    return tmp_path


def test_what_comes_and_goes_beside_a_tuned_index_is_seen_at_once(copied: Path):
    first = Store(copied, "s").snapshot()
    assert first.version.index["stale"] == {"beside": 0.0, "dead": 0.0, "rebuild": False}
    new = clustered(40, 77)
    second = append(copied, "s", new, "new")
    assert [f["rows"] for f in second.version.index["files"]] == [900, 40]
    engine = Engine(second)
    assert [ids[0] for ids, _, _ in engine.nearest(new, Search(k=1))] == list(range(900, 940))
    assert engine.nearest(new, Search(k=1))[0] == engine.nearest(new[:1], Search(k=1))[0]
    delete(copied, "s", Selection(keys=[f"k{i}" for i in range(200)]))
    third = Engine(Store(copied, "s").snapshot())
    assert third.info().index["stale"] == {"beside": 0.0541, "dead": 0.2222, "rebuild": True}
    versions = CliRunner().invoke(cli, ["versions", f"file://{copied}/s"], env={"COLUMNS": "300"})
    assert "stale" in versions.stdout
    old = Store(copied, "s").snapshot(1)
    neighbours = third.nearest(old.vectors(np.arange(200)), Search(k=5))
    assert min(i for ids, _, _ in neighbours for i in ids) >= 200
    assert all(len(ids) == 5 for ids, _, _ in neighbours)
    rollback(copied, "s", 2)
    assert Engine(Store(copied, "s").snapshot()).nearest(new) == Engine(first).nearest(new)
    assert verify(copied, "s") == []


def test_compaction_tunes_again_and_repair_too(copied: Path):
    append(copied, "s", clustered(50, 78), "new")
    delete(copied, "s", Selection(keys=["k3"]))
    version = compact(copied, "s")
    [file] = version.index["files"]
    assert (version.index["kind"], file["plan"]["kind"], file["rows"]) == ("hnsw", "hnsw", 949)
    assert not version.index["stale"]["rebuild"]
    path = Store(copied, "s").index_directory / file["file"]
    path.write_bytes(path.read_bytes()[:-20] + bytes(20))
    assert verify(copied, "s")
    assert repair(copied, "s")
    assert verify(copied, "s") == []
    assert Store(copied, "s").snapshot().version.index["files"][0]["sha256"] == file["sha256"]


def test_many_small_commits_leave_a_tuned_file_alone(copied: Path):
    for i in range(6):
        snapshot = append(copied, "s", clustered(30, 100 + i), f"n{i}-")
    files = snapshot.version.index["files"]
    assert files[0]["rows"] == 900
    assert sum(f["rows"] for f in files[1:]) == 180
    assert len(files) <= 4
    assert FaissIndex(snapshot).search(clustered(5), 5).shape == (5, 5)


def test_the_same_store_gives_the_same_index(tmp_path: Path):
    digests = []
    for name in ("a", "b"):
        append(tmp_path, name, clustered(N))
        versions = [build_index(tmp_path, name, kind=kind).version for kind in ("hnsw", "ivf")]
        digests.append([version.index["files"][0]["sha256"] for version in versions])
    assert digests[0] == digests[1]


def test_build_index_picks_the_first_that_holds_the_budget(root: Path, tmp_path: Path):
    append(tmp_path, "s", clustered(2000))
    outcome = build_index(tmp_path, "s", Budget(latency=10))
    assert (outcome.chosen.plan.kind, outcome.chosen.recall) == ("flat", 1.0)
    assert outcome.version.index["recall"]["recall"] == 1.0
    assert outcome.version.index["files"][0]["rows"] == 2000
    assert Engine(Store(tmp_path, "s").snapshot()).info().index["kind"] == "flat"
    np.save(tmp_path / "q.npy", clustered(50, 4))
    outcome = build_index(tmp_path, "s", kind="ivf", queries=tmp_path / "q.npy")
    assert outcome.version.index["recall"]["source"] == "50 of q.npy"
    assert outcome.version.index["recall"]["recall"] >= 0.95
    assert verify(tmp_path, "s") == []
    assert [v.operation for v in Store(tmp_path, "s").versions()] == ["ingest", "build-index", "build-index"]


def test_a_budget_that_cannot_be_held_changes_nothing(tmp_path: Path):
    append(tmp_path, "s", clustered(1500))
    before = sorted(p.name for p in Store(tmp_path, "s").index_directory.iterdir())
    with pytest.raises(OverBudget, match=r"nothing was changed. The best found is \w+") as caught:
        build_index(tmp_path, "s", Budget(memory=1000, latency=1e-6))
    assert [t.plan.kind for t in caught.value.trials] == ["flat", "hnsw", "ivf", "ivfpq"]
    assert "more than 1,000" in caught.value.trials[0].verdict
    with pytest.raises(OverBudget, match=r"0\.001 ms"):
        build_index(tmp_path, "s", Budget(latency=1e-6), kind="hnsw")
    store = Store(tmp_path, "s")
    assert store.snapshot().version.number == 1
    assert sorted(p.name for p in store.index_directory.iterdir()) == before
    for budget in ({"recall": 0}, {"recall": 1.5}, {"k": 0}, {"memory": -1}, {"latency": -1}):
        with pytest.raises(InvalidInput):
            Budget(**budget)
    (tmp_path / "bad.npy").write_bytes(b"no array")
    np.save(tmp_path / "wrong.npy", np.ones((3, D + 1)))
    with pytest.raises(InvalidInput, match=r"no \.npy file"):
        build_index(tmp_path, "s", queries=tmp_path / "bad.npy")
    with pytest.raises(BadVector, match="store's vectors are"):
        build_index(tmp_path, "s", queries=tmp_path / "wrong.npy")
    with pytest.raises(InvalidInput, match="kind is 'best'"):
        build_index(tmp_path, "s", kind="best")


def test_the_command(tmp_path: Path):
    append(tmp_path, "s", clustered(800))
    url = f"file://{tmp_path}/s"
    options = "--kind hnsw --recall 0.8 --memory 1G --latency 5s --json"
    run = CliRunner().invoke(cli, ["build-index", url, *options.split()])
    assert run.exit_code == 0, run.output
    report = json.loads(run.stdout)
    assert report["version"] == 2
    assert report["index"]["recall"]["recall"] >= 0.8
    assert "building for 800 entries takes about" in run.stderr
    run = CliRunner().invoke(cli, ["build-index", url, "--latency", "1us", "--explain"])
    assert isinstance(run.exception, OverBudget)
    assert "verdict" in run.stdout
    for option, value in (("--memory", "much"), ("--latency", "5")):
        run = CliRunner().invoke(cli, ["build-index", url, option, value])
        assert isinstance(run.exception, InvalidInput)


@pytest.mark.parametrize("kind", VERSION)
def test_the_weight_of_a_file_is_known_before_it_is_built(root: Path, kind: str):
    [file] = Store(root, "large").snapshot(VERSION[kind]).version.index["files"]
    plan = faiss_index.plan_of(file["plan"]) if "plan" in file else plans.Plan("flat")
    assert plans.file_bytes(plan, N, D) == pytest.approx(file["bytes"], rel=0.1)


def test_verify_names_an_index_that_holds_other_vectors_than_the_store(tmp_path: Path):
    append(tmp_path, "s", clustered(300))
    with Writer(tmp_path, "s") as writer:
        assert writer.parent
        snapshot = Snapshot(writer.store, replace(writer.parent, number=2))
        blocks = snapshot.vector_blocks
        snapshot.vector_blocks = lambda ids: ((i, -rows) for i, rows in blocks(ids))  # type: ignore[method-assign]
        directory = writer.store.index_directory
        writer.replace_index(writer.parent, faiss_index.extend(snapshot, None, directory, whole=True))
    [problem] = verify(tmp_path, "s")
    assert "holds another vector for entry 0 than the store (300 such)" in problem.what
    assert repair(tmp_path, "s")
    assert verify(tmp_path, "s", full=True) == []


def test_compaction_leaves_the_answers_of_old_versions_alone(copied: Path) -> None:
    append(copied, "s", clustered(60, 78), "new")
    delete(copied, "s", Selection(keys=[f"k{i}" for i in range(100)]))
    queries = clustered(200, 5)

    def answers(version: int) -> list:
        engine = Engine(Store(copied, "s").snapshot(version))
        return [engine.info().index["kind"], engine.nearest(queries, Search(k=5))]

    expected = {version: answers(version) for version in (1, 2, 3, 4)}
    assert [expected[version][0] for version in (1, 2, 3)] == ["flat", "hnsw", "hnsw"]
    compact(copied, "s")
    assert {version: answers(version) for version in (1, 2, 3, 4)} == expected
    assert verify(copied, "s", full=True) == []
    # of a version that loses nothing a takedown keeps the kind, but no row of what was taken down
    purge(copied, "s", Selection(keys=["new3"]), reason="asked for")
    snapshot = Store(copied, "s").snapshot(2)
    assert snapshot.version.index["files"][0]["plan"]["kind"] == "hnsw"
    assert verify(copied, "s", full=True) == []
