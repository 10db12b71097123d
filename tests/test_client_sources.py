"""Options in code and URL, arguments of the leak guard, caches, controls, pins, and the asyncio client."""

from __future__ import annotations

import asyncio
import multiprocessing
import pickle
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from pictures import COLOURS, picture
from tagstore import errors
from tagstore.client import aio, connect, require
from tagstore.client.urls import locate
from tagstore.types import Exclude, Identity, Search

IMAGES = [picture(colour, "circle", shift=2) for colour in COLOURS]


@pytest.fixture
def url(server_address: str) -> str:
    return f"grpc://{server_address}/shapes"


def test_options_in_code_and_url_mean_the_same_and_code_wins(url: str):
    query = "k=3&max_tags=2&min_similarity=0.25&order=relevance&exact=true"
    in_url = connect(f"{url}?{query}&exclude=self&where.brand=Oatly&on_failure=empty")
    options = {"k": 3, "max_tags": 2, "min_similarity": 0.25, "order": "relevance", "exact": True}
    in_code = connect(url, **options, exclude="self", where={"brand": "Oatly"}, on_failure="empty")
    assert in_url.options == in_code.options
    assert in_url.options.search == Search(3, 2, 0.25, "relevance", {"brand": "Oatly"}, exact=True)
    assert connect(f"{url}?k=3", k=4).options.search.k == 4
    assert locate(f"{url}@7?k=2").version == 7


def test_former_names_of_options_mean_the_same(url: str):
    options = connect(url, with_neighbours=False, with_texts=False).options
    with pytest.warns(DeprecationWarning, match="with_neighbours"):
        assert connect(f"{url}?neighbours=false&texts=false").options == options
    with pytest.warns(DeprecationWarning, match="with_texts"):
        assert connect(url, neighbours=False, texts=False).options == options


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("kk=3", "'kk' is no option"),
        ("k=x", "k=x: write a whole number"),
        ("exact=maybe", "true or false"),
        ("timeout=0", "timeout cannot be"),
        ("on_failure=ignore", "'raise' or 'empty'"),
        ("exclude=others", "self or none"),
        ("exclude_keys=a", "pass it in code"),
        ("where=a", r"where\.FIELD=VALUE"),
        ("token=secret", "logged"),
        ("exclude_distance=65", "64 bits"),
    ],
)
def test_meaningless_options_are_refused_by_name(url: str, query: str, message: str):
    with pytest.raises(errors.InvalidInput, match=message):
        connect(f"{url}?{query}")


def test_unknown_options_in_code_are_refused_by_name(url: str):
    with pytest.raises(errors.InvalidInput, match="no option 'kk'"):
        connect(url, kk=3)
    message = "retrieve takes no option 'timeout'"
    with connect(url) as source, pytest.raises(errors.InvalidInput, match=message):
        source.retrieve([IMAGES[0]], timeout=3)


@pytest.mark.parametrize(
    "bad",
    [
        "grpc://a:1,b/x",
        "grpc://a:0/x",
        "grpc://a:1,,b:2/x",
        "replay://",
        "random://",
        "random+null://",
        "null+grpc://a:1/x",
        "grpc://a:1/x@y",
    ],
)
def test_meaningless_urls_are_refused(bad: str):
    with pytest.raises(errors.InvalidInput):
        connect(bad)


def test_every_search_option_reaches_the_store(url: str):
    images = [picture("red", "circle")]
    with connect(url) as source:
        [plain] = source.retrieve(images, k=4)
        options = {"with_neighbours": False, "with_texts": False, "max_tags": 3, "order": "similarity"}
        [bare] = source.retrieve(images, k=4, **options)
        assert (plain.neighbours[0].key, bare.neighbours, len(bare)) == ("red-circle", (), 3)
        assert {t.tag for t in bare} == {""}
        assert source.retrieve(images, min_similarity=0.999)[0].neighbours == plain.neighbours[:1]
        assert source.retrieve(images, where={"no": "such"})[0].neighbours == ()
        exclude = Exclude(entry_ids=(plain.neighbours[0].entry_id,))
        [guarded] = source.retrieve(images, k=4, exclude=exclude)
        assert guarded.neighbours[:3] == plain.neighbours[1:]
        assert guarded.excluded == 1


def test_self_is_known_by_key_by_image_and_by_what_an_identity_says(url: str, mini):
    from tagstore.encoding.images import decode, perceptual_hash

    data = picture("red", "circle")
    own = decode(data)
    vector = mini.encode_images([own])
    by_vector = {"vectors": vector, "fingerprint": mini.fingerprint}
    by_hash = Identity(perceptual_hash=perceptual_hash(own))
    with connect(url, k=18, exclude="self", exclude_distance=-1) as source:
        cases = [
            source.retrieve([data]),
            source.retrieve([picture("red", "circle", size=90)], keys=["red-circle"]),
            source.retrieve(**by_vector, keys=["red-circle"]),
            source.retrieve(**by_vector, identities=[Identity(sha256=sha256(data).digest())]),
            source.retrieve(**by_vector, identities=[by_hash], exclude_distance=0),
            source.retrieve(**by_vector, exclude=None, exclude_keys=["red-circle"]),
        ]
        for [answer] in cases:
            assert "red-circle" not in [n.key for n in answer.neighbours]
            assert answer.excluded >= 1
        assert source.stats().guarded == len(cases)
        with pytest.raises(errors.InvalidInput, match="pass keys= or identities="):
            source.retrieve(**by_vector)
        with pytest.raises(errors.InvalidInput, match="1 keys for 2 queries"):
            source.retrieve([data, data], keys=["red-circle"])
        with pytest.raises(errors.InvalidInput, match="keys is a list"):
            source.retrieve([data], keys="red-circle")


def test_a_pin_stays_and_travels(url: str):
    source = connect(url)
    pin = source.pin()
    assert (str(pin), pin.fingerprint) == ("shapes@1", source.info().fingerprint)
    assert "at version 1" in repr(source)
    assert pickle.loads(pickle.dumps(source))._version == 1
    with pytest.raises(errors.NotFound):
        source.pin(9)
    assert source.pin(1) == pin
    source.close()


def test_embeddings_are_asked_for_once_and_cannot_be_changed(url: str):
    with connect(url, embedding_cache=8) as source:
        ids = [t.tag_id for t in source.vocabulary()][:6]
        first = source.tags([*ids, ids[0]], embeddings=True)
        requests = source.stats().requests
        again = source.tags(ids[::-1], embeddings=True)
        assert source.stats().requests == requests
        assert [t.tag_id for t in again] == ids[::-1]
        assert again[0] is first[5]
        assert first[0] is first[6]
        assert (source.stats().embedding_hits, source.stats().embedding_misses) == (7, 6)
        assert source.stats().embedding_hit_rate == 7 / 13
        with pytest.raises(ValueError, match="read-only"):
            first[0].embedding[0] = 1
        vocabulary = [t.tag_id for t in source.vocabulary()]
        assert len(source.tags(vocabulary, embeddings=True)) == len(vocabulary)
        assert len(source._embedded) == 8
    with connect(url, embedding_cache=0) as source:
        first, again = (source.tags(ids, embeddings=True) for _ in range(2))
        np.testing.assert_array_equal(first[5].embedding, again[5].embedding)
        assert source.stats().embedding_hits == 0


def test_embeddings_of_an_answer_come_in_the_order_of_its_tags(url: str):
    with connect(url) as source:
        [answer] = source.retrieve(IMAGES[:1], preload=True)
        requests = source.stats().requests
        rows = source.embeddings(answer)
        assert source.stats().requests == requests
        tags = source.tags([t.tag_id for t in answer], embeddings=True)
        np.testing.assert_array_equal(rows, [tag.embedding for tag in tags])
        [nothing] = source.retrieve(IMAGES[:1], where={"no": "such"})
        assert len(source.embeddings(nothing)) == 0


def test_answers_of_another_store_or_version_are_refused(url: str):
    with connect(url) as source, connect(f"random+{url}") as control, connect("null://") as nothing:
        answers = source.retrieve(IMAGES[:2])
        require(answers)
        require(answers, "shapes", 1)
        for store, version in (("flickr8k", 0), ("shapes", 7), ("", 7)):
            with pytest.raises(errors.InvalidInput, match=r"required, and shapes@1 answered"):
                require(answers, store, version)
        require([*control.retrieve(IMAGES[:1]), *nothing.retrieve(IMAGES[:1])], "flickr8k", 7)


def _cached(source) -> tuple[int, int, list]:
    before = source.stats()
    answers = source.retrieve(IMAGES, keys=list(COLOURS))
    after = source.stats()
    return after.cache_hits - before.cache_hits, after.requests - before.requests, answers


def test_answers_are_kept_on_disk_and_shared_by_processes(url: str, tmp_path: Path, mini):
    with connect(url, cache=str(tmp_path / "cache"), k=3) as source:
        with pytest.raises(errors.InvalidInput, match="call pin"):
            source.retrieve(IMAGES)
        source.pin()
        hits, requests, fresh = _cached(source)
        assert (hits, requests) == (0, 1)
        assert _cached(source) == (len(IMAGES), 0, fresh)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert pool.apply(_cached, (source,)) == (len(IMAGES), 0, fresh)
        # another option, another image, another guard: another answer
        assert source.retrieve(IMAGES[:1], k=2) != fresh[:1]
        mixed = source.retrieve([IMAGES[0], picture("red", "square"), IMAGES[1]])
        assert [mixed[0], mixed[2]] == fresh[:2]
        keys = ["red-circle", "blue-circle"]
        guarded = source.retrieve([picture("red", "circle")] * 2, exclude=Exclude(key=True), keys=keys)
        assert guarded[0] != guarded[1]
        vectors = np.random.default_rng(0).standard_normal((4, mini.dimension)).astype(np.float32)
        both_answers = [source.retrieve(vectors=vectors, fingerprint=mini.fingerprint) for _ in range(2)]
        assert both_answers[0] == both_answers[1]
        assert 0 < source.stats().cache_hit_rate < 1
    with connect(url) as plain:
        assert plain.retrieve(IMAGES, k=3) == fresh


def test_a_full_cache_drops_some_and_a_damaged_answer_is_asked_again(url: str, tmp_path: Path, mini):
    import lmdb

    vectors = np.random.default_rng(0).standard_normal((600, mini.dimension)).astype(np.float32)
    with connect(url, cache=str(tmp_path / "cache"), cache_bytes=1 << 20, k=18) as source:
        source.pin()
        first = source.retrieve(vectors=vectors, fingerprint=mini.fingerprint)
        for _ in range(3):
            assert source.retrieve(vectors=vectors, fingerprint=mini.fingerprint) == first
        assert source.stats().cache_hits > 600
        assert (tmp_path / "cache" / "data.mdb").stat().st_size <= 2 << 20
    with lmdb.open(str(tmp_path / "cache"), map_size=1 << 22) as env, env.begin(write=True) as txn:
        damaged = [key for key, _ in txn.cursor()]
        assert damaged
        for key in damaged:
            txn.put(key, txn.get(key)[:-1] + b"?")
    with connect(url, cache=str(tmp_path / "cache"), cache_bytes=1 << 22, k=18) as source:
        source.pin()
        assert source.retrieve(vectors=vectors[:100], fingerprint=mini.fingerprint) == first[:100]
        assert source.stats().cache_hits == 0


def test_no_tags_and_random_tags(url: str, tmp_path: Path):
    with connect("null://") as null:
        assert [list(a) for a in null.retrieve(IMAGES)] == [[]] * len(IMAGES)
        assert not null.retrieve(IMAGES)[0].degraded
        assert (null.tags([]), list(null.vocabulary()), null.info().entries) == ([], [], 0)
    with connect(url) as store:
        vocabulary = {t.tag_id: t.text for t in store.vocabulary()}
    drawn = {}
    for seed in (1, 2):
        with connect(f"random+{url}?seed={seed}&tags=5") as source:
            drawn[seed] = source.retrieve(IMAGES)
            assert source.retrieve(IMAGES[3:4]) == drawn[seed][3:4]
            assert len(source.retrieve(IMAGES, max_tags=2)[0]) == 2
            [tag] = source.tags([drawn[seed][0][0].tag_id], embeddings=True)
            assert tag.text == drawn[seed][0][0].tag
            assert tag.embedding.shape == (source.info().fingerprint.dimension,)
            assert source.retrieve(IMAGES[:1], keys=["a"]) == source.retrieve(IMAGES[1:2], keys=["a"])
    assert drawn[1] != drawn[2]
    for answer in drawn[1]:
        assert len({t.tag_id for t in answer}) == 5
        assert all(vocabulary[t.tag_id] == t.tag for t in answer)
    (tmp_path / "tags.txt").write_text("blue sky\tattribute\ndog\ncat\n")
    with connect(f"random://{tmp_path / 'tags.txt'}?tags=2") as source:
        assert {t.tag for t in source.retrieve(IMAGES)[0]} <= {"blue sky", "dog", "cat"}
        with pytest.raises(errors.InvalidInput, match="no embeddings"):
            source.tags([0], embeddings=True)


async def test_the_asyncio_client_gives_the_same(url: str, shapes_root: Path):
    with connect(url, k=3) as source:
        expected = source.retrieve(IMAGES * 8, keys=list(COLOURS) * 8, exclude="self")
        vocabulary = list(source.vocabulary())
    async with aio.connect(url, k=3) as source:
        assert await source.retrieve(IMAGES * 8, keys=list(COLOURS) * 8, exclude="self") == expected
        queries = zip(IMAGES, COLOURS, strict=True)
        several = await asyncio.gather(
            *(source.retrieve([data], keys=[key], exclude="self") for data, key in queries)
        )
        assert [a for [a] in several] == expected[: len(IMAGES)]
        assert [t async for t in source.vocabulary()] == vocabulary
        assert await source.tags([1, 2]) == [t for t in vocabulary if t.tag_id in (1, 2)]
        assert (await source.pin()).version == (await source.info()).version == 1
        copy = pickle.loads(pickle.dumps(source))
        assert await copy.retrieve(IMAGES[:1]) == await source.retrieve(IMAGES[:1])
        await copy.close()
    for other in ("null://", f"file://{shapes_root}/shapes"):
        async with aio.connect(other) as source:
            assert len(await source.retrieve(IMAGES[:1])) == 1


def test_an_event_loop_that_ended_leaves_a_source_usable(url: str):
    source = aio.connect(url)
    for _ in range(2):
        assert asyncio.run(source.retrieve(IMAGES[:1]))[0].version == 1
