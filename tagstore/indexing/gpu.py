"""The index on a GPU: exact search over float16 rows, or the lists of an inverted file.

Needs the `gpu` extra and a CUDA device. Opening a version copies its vectors to the device, if they fit, and
compares a search for some of them with the CPU's. The CPU answers filtered requests: FAISS has no selectors
on a GPU.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from threading import Lock
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from tagstore.errors import Damaged, InvalidInput, MissingExtra
from tagstore.indexing import exact
from tagstore.indexing.faiss_index import FaissIndex
from tagstore.indexing.protocol import PLAIN
from tagstore.storage.rows import Allowed
from tagstore.storage.snapshot import Snapshot
from tagstore.types import Search, Vectors

log = logging.getLogger(__name__)

TEMPORARY = 512 << 20
"""Bytes of FAISS's own working memory on the device."""
MAX_K = 2048
"""Neighbours that FAISS finds on a GPU at most."""
TOLERANCE = 2e-3
"""How far inner products of float16 queries may be from those of float32 queries."""
MAX_DEAD = 512
"""Dead entries of an inverted file at most: a search asks for so many more and leaves them out."""


def devices() -> int:
    """Count the CUDA devices that this FAISS can use; 0 for the CPU build."""
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0


def device_number(device: str) -> int | None:
    """The number of the device "cuda" or "cuda:N", None for "cpu"; "auto" is the first one if there is any.

    Raises `MissingExtra` if this FAISS knows no GPU, `InvalidInput` for a device that is not there.
    """
    if device == "cpu" or (device == "auto" and not devices()):
        return None
    match = re.fullmatch(r"auto|cuda(?::(\d+))?", device)
    if not match:
        raise InvalidInput(f"device is '{device}': it is auto, cpu, cuda or cuda:N")
    if not hasattr(faiss, "StandardGpuResources"):
        raise MissingExtra(
            "the installed FAISS searches on the CPU only: pip uninstall faiss-cpu, pip install "
            "'tagstore[gpu]', or --device cpu"
        )
    number = int(match[1] or 0)
    if number >= devices():
        raise InvalidInput(f"there is no device {device}: FAISS sees {devices()} CUDA devices")
    return number


def required_bytes(index: FaissIndex, snapshot: Snapshot) -> int:
    """Bytes of device memory that loading a version takes: FAISS grows a flat index by doubling a copy."""
    part = index.parts[0] if index.parts else None
    if part is not None and "lists" in part.plan.build:
        return int(snapshot.version.index["files"][0]["bytes"]) * 5 // 4 + TEMPORARY
    doubled = 1 << max(20, (snapshot.version.entries * snapshot.dimension * 2 - 1).bit_length())
    return doubled * 3 // 2 + TEMPORARY


def check_fits(needed: int, free: int, device: int) -> None:
    """Log the memory needed. Raises `InvalidInput` if it does not fit."""
    log.info("the index takes %.1f GiB on cuda:%d, %.1f GiB are free", needed / 2**30, device, free / 2**30)
    if needed > free:
        raise InvalidInput(
            f"the index takes {needed / 2**30:.1f} GiB of device memory, cuda:{device} has "
            f"{free / 2**30:.1f} GiB free: use --device cpu, or build a smaller one, `tagstore build-index "
            "--kind ivfpq`"
        )


def free_memory(device: int) -> int:
    """Bytes free on a CUDA device."""
    import torch

    return int(torch.cuda.mem_get_info(device)[0])


class GpuIndex:
    """A version's index on a CUDA device, beside the memory-mapped one that answers filtered requests.

    Raises `InvalidInput` if it does not fit, `Damaged` if the device finds other neighbours than the CPU.
    """

    tolerance = TOLERANCE

    def __init__(self, snapshot: Snapshot, device: int) -> None:
        self._snapshot, self._cpu, self._device = snapshot, FaissIndex(snapshot), device
        check_fits(required_bytes(self._cpu, snapshot), free_memory(device), device)
        self._lock = Lock()  # FAISS's resources serve one search at a time
        self._resources = faiss.StandardGpuResources()
        self._resources.setTempMemory(TEMPORARY)
        self._live = Allowed(snapshot.array("live", np.uint8), snapshot.version.entries)
        parts = self._cpu.parts
        dead = parts[0].rows - parts[0].alive if parts else 0
        self._lists = len(parts) == 1 and "lists" in parts[0].plan.build and dead <= MAX_DEAD
        self._dead = dead if self._lists else 0
        if self._lists:
            options = faiss.GpuClonerOptions()
            options.useFloat16 = True
            self._index = faiss.index_cpu_to_gpu(self._resources, device, parts[0].index, options)
            self._ids = np.zeros(0, np.int64)
        else:
            config = faiss.GpuIndexFlatConfig()
            config.device, config.useFloat16 = device, True
            self._index = faiss.GpuIndexFlatIP(self._resources, snapshot.dimension, config)
            self._ids = snapshot.live()
            for _, rows in snapshot.vector_blocks(self._ids):
                self._index.add(rows)
        self._test()

    def search(
        self, queries: Vectors, k: int, *, allowed: Allowed | None = None, search: Search = PLAIN
    ) -> NDArray[np.int64]:
        count = min(k, self._snapshot.version.entries) + self._dead
        if allowed is not None or count > MAX_K or (search.exact and self._lists) or not count:
            return self._cpu.search(queries, k, allowed=allowed, search=search)
        with self._lock:
            if self._lists:
                plan = self._cpu.parts[0].plan
                parameters: Any = faiss.SearchParametersIVF(
                    nprobe=min(plan.build["lists"], search.nprobe or plan.search["nprobe"])
                )
                if isinstance(self._index, faiss.IndexPreTransform):
                    parameters = faiss.SearchParametersPreTransform(index_params=parameters)
                similarities, ids = self._index.search(
                    queries, count * plan.search.get("refine", 1), params=parameters
                )
            else:
                similarities, rows = self._index.search(queries, count)
                return np.asarray(self._ids[rows])
        similarities[~self._live.holds(ids)] = -np.inf
        similarities, ids = self._cpu.refined(
            self._cpu.parts[0], queries, (similarities, np.where(np.isinf(similarities), -1, ids))
        )
        ids = exact.merged([(similarities, ids)], min(k, self._snapshot.version.entries))[1]
        short = np.flatnonzero((ids < 0).any(axis=1))
        if len(short):
            ids[short] = self._cpu.search(queries[short], k, search=Search(exact=True))
        return ids

    def describe(self) -> Mapping[str, Any]:
        return {
            **self._cpu.describe(),
            "device": f"cuda:{self._device}",
            "on device": "lists" if self._lists else "flat, float16",
        }

    def _test(self) -> None:
        """Compare a search on the device with the CPU's."""
        live = self._snapshot.live()[:: max(1, self._snapshot.version.entries // 16)]
        if not len(live):
            return
        queries = self._snapshot.vectors(live)
        k = min(5, self._snapshot.version.entries)
        best = exact.search(self._snapshot, queries, k, self._live)[0]
        neighbours = self.search(queries, k)
        ours = np.stack([self._snapshot.vectors(row) @ q for row, q in zip(neighbours, queries, strict=True)])
        first_agrees = (ours.max(axis=1) >= best[:, 0] - TOLERANCE).all()
        # lists may miss some of the five, but must find the stored vector itself
        if not first_agrees or not (self._lists or (ours >= best[:, -1:] - TOLERANCE).all()):
            raise Damaged(
                f"cuda:{self._device} finds other neighbours than the CPU: its answers can't be trusted, use "
                "--device cpu"
            )
