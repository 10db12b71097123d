"""The kinds of index files: what FAISS structure each is, how it is trained, filled, searched, and what it weighs.

flat     exact; float16 codes, the very numbers the store keeps
flat32   exact; float32
hnsw     a graph over float16 codes: fastest, and needs the most memory
ivf      float16 codes in lists, of which a search visits the nearest
ivfpq    rotated vectors of one byte for eight dimensions, in lists: a sixteenth of the memory, and a re-ranking of what it finds
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
TRAIN_ROWS = 1 << 17
"""Vectors that lists are learned from at most: 256 MiB at 512 dimensions."""
ROTATE_ROWS = 1 << 14
"""Vectors that a rotation and its bytes are learned from at most."""
MAX_EF, MAX_REFINE = 2048, 64

Blocks = Callable[[NDArray[np.int64]], Iterator[tuple[NDArray[np.int64], Vectors]]]
"""Ascending ids and their vectors, in pieces: `Snapshot.vector_blocks`."""
Advance = Callable[[str, int], None]
"""Called with what is done and how many rows more."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A kind of index with its numbers."""

    kind: IndexKind
    build: Mapping[str, int] = field(default_factory=dict)
    """What the file is made with: `links`, `ef_construction`; `lists`; `bytes`."""
    search: Mapping[str, int] = field(default_factory=dict)
    """What a request gets that asks for nothing else: `ef_search`; `nprobe`; `refine`, candidates for every neighbour asked for."""

    @property
    def exact(self) -> bool:
        return self.kind in ("flat", "flat32")

    def as_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "build": dict(self.build), "search": dict(self.search)}


def plan_for(kind: IndexKind, rows: int, dimension: int) -> Plan:
    """The usual plan of a kind for so many rows. Raises `InvalidInput` for too few of them, or a dimension that has no such codes."""
    lists = max(1, 1 << round(np.log2(max(1, 4 * np.sqrt(rows))))) if rows else 1
    if kind in ("flat", "flat32"):
        return Plan(kind)
    if kind == "hnsw":
        return Plan(kind, {"links": 32, "ef_construction": 80}, {"ef_search": 64})
    if rows < 39 * 16:
        raise InvalidInput(
            f"{rows} entries are too few to learn lists from: at least {39 * 16}. Take flat or hnsw"
        )
    lists = min(lists, rows // 39)
    if kind == "ivf":
        return Plan(kind, {"lists": lists}, {"nprobe": 8})
    if dimension % 8 or rows < 256 * 39:
        raise InvalidInput(
            f"ivfpq needs a dimension that 8 divides, and {256 * 39} entries: here are {dimension} and {rows}"
        )
    return Plan(kind, {"lists": lists, "bytes": dimension // 8}, {"nprobe": 8, "refine": 8})


def weight(plan: Plan, rows: int, dimension: int) -> int:
    """Bytes of the index file, all of which a busy server has in memory; within a few percent."""
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


def made(
    plan: Plan,
    ids: NDArray[np.int64],
    dimension: int,
    blocks: Blocks,
    advance: Advance,
    held_out: NDArray[np.int64],
    gpu: int | None = None,
) -> Any:
    """The FAISS index of a plan over some entries. The same on every machine, if FAISS runs on one thread: seeds are fixed.

    Args:
        held_out: entries that nothing is learned from, though they are in the index.
        gpu: number of a CUDA device to learn lists on; another result than the CPU's, as good.
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
    for some, rows in blocks(ids):
        for start in range(0, len(some), 4096):
            index.add_with_ids(rows[start : start + 4096], some[start : start + 4096])
            advance("add", len(some[start : start + 4096]))
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
    """How many a file is asked for, so that `k` are left after re-ranking."""
    return k * min(MAX_REFINE, plan.search.get("refine", 1))


def parameters(plan: Plan, search: Search, k: int, share: float, selector: Any) -> Any:
    """What a search of a file of this kind is told. With a selector it is made anew for every search: FAISS writes into it on its way.

    Args:
        k: as `candidates` has it.
        share: of the file's entries that may be found; with fewer of them a search has to look at more to find as many.
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
    """The entry ids that a file holds, in its own order."""
    if holds_vectors(plan):
        ids: NDArray[np.int64] = faiss.vector_to_array(index.id_map)
        return ids
    lists = faiss.extract_index_ivf(index).invlists
    sizes = [lists.list_size(i) for i in range(lists.nlist)]
    parts = [faiss.rev_swig_ptr(lists.get_ids(i), n).copy() for i, n in enumerate(sizes) if n]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def holds_vectors(plan: Plan) -> bool:
    """Whether a file of this kind holds the stored numbers themselves, in the order of `ids_of`."""
    return plan.kind in ("flat", "flat32", "hnsw")


def vector_at(plan: Plan, index: Any, row: int) -> NDArray[np.float32]:
    """The vector of a row of `ids_of`, of a kind that holds them."""
    found: NDArray[np.float32] = _storage(plan, index).reconstruct(row)
    return found


def codes_of(plan: Plan, index: Any) -> NDArray[np.void]:
    """The vectors of a kind that holds them, `[rows]`, an item the bytes of one: float32 of kind flat32, else float16.

    A view of the mapped file, not a copy: valid for as long as the index is, and not aligned.
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
