from dataclasses import replace

import numpy as np
import pytest

from tagstore import errors
from tagstore.errors import BadVector
from tagstore.types import (
    KINDS,
    Exclude,
    Fingerprint,
    Identity,
    Neighbour,
    Retrieval,
    RetrievedTag,
    Search,
    StoreInfo,
    TagInfo,
)
from tagstore.wire import convert, status
from tagstore_proto.v1 import tagstore_pb2 as pb


def float32(value: float) -> float:
    return float(np.float32(value))


def test_a_retrieval_survives_the_wire() -> None:
    neighbours = (Neighbour("a", 7, float32(0.9)), Neighbour("ü/b", 1 << 40, float32(-0.1)))
    tags = tuple(
        RetrievedTag(i, f"t{i}", kind, float32(0.9), 2, float32(0.3), (7, 1 << 40))
        for i, kind in enumerate(KINDS)
    )
    retrieval = Retrieval("toy", 3, "abc", neighbours, tags)
    wire = pb.RetrieveResponse(
        store="toy", version=3, fingerprint="abc", retrievals=[convert.retrieval_to_proto(retrieval)]
    )
    assert convert.retrievals_from_proto(pb.RetrieveResponse.FromString(wire.SerializeToString())) == [
        retrieval
    ]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_vectors_survive_the_wire_as_they_are(dtype: type, rng: np.random.Generator) -> None:
    vectors = rng.standard_normal((5, 8)).astype(dtype)
    back = convert.vectors_from_proto(convert.vectors_to_proto(vectors))
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, vectors)


@pytest.mark.parametrize(
    ("data", "dimension", "dtype"),
    [(b"123", 1, 1), (b"", 0, 1), (b"1234", 0, 1), (b"12345678", 2, 99), (b"12", 2, 2)],
)
def test_bytes_that_are_no_vectors_are_refused(data: bytes, dimension: int, dtype: int) -> None:
    with pytest.raises(BadVector):
        convert.vectors_from_proto(pb.Vectors(data=data, dimension=dimension, dtype=dtype))


def test_store_and_tags_survive_the_wire() -> None:
    fingerprint = Fingerprint("mini", "aa", {"size": [224, 224], "mean": [0.5, 0.5, 0.5]}, False, True, 8)
    info = StoreInfo(
        "toy", 2, 10, 30, 20, fingerprint, {"kind": "flat", "bytes": 12}, "2026-01-01T00:00:00+00:00"
    )
    back = convert.info_from_proto(convert.info_to_proto(info))
    assert back == info
    assert back.fingerprint.digest == fingerprint.digest
    tags = [TagInfo(1, "dog", "object", 3), TagInfo(2, "blue sky", "attribute", 1)]
    assert convert.tags_from_proto(pb.GetTagsResponse(tags=convert.tags_to_proto(tags))) == tags


EXCLUDE = Exclude(key=True, sha256=True, hash_distance=0, keys=("a", "ü"), entry_ids=(1 << 40, 0))


@pytest.mark.parametrize(
    "search",
    [
        Search(),
        Search(
            k=1000,
            max_tags=7,
            min_similarity=float32(0.3),
            order="relevance",
            where={"brand": "Oatly", "": ""},
            exclude=EXCLUDE,
        ),
        Search(
            exclude=Exclude(hash_distance=64),
            order="similarity",
            exact=True,
            with_neighbours=False,
            with_texts=False,
        ),
        Search(nprobe=9, ef_search=128, min_similarity=0.0, exclude=Exclude(keys=("x",))),
    ],
)
def test_the_options_of_a_request_survive_the_wire(search: Search) -> None:
    identities = [Identity(), Identity("key", b"\1" * 32, 0), Identity("", b"", (1 << 64) - 1)]
    request = pb.RetrieveRequest()
    convert.search_to_proto(request, search, identities)
    back = pb.RetrieveRequest.FromString(request.SerializeToString())
    assert convert.search_from_proto(back) == search
    assert convert.queries_from_proto(back, 4)[1] == identities


def test_an_empty_request_asks_for_the_defaults() -> None:
    assert convert.search_from_proto(pb.RetrieveRequest()) == Search()


@pytest.mark.parametrize(
    "search", [Search(k=-1), Search(max_tags=1 << 32), Search(order="age"), Search(nprobe=-2)]
)  # type: ignore[arg-type]
def test_options_that_the_wire_cannot_carry_are_refused(search: Search) -> None:
    with pytest.raises(errors.InvalidInput, match=r"k is -1|max_tags is|order 'age'|nprobe is -2"):
        convert.search_to_proto(pb.RetrieveRequest(), search)


def test_an_order_that_is_none_is_refused() -> None:
    with pytest.raises(errors.InvalidInput, match="order 77"):
        convert.search_from_proto(pb.RetrieveRequest(order=77))


@pytest.mark.parametrize(
    "error",
    [
        errors.Overloaded("full", 0.25),
        errors.NotFound("no store"),
        errors.NotPermitted("may not"),
        errors.Busy("held"),
        BadVector("x"),
    ],
)
def test_errors_survive_the_wire(error: errors.TagstoreError) -> None:
    back = status.error_from_proto(status.error_to_proto(error))
    assert type(back) in type(error).__mro__
    assert type(back) is not errors.TagstoreError
    assert str(back) == str(error)
    assert getattr(back, "retry_after", None) == getattr(error, "retry_after", None)
    assert status.retry_after_of(status.trailing(error)) == status.retry_after_ms(error)


def test_an_unknown_status_is_still_an_error() -> None:
    assert type(status.error_from_proto(pb.Error(code=4711, message="odd"))) is errors.TagstoreError


def test_former_names_of_options_still_work_and_warn() -> None:
    with pytest.warns(DeprecationWarning, match="Search.neighbours is now called with_neighbours"):
        search = Search(k=3, neighbours=False)  # type: ignore[call-arg]
    assert search == Search(k=3, with_neighbours=False)
    with pytest.warns(DeprecationWarning, match="Search.texts is now called with_texts"):
        assert replace(search, texts=False).with_texts is False
    with pytest.warns(
        DeprecationWarning, match="Exclude.perceptual_hash is now called hash_distance"
    ) as caught:
        assert Exclude(hash_distance=4).perceptual_hash == 4  # type: ignore[attr-defined]
    assert caught[0].filename == __file__
    with pytest.raises(TypeError, match="unexpected keyword argument 'neighbors'"):
        Search(neighbors=False)  # type: ignore[call-arg]
