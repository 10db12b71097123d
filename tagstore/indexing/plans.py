"""The kinds of index files: their FAISS structures, how they are trained, filled and searched, their size.

flat     exact; float16 codes, the numbers that the store keeps
flat32   exact; float32
hnsw     a graph over float16 codes: the fastest, and the largest
ivf      float16 codes in lists; a search visits the nearest lists
ivfpq    rotated vectors in lists, one byte for eight dimensions: the smallest; candidates are re-ranked
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import faiss
import numpy as np
from numpy.typing import NDArray

from tagstore.errors import InvalidInput
from tagstore.types import Search, Vectors

IndexKind = Literal["flat", "flat32", "hnsw", "ivf", "ivfpq"]
INDEX_KINDS: tuple[IndexKind, ...] = get_args(IndexKind)

SEED = 20406
"""Seed of all training, so that the same vectors give the same index."""
TRAIN_ROWS = 1 << 17
"""Vectors that lists are learned from at most: 256 MiB at 512 dimensions."""
ROTATE_ROWS = 1 << 14
"""Vectors that a rotation and its codes are learned from at most."""
MIN_ROWS_PER_LIST = 39
"""Vectors that FAISS wants to learn a list, or a code of a byte, from."""
MAX_EF = 2048
"""Nodes of a graph that a search keeps in view at most."""
MAX_REFINE = 64
"""Candidates for every neighbour asked for at most."""
ADD_ROWS = 4096
"""Vectors added to an index at a time."""

Blocks = Callable[[NDArray[np.int64]], Iterator[tuple[NDArray[np.int64], Vectors]]]
"""Ascending ids and their vectors, in pieces: `Snapshot.vector_blocks`."""
Advance = Callable[[str, int], None]
"""Called with the name of a stage and how many rows it has done since."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A kind of index with its parameters."""

    kind: IndexKind
    build: Mapping[str, int] = field(default_factory=dict)
    """Parameters of the file: `links`, `ef_construction`; `lists`; `bytes`."""
    search: Mapping[str, int] = field(default_factory=dict)
    """Defaults of a search: `ef_search`; `nprobe`; `refine`, candidates for every neighbour asked for."""

    @property
    def exact(self) -> bool:
        """Whether a search finds the true nearest neighbours."""
        return self.kind in ("flat", "flat32")

    def as_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "build": dict(self.build), "search": dict(self.search)}


def plan_for(kind: IndexKind, rows: int, dimension: int) -> Plan:
    """The default plan of a kind.

    Raises `InvalidInput` for too few rows, or a dimension that the kind cannot code.
    """
    lists = max(1, 1 << round(np.log2(max(1, 4 * np.sqrt(rows))))) if rows else 1
    if kind in ("flat", "flat32"):
        return Plan(kind)
    if kind == "hnsw":
        return Plan(kind, {"links": 32, "ef_construction": 80}, {"ef_search": 64})
    if rows < 16 * MIN_ROWS_PER_LIST:
        raise InvalidInput(
            f"{rows} entries are too few to learn lists from: at least {16 * MIN_ROWS_PER_LIST}. Take flat "
            "or hnsw"
        )
    lists = min(lists, rows // MIN_ROWS_PER_LIST)
    if kind == "ivf":
        return Plan(kind, {"lists": lists}, {"nprobe": 8})
    if dimension % 8 or rows < 256 * MIN_ROWS_PER_LIST:
        raise InvalidInput(
            f"ivfpq needs a dimension that 8 divides, and {256 * MIN_ROWS_PER_LIST} entries: here are "
            f"{dimension} and {rows}"
        )
    return Plan(kind, {"lists": lists, "bytes": dimension // 8}, {"nprobe": 8, "refine": 8})


def file_bytes(plan: Plan, rows: int, dimension: int) -> int:
    """Estimate the bytes of the index file, all in memory on a busy server; within a few percent."""
    ids = 8 * rows
    match plan.kind:
        case "flat":
            return rows * dimension * 2 + ids
        case "flat32":
            return rows * dimension * 4 + ids
        case "hnsw":
            # twice the links at the lowest level, 4 bytes each; the levels above hold one node in `links`
            return rows * (dimension * 2 + 4 * (2 * plan.build["links"] + 2) + 12) + ids
        case "ivf":
            return rows * dimension * 2 + ids + plan.build["lists"] * dimension * 4
        case "ivfpq":
            return (
                rows * plan.build["bytes"]
                + ids
                + plan.build["lists"] * dimension * 4
                + dimension * dimension * 4
                + 1024 * dimension
            )


def build(
    plan: Plan,
    ids: NDArray[np.int64],
    dimension: int,
    blocks: Blocks,
    advance: Advance,
    held_out: NDArray[np.int64],
    gpu: int | None = None,
) -> Any:
    """Build the FAISS index of a plan over entries. With one thread the result is the same on every machine.

    Args:
        held_out: entries of the index that nothing is learned from.
        gpu: number of a CUDA device to learn lists on; the result differs from the CPU's and is as good.
    """
    index = _empty(plan, dimension)
    if gpu is not None and "lists" in plan.build:
        lists = faiss.extract_index_ivf(index)
        lists.clustering_index = faiss.index_cpu_to_gpu(
            faiss.StandardGpuResources(), gpu, faiss.IndexFlatIP(dimension)
        )
    if plan.kind in ("ivf", "ivfpq"):
        rng = np.random.default_rng(SEED)
        free = np.setdiff1d(ids, held_out)
        train = np.sort(rng.choice(free, min(len(free), TRAIN_ROWS), replace=False))
        sample = np.concatenate([rows for _, rows in blocks(train)])
        advance("train", 0)
        index.train(sample)
        advance("train", len(sample))
        if gpu is not None:
            faiss.extract_index_ivf(index).clustering_index = None
    for block_ids, rows in blocks(ids):
        for start in range(0, len(block_ids), ADD_ROWS):
            batch = slice(start, start + ADD_ROWS)
            index.add_with_ids(rows[batch], block_ids[batch])
            advance("add", len(block_ids[batch]))
    return index


def _empty(plan: Plan, d: int) -> Any:
    product, half = faiss.METRIC_INNER_PRODUCT, faiss.ScalarQuantizer.QT_fp16
    if plan.kind == "flat":
        return faiss.IndexIDMap(faiss.IndexScalarQuantizer(d, half, product))
    if plan.kind == "flat32":
        return faiss.IndexIDMap(faiss.IndexFlatIP(d))
    if plan.kind == "hnsw":
        graph = faiss.IndexHNSWSQ(d, half, plan.build["links"], product)
        graph.hnsw.efConstruction = plan.build["ef_construction"]
        graph.is_trained = True  # float16 codes have nothing to learn
        return faiss.IndexIDMap(graph)
    coarse = faiss.IndexFlatIP(d)
    if plan.kind == "ivf":
        lists = faiss.IndexIVFScalarQuantizer(coarse, d, plan.build["lists"], half, product, False)
    else:
        lists = faiss.IndexIVFPQ(coarse, d, plan.build["lists"], plan.build["bytes"], 8, product)
        lists.pq.cp.seed, lists.pq.cp.niter = SEED, 15
        lists.pq.cp.max_points_per_centroid = ROTATE_ROWS // 256
    lists.cp.seed, lists.cp.niter = SEED, 10
    lists.cp.spherical = True
    lists.own_fields = True
    coarse.this.disown()
    if plan.kind == "ivf":
        return lists
    rotation = faiss.OPQMatrix(d, plan.build["bytes"])
    rotation.niter, rotation.max_train_points = 10, ROTATE_ROWS
    index = faiss.IndexPreTransform(rotation, lists)
    index.own_fields = True
    lists.this.disown()
    rotation.this.disown()
    return index


def candidates(plan: Plan, k: int) -> int:
    """How many candidates to ask of a file, so that `k` are left after re-ranking."""
    return k * min(MAX_REFINE, plan.search.get("refine", 1))


def parameters(plan: Plan, search: Search, k: int, share: float, selector: Any) -> Any:
    """The FAISS parameters of a search; with a selector only of one, since FAISS writes into them.

    Args:
        k: the number that `candidates` gives.
        share: share of the file's entries that may be found; the smaller, the more a search has to visit.
    """
    if plan.exact:
        return faiss.SearchParameters(sel=selector)
    if plan.kind == "hnsw":
        ef = search.ef_search or plan.search["ef_search"]
        return faiss.SearchParametersHNSW(efSearch=min(max(MAX_EF, k), max(k, int(ef / share))), sel=selector)
    nprobe = min(plan.build["lists"], max(1, int((search.nprobe or plan.search["nprobe"]) / share)))
    inner = faiss.SearchParametersIVF(nprobe=nprobe, sel=selector)
    return inner if plan.kind == "ivf" else faiss.SearchParametersPreTransform(index_params=inner)


def ids_of(plan: Plan, index: Any) -> NDArray[np.int64]:
    """The entry ids of a file, in its own order."""
    if holds_vectors(plan):
        ids: NDArray[np.int64] = faiss.vector_to_array(index.id_map)
        return ids
    lists = faiss.extract_index_ivf(index).invlists
    sizes = [lists.list_size(i) for i in range(lists.nlist)]
    parts = [faiss.rev_swig_ptr(lists.get_ids(i), n).copy() for i, n in enumerate(sizes) if n]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def holds_vectors(plan: Plan) -> bool:
    """Whether a file of this kind holds the stored vectors, in the order of `ids_of`."""
    return plan.kind in ("flat", "flat32", "hnsw")


def codes_of(plan: Plan, index: Any) -> NDArray[np.void]:
    """The vectors of a kind that holds them, `[rows]` items of bytes: float32 for flat32, else float16.

    A view of the mapped file, not a copy: valid as long as the index is, and not aligned.
    """
    storage = _storage(plan, index)
    codes: NDArray[np.void] = faiss.rev_swig_ptr(storage.codes.data(), storage.codes.size()).view(
        f"V{storage.code_size}"
    )
    codes.flags.writeable = False
    return codes


def _storage(plan: Plan, index: Any) -> Any:
    inner = faiss.downcast_index(index.index)
    return faiss.downcast_index(inner.storage) if plan.kind == "hnsw" else inner
