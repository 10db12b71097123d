"""Our rows beside `other_engines.py`: the same store, queries, judged recall and efforts, asked by the same kinds of client."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import table
from benchmarks.serving.callers import (
    Apart,
    Rate,
    blocking_callers,
    callers,
    one_caller,
    percentiles,
    threads,
    timed,
)
from benchmarks.serving.query_paths import K, found, in_process, recall, requests_of
from benchmarks.serving.servers import ours
from benchmarks.synthetic import STORE, fingerprint
from tagstore.types import Search

EFFORTS, WANTED, JUDGED = (32, 64, 128, 256), 0.95, 200
ADDED_PER_SECOND = 150.0
"""Entries, into all the other databases one after the other: for the time that is said before."""


def needed(folder: Path, n: int) -> float:
    """Seconds that others take: their databases if they are not there, then the figures."""
    return 60 + (0 if (folder / "clip-retrieval" / "made").exists() else n / ADDED_PER_SECOND)


def report(python: str, root: Path, folder: Path, vectors: np.ndarray, seconds: float, apart: Apart) -> str:
    """The table of all; ours first, then what `other_engines.py` says."""
    truth = found(in_process(root, search=Search(k=K, exact=True))(vectors[:JUDGED]))
    for effort in EFFORTS:
        ask = in_process(root, search=Search(k=K, ef_search=effort))
        share = recall(found(ask(vectors[:JUDGED])), truth)
        if share >= WANTED:
            break
    rows = [_row("tagstore, in process", share, effort, "", *_in_process(ask, vectors, seconds))]
    messages = requests_of(vectors, 1, fingerprint(vectors.shape[1]).digest, ef=effort)
    with ours(root, "--workers", "1") as (address, _):
        alone = apart(one_caller, address, messages, seconds)
        for clients, load in (("8 threads, as all below", blocking_callers), ("8 on an event loop", callers)):
            rate: Rate = apart(load, address, messages, 8, seconds)
            rows.append(_row(f"tagstore serve, gRPC ({clients})", share, effort, "", *alone, rate.per_second))
    said = _others(python, root, folder, vectors, seconds)
    for one in said:
        if "name" in one:
            rows.append(
                _row(
                    f"{one['name']} ({one['how']})",
                    *(one[key] for key in ("recall", "effort", "made", "p50", "p99", "eight")),
                )
            )
    header = [
        "five nearest entries and their tags merged",
        "recall@5",
        "ef",
        "opened or made in, s",
        "p50 ms",
        "p99 ms",
        "8 clients, /s",
    ]
    absent = [f"- {one['absent']}" for one in said if "absent" in one]
    efforts = ", ".join(map(str, EFFORTS))
    about = f"Each works as hard as a recall@{K} of {WANTED} takes: the first ef of {efforts} that reaches it, on {JUDGED} queries."
    return "\n\n".join([about, table(header, rows), "\n".join(absent) or "None was left out."])


def _row(
    name: str, share: float, effort: float, made: Any, p50: float, p99: float, eight: float
) -> list[str]:
    return [
        name,
        f"{share:.3f}",
        f"{effort:.0f}",
        f"{made:.0f}" if made != "" else "",
        f"{p50:.2f}",
        f"{p99:.2f}",
        f"{eight:,.0f}",
    ]


def _in_process(
    ask: Callable[[np.ndarray], Any], vectors: np.ndarray, seconds: float
) -> tuple[float, float, float]:
    p50, p99 = percentiles(timed(lambda i: ask(vectors[i % len(vectors)][None]), seconds))
    return p50, p99, threads(ask, vectors, 8, 1, seconds).per_second


def _others(
    python: str, root: Path, folder: Path, vectors: np.ndarray, seconds: float
) -> list[dict[str, Any]]:
    from tagstore.storage.store import Store

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tags.json").exists():
        snapshot = Store(root, STORE).snapshot()
        ids = snapshot.live()
        np.save(folder / "vectors.npy", snapshot.vectors(ids).astype(np.float32))
        (folder / "tags.json").write_text(
            json.dumps([tags for _, tags in snapshot.keys_and_tags(ids.tolist())])
        )
    np.save(folder / "queries.npy", vectors)
    start = time.perf_counter()
    command = [
        python,
        str(Path(__file__).parent / "other_engines.py"),
        str(folder),
        "--seconds",
        str(seconds),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=7200)
    print(f"the others took {time.perf_counter() - start:.0f} s", flush=True)
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        said.append(
            {"absent": f"other_engines.py ended with {done.returncode}: what it had not come to by then"}
        )
    return said
