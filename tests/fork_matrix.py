"""Run epochs for each way of starting DataLoader workers, while the parent's threads use its channel.

    python tests/fork_matrix.py URL [--rounds N] [--epochs N] [--combinations fork:0 fork:2 spawn:8 ...]

Prints a line for each combination, and exits with 1 if any sample is missing, doubled or degraded.
tests/test_client_workers.py runs it in a process of its own: gRPC servers and fork don't mix.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import threading
import time

import numpy as np

from tagstore.client import TagPrefetcher, connect

SAMPLES = 48


class Samples:
    """A map-style dataset of vectors."""

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, object]:
        return {
            "index": index,
            "vector": np.random.default_rng(index).standard_normal(self.dimension).astype(np.float32),
        }


def outcome(batch: list[dict[str, object]]) -> list[tuple[object, int, bool]]:
    return [(s["index"], len(s["tags"]), s["tags"].degraded) for s in batch]  # type: ignore[arg-type, attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument(
        "--combinations",
        nargs="*",
        default=[f"{m}:{w}" for m in ("fork", "spawn", "forkserver") for w in (0, 2, 8)],
    )
    parser.add_argument(
        "--hang", type=float, default=120.0, help="seconds after which a combination counts as hanging"
    )
    arguments = parser.parse_args()
    from torch.multiprocessing import get_context
    from torch.utils.data import DataLoader

    get_context("forkserver").set_forkserver_preload(["torch.utils.data", "tagstore.client"])
    source = connect(arguments.url, k=3)
    info = source.info()
    stop = threading.Event()
    vector = np.ones((1, info.fingerprint.dimension), np.float32)

    parent_queries = [0, 0]
    """Queries of each thread of the parent."""

    def keep_asking(thread: int) -> None:
        while not stop.is_set():
            source.retrieve(vectors=vector, fingerprint=info.fingerprint)
            parent_queries[thread] += 1
            stop.wait(0.002)  # a training loop's own use, not a load test

    threads = [threading.Thread(target=keep_asking, args=(i,), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    dataset = TagPrefetcher(
        Samples(info.fingerprint.dimension),
        source,
        vector="vector",
        fingerprint=info.fingerprint,
        into="tags",
    )
    samples = 0
    for number in range(arguments.rounds):
        for method, workers in (
            (m, int(w)) for m, _, w in (c.partition(":") for c in arguments.combinations)
        ):
            for persistent in (False, True) if workers else (False,):
                faulthandler.dump_traceback_later(arguments.hang, exit=True)
                start = time.perf_counter()
                loader = DataLoader(
                    dataset,  # type: ignore[arg-type]
                    batch_size=8,
                    shuffle=True,
                    num_workers=workers,
                    persistent_workers=persistent,
                    multiprocessing_context=method if workers else None,
                    collate_fn=outcome,
                )
                for _ in range(arguments.epochs):
                    seen = sorted(item for batch in loader for item in batch)
                    if [i for i, _, _ in seen] != list(range(SAMPLES)) or any(
                        not tags or degraded for _, tags, degraded in seen
                    ):
                        sys.exit(f"{method}, {workers} workers: samples are missing or degraded: {seen}")
                    samples += SAMPLES
                del loader
                kept = "persistent" if persistent else "fresh"
                print(f"{number} {method} {workers} {kept} {time.perf_counter() - start:.2f} s", flush=True)
    faulthandler.cancel_dump_traceback_later()
    stop.set()
    for thread in threads:
        thread.join()
    # the parent's counters hold what all workers did
    if source.stats().queries != samples + sum(parent_queries):
        sys.exit(f"{samples} samples and {sum(parent_queries)} queries of the parent, but {source.stats()}")
    print(f"all there: {samples} samples, {sum(parent_queries)} queries of the parent meanwhile")


if __name__ == "__main__":
    main()
