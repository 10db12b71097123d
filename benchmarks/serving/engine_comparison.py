"""Our rows beside `other_engines.py`: the same store, queries, judged recall, efforts and kinds of client."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.processes import running_server
from benchmarks.report import table
from benchmarks.serving.callers import (
    LoadProcess,
    async_callers,
    blocking_callers,
    call_seconds,
    one_caller,
    percentiles,
    threads_in_process,
)
from benchmarks.serving.query_paths import K, engine_in_process, entry_ids, recall, request_messages
from benchmarks.synthetic import STORE, fingerprint
from tagstore.types import Search

EFFORTS, REQUIRED_RECALL, JUDGED = (32, 64, 128, 256), 0.95, 200
ADDED_PER_SECOND = 150.0
"""Entries a second that are added to all other databases, one after the other; for the announced time."""
HEADER = (
    "five nearest entries and their tags merged", "recall@5", "ef", "opened or built in, s",
    "p50 ms", "p99 ms", "8 clients, /s",
)  # fmt: skip


def expected_seconds(folder: Path, n: int) -> float:
    """Seconds for the other engines: their databases if they are missing, then the figures."""
    return 60 + (0 if (folder / "clip-retrieval" / "made").exists() else n / ADDED_PER_SECOND)


def report(
    python: str, root: Path, folder: Path, vectors: np.ndarray, seconds: float, load: LoadProcess
) -> str:
    """The table of all engines, ours first. `python` is the interpreter that runs `other_engines.py`."""
    truth = entry_ids(engine_in_process(root, search=Search(k=K, exact=True))(vectors[:JUDGED]))
    for effort in EFFORTS:
        query = engine_in_process(root, search=Search(k=K, ef_search=effort))
        share = recall(entry_ids(query(vectors[:JUDGED])), truth)
        if share >= REQUIRED_RECALL:
            break
    one_by_one = percentiles(call_seconds(lambda i: query(vectors[i % len(vectors)][None]), seconds))
    in_process = threads_in_process(query, vectors, 8, 1, seconds)
    rows = [_row("tagstore, in process", share, effort, "", *one_by_one, in_process.per_second)]
    messages = request_messages(vectors, 1, fingerprint(vectors.shape[1]).digest, ef=effort)
    with running_server(root, "--workers", "1") as (address, _):
        one_by_one = load(one_caller, address, messages, seconds)
        for name, callers in (
            ("8 threads, as all below", blocking_callers),
            ("8 on an event loop", async_callers),
        ):
            rate = load(callers, address, messages, 8, seconds)
            rows.append(
                _row(f"tagstore serve, gRPC ({name})", share, effort, "", *one_by_one, rate.per_second)
            )
    lines = _run_other_engines(python, root, folder, vectors, seconds)
    for line in lines:
        if "name" in line:
            figures = (line[key] for key in ("recall", "effort", "opened_in", "p50", "p99", "eight"))
            rows.append(_row(f"{line['name']} ({line['setup']})", *figures))
    absent = [f"- {line['absent']}" for line in lines if "absent" in line]
    efforts = ", ".join(map(str, EFFORTS))
    about = (
        f"Each engine works as hard as a recall@{K} of {REQUIRED_RECALL} takes: "
        f"the first ef of {efforts} that reaches it, on {JUDGED} queries."
    )
    return "\n\n".join([about, table(HEADER, rows), "\n".join(absent) or "No engine is missing."])


def _row(
    name: str, share: float, effort: float, opened_in: Any, p50: float, p99: float, eight: float
) -> list[str]:
    opened = f"{opened_in:.0f}" if opened_in != "" else ""
    return [name, f"{share:.3f}", f"{effort:.0f}", opened, f"{p50:.2f}", f"{p99:.2f}", f"{eight:,.0f}"]


def _run_other_engines(
    python: str, root: Path, folder: Path, vectors: np.ndarray, seconds: float
) -> list[dict[str, Any]]:
    from tagstore.storage.store import Store

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tags.json").exists():
        snapshot = Store(root, STORE).snapshot()
        ids = snapshot.live()
        np.save(folder / "vectors.npy", snapshot.vectors(ids).astype(np.float32))
        tags = [tags for _, tags in snapshot.keys_and_tags(ids.tolist())]
        (folder / "tags.json").write_text(json.dumps(tags))
    np.save(folder / "queries.npy", vectors)
    start = time.perf_counter()
    command = [python, Path(__file__).parent / "other_engines.py", folder, "--seconds", str(seconds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=7200)
    print(f"the other engines took {time.perf_counter() - start:.0f} s", flush=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        lines.append(
            {"absent": f"other_engines.py ended with {done.returncode} before the remaining engines"}
        )
    return lines
