import numpy as np
import pytest

from tagstore import convert
from tagstore.errors import BadVector
from tagstore.types import KINDS, Fingerprint, Neighbour, Retrieval, RetrievedTag, StoreInfo, TagInfo
from tagstore_proto.v1 import tagstore_pb2 as pb


def float32(value: float) -> float:
    return float(np.float32(value))


def test_a_retrieval_survives_the_wire() -> None:
    neighbours = (Neighbour("a", 7, float32(0.9)), Neighbour("ü/b", 1 << 40, float32(-0.1)))
    tags = tuple(RetrievedTag(i, f"t{i}", kind, float32(0.9), 2, float32(0.3), (7, 1 << 40)) for i, kind in enumerate(KINDS))
    retrieval = Retrieval("toy", 3, "abc", neighbours, tags)
    wire = pb.RetrieveResponse(store="toy", version=3, fingerprint="abc", retrievals=[convert.retrieval_to_proto(retrieval)])
    assert convert.retrievals_from_proto(pb.RetrieveResponse.FromString(wire.SerializeToString())) == [retrieval]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_vectors_survive_the_wire_as_they_are(dtype: type, rng: np.random.Generator) -> None:
    vectors = rng.standard_normal((5, 8)).astype(dtype)
    back = convert.vectors_from_proto(convert.vectors_to_proto(vectors))
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, vectors)


@pytest.mark.parametrize(
    ("data", "dimension", "dtype"), [(b"123", 1, 1), (b"", 0, 1), (b"1234", 0, 1), (b"12345678", 2, 99), (b"12", 2, 2)]
)
def test_bytes_that_are_no_vectors_are_refused(data: bytes, dimension: int, dtype: int) -> None:
    with pytest.raises(BadVector):
        convert.vectors_from_proto(pb.Vectors(data=data, dimension=dimension, dtype=dtype))


def test_store_and_tags_survive_the_wire() -> None:
    fingerprint = Fingerprint("mini", "aa", {"size": [224, 224], "mean": [0.5, 0.5, 0.5]}, False, True, 8)
    info = StoreInfo("toy", 2, 10, 30, 20, fingerprint, {"kind": "flat", "bytes": 12}, "2026-01-01T00:00:00+00:00")
    back = convert.info_from_proto(convert.info_to_proto(info))
    assert back == info
    assert back.fingerprint.digest == fingerprint.digest
    tags = [TagInfo(1, "dog", "object", 3), TagInfo(2, "blue sky", "attribute", 1)]
    assert convert.tags_from_proto(pb.GetTagsResponse(tags=convert.tags_to_proto(tags))) == tags
