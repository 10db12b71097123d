"""Search on one GPU: exact float16 search of a store of the paper's size, beside the memory-bandwidth floor.

    python -m benchmarks.index.gpu_search [--entries 15000000] [--dimension 768] [--device 0] [--dry-run]

Needs the `gpu` extra in place of faiss-cpu, and a CUDA device with the memory that the first line states.
--dry-run runs every step with the CPU's FAISS on 10,000 vectors of 64 dimensions. The device's results are
compared with a matrix product on the CPU before anything is timed. Inverted files and CAGRA are built and
searched too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from benchmarks.report import arguments_parser, seconds, table, write
from tagstore.indexing import gpu

K = 13
"""What the engine asks for where a request wants 5."""
PIECE = 1 << 17
BATCHES = (1, 64, 1024)


def vectors(n: int, dimension: int) -> Iterator[NDArray[np.float32]]:
    """Unit vectors in pieces, each the sum of a random vector and one of the centres of its piece."""
    for start in range(0, n, PIECE):
        rng = np.random.default_rng(start)
        centres = rng.standard_normal((256, dimension), dtype=np.float32)
        size = min(PIECE, n - start)
        rows = centres[rng.integers(256, size=size)] + rng.standard_normal(
            (size, dimension), dtype=np.float32
        )
        yield rows / np.linalg.norm(rows, axis=1, keepdims=True)


def milliseconds(work: Callable[[], Any], times: int) -> float:
    return median(seconds(work, times)) * 1e3


class Device:
    """Where indexes are: a GPU, or, for a dry run, the CPU."""

    def __init__(self, number: int | None) -> None:
        self.number = number
        if number is not None:
            self.resources = faiss.StandardGpuResources()
            self.resources.setTempMemory(gpu.TEMPORARY)

    @property
    def name(self) -> str:
        if self.number is None:
            return "the CPU (dry run)"
        import torch

        return str(torch.cuda.get_device_name(self.number))

    def flat(self, dimension: int) -> Any:
        if self.number is None:
            return faiss.IndexScalarQuantizer(
                dimension, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
            )
        config = faiss.GpuIndexFlatConfig()
        config.device, config.useFloat16 = self.number, True
        return faiss.GpuIndexFlatIP(self.resources, dimension, config)

    def moved(self, index: Any) -> Any:
        if self.number is None:
            return index
        options = faiss.GpuClonerOptions()
        options.useFloat16 = True
        return faiss.index_cpu_to_gpu(self.resources, self.number, index, options)

    def bandwidth(self, size: int) -> float:
        """Bytes a second that reading `size` bytes of this device's memory reaches."""
        if self.number is None:
            data = np.zeros(size // 8, np.uint64)
            return size / (milliseconds(lambda: data.max(), 5) / 1e3)
        import torch

        held = torch.zeros(size // 4, dtype=torch.float32, device=f"cuda:{self.number}")

        def read() -> None:
            held.sum()
            torch.cuda.synchronize(self.number)

        return size / (milliseconds(read, 10) / 1e3)


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--entries", type=int, default=15_000_000)
    parser.add_argument("--dimension", type=int, default=768)
    parser.add_argument("--device", type=int, default=0, help="number of the CUDA device")
    parser.add_argument(
        "--listed", type=int, default=1_000_000, help="entries of the inverted files, whose build is timed"
    )
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    n, d, listed = arguments.entries, arguments.dimension, min(arguments.listed, arguments.entries)
    number = None if arguments.dry_run else gpu.device_number(f"cuda:{arguments.device}")
    if number is None:
        n, listed, d = min(n, 10_000), min(listed, 10_000), min(d, 64)
        faiss.omp_set_num_threads(1)
    size = n * d * 2
    peak = (1 << (size - 1).bit_length()) * 3 // 2
    print(f"exact: {size / 2**30:.1f} GiB of float16 rows, up to {peak / 2**30:.1f} GiB while they load")
    if number is not None:
        gpu.check_fits(peak + gpu.TEMPORARY, gpu.free_memory(number), number)
    device = Device(number)
    bandwidth = device.bandwidth(min(1 << 30, size))

    index = device.flat(d)
    start = time.perf_counter()
    first: NDArray[np.float32] | None = None
    for rows in vectors(n, d):
        index.add(rows)
        first = rows if first is None else first
    loaded = time.perf_counter() - start
    assert first is not None
    rng = np.random.default_rng(1)
    queries = first[: max(BATCHES)] + 0.02 * rng.standard_normal(
        (min(len(first), max(BATCHES)), d), dtype=np.float32
    )
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    scores, _ = index.search(queries[:64], K)
    best = np.full((64, K), -np.inf, np.float32)
    for rows in vectors(n, d):
        product = np.concatenate([best, queries[:64] @ rows.T], axis=1)
        best = -np.sort(-product, axis=1)[:, :K]
    np.testing.assert_allclose(scores, best, atol=gpu.TOLERANCE)
    lines: list[list[object]] = []
    floor = size / bandwidth * 1e3
    for batch in BATCHES:
        took = milliseconds(lambda batch=batch, index=index: index.search(queries[:batch], K), 10)
        lines.append(
            [
                "exact, float16",
                batch,
                f"{took:.2f}",
                f"{floor:.2f}",
                f"{took / floor:.2f}",
                f"{batch / took * 1e3:,.0f}",
                "",
            ]
        )
    del index
    rows = np.concatenate(list(vectors(listed, d)))
    builds = {
        "IVF, float16": f"IVF{min(4096, listed // 39)},SQfp16",
        "IVF-PQ": f"IVF{min(4096, listed // 39)},PQ{d // 16}",
    }
    for name, recipe in builds.items():
        start = time.perf_counter()
        lists = device.moved(faiss.index_factory(d, recipe, faiss.METRIC_INNER_PRODUCT))
        lists.train(rows[: 1 << 17])
        lists.add(rows)
        seconds = time.perf_counter() - start
        for batch in BATCHES:
            params = faiss.SearchParametersIVF(nprobe=16)
            took = milliseconds(
                lambda batch=batch, lists=lists, p=params: lists.search(queries[:batch], K, params=p), 10
            )
            lines.append(
                [
                    f"{name}, {listed:,}, nprobe 16",
                    batch,
                    f"{took:.2f}",
                    "",
                    "",
                    f"{batch / took * 1e3:,.0f}",
                    f"{seconds:.1f} s",
                ]
            )
    if hasattr(faiss, "GpuIndexCagra") and number is not None:
        config = faiss.GpuIndexCagraConfig()
        config.device = number
        start = time.perf_counter()
        graph = faiss.GpuIndexCagra(device.resources, d, faiss.METRIC_INNER_PRODUCT, config)
        graph.train(rows)
        seconds = time.perf_counter() - start
        for batch in BATCHES:
            took = milliseconds(lambda batch=batch, graph=graph: graph.search(queries[:batch], K), 10)
            lines.append(
                [
                    f"CAGRA, {listed:,}",
                    batch,
                    f"{took:.2f}",
                    "",
                    "",
                    f"{batch / took * 1e3:,.0f}",
                    f"{seconds:.1f} s",
                ]
            )
    else:
        lines.append(["CAGRA", "", "", "", "", "", "this FAISS is built without cuVS"])
    header = ["index", "queries", "ms", "floor: rows / bandwidth, ms", "ms / floor", "queries/s", "built in"]
    rows_loaded = f"{n:,} rows of {d} made and loaded in {loaded:.0f} s."
    about = f"{device.name}: {bandwidth / 1e9:,.0f} GB/s read; {rows_loaded}"
    report = table(header, lines)
    if arguments.dry_run:
        print(f"{about}\n\n{report}")
    else:
        write(
            "index-gpu", f"Search of {n:,} entries on one GPU", about, report, packages=("faiss-gpu", "numpy")
        )


if __name__ == "__main__":
    main()
