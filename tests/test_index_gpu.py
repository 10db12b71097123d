"""The index on a GPU: refused with a clear message without one, and with one the answers of the CPU."""

from __future__ import annotations

import numpy as np
import pytest

from tagstore.errors import InvalidInput, MissingExtra
from tagstore.indexing import faiss_index, gpu
from tagstore.indexing.faiss_index import FaissIndex
from tagstore.mining import MergedTag
from tagstore.retrieval.engine import Engine
from tagstore.storage.staging import Draft
from tagstore.storage.store import Snapshot, Store
from tagstore.storage.writer import Writer
from tagstore.types import Exclude, Fingerprint, Search
from tagstore.upkeep.tuning import Budget, build_index

D, N = 64, 11_000
without = pytest.mark.skipif(gpu.devices() > 0, reason="this FAISS has a GPU")


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory) -> Snapshot:
    root = tmp_path_factory.mktemp("gpu")
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((N, D), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    tag = MergedTag("tag", "object", "tag", 1.0, 1, ())
    with Writer(root, "s", Fingerprint("toy", "00", {}, False, True, D)) as writer:
        writer.append([Draft(f"k{i}", bytes(32), 0, (), (tag,)) for i in range(N)], vectors)
        writer.embed_tags(np.eye(1, D, dtype=np.float32))
        writer.commit(operation="ingest", indexer=faiss_index.extend)
    return Store(root, "s").snapshot()


def test_devices_are_named_as_they_are_elsewhere():
    assert gpu.device_number("cpu") is None
    with pytest.raises(InvalidInput, match="auto, cpu, cuda or cuda:N"):
        gpu.device_number("tpu")


@without
def test_without_a_gpu_auto_is_the_cpu_and_cuda_says_what_is_missing(snapshot: Snapshot):
    assert gpu.device_number("auto") is None
    assert isinstance(Engine(snapshot, device="auto").index, FaissIndex)
    for device in ("cuda", "cuda:1"):
        with pytest.raises((MissingExtra, InvalidInput), match=r"CPU only|0 CUDA devices"):
            Engine(snapshot, device=device)


def test_what_does_not_fit_is_refused_before_it_is_loaded(snapshot: Snapshot, caplog):
    caplog.set_level("INFO")
    needed = gpu.required_bytes(FaissIndex(snapshot), snapshot)
    assert needed >= N * D * 2 + gpu.TEMPORARY
    gpu.check_fits(needed, needed, 0)
    assert "the index takes 0.5 GiB on cuda:0" in caplog.text
    with pytest.raises(
        InvalidInput, match=r"takes 0.5 GiB of device memory, cuda:0 has 0.1 GiB free: use --device cpu"
    ):
        gpu.check_fits(needed, 1 << 27, 0)


@pytest.mark.gpu
@pytest.mark.skipif(gpu.devices() == 0, reason="needs a CUDA device and faiss-gpu")
@pytest.mark.parametrize("kind", ["flat", "ivf", "ivfpq"])
def test_a_gpu_answers_as_the_cpu_does(snapshot: Snapshot, kind: str):
    build_index(snapshot.store.directory.parent, "s", Budget(recall=0.3), kind=kind)
    now = Store(snapshot.store.directory.parent, "s").snapshot()
    there, here = Engine(now, device="cuda:0"), Engine(now)
    assert there.info().index["kind"] == kind
    queries = now.vectors(np.arange(0, 3000, 7))
    same = [a == b for a, b in zip(there.nearest(queries), here.nearest(queries), strict=True)]
    assert all(same) if kind == "flat" else np.mean(same) > 0.8
    guarded = Search(k=5, exclude=Exclude(entry_ids=tuple(range(100))))
    assert all(len(ids) == 5 and min(ids) >= 100 for ids, _, _ in there.nearest(queries, guarded))
