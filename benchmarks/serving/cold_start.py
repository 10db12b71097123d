"""From the start of a process to its first answer, with the store's files in the page cache and without.

Nothing else may have the store open, or its pages stay in memory. Only the store's files are dropped, because
a process without rights cannot drop the interpreter's and the libraries'.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
import numpy as np

from benchmarks.processes import drop_from_page_cache, free_port, start_server
from benchmarks.report import table
from benchmarks.serving.callers import CHANNEL_OPTIONS, RETRIEVE
from benchmarks.serving.prepared_stores import CURRENT, FLAT
from benchmarks.synthetic import STORE
from tagstore_proto.v1 import tagstore_pb2 as pb

CLIENT = """
import sys
import numpy as np
from tagstore.client import connect
with connect(sys.argv[1]) as source:
    [answer] = source.retrieve(vectors=np.load(sys.argv[2]), fingerprint=sys.argv[3])
print(*(n.entry_id for n in answer.neighbours), flush=True)
"""
ENGINE = """
import sys
import numpy as np
from tagstore.retrieval.engine import Engine
from tagstore.storage.store import Store
path, _, version = sys.argv[1].partition("@")
root, _, name = path.rpartition("/")
[answer] = Engine(Store(root, name).snapshot(int(version or 0) or None)).retrieve(np.load(sys.argv[2]))
print(*(n.entry_id for n in answer.neighbours), flush=True)
"""
IMPORTS = "import numpy, faiss, lmdb; print()"
FAST_RECONNECT = [(f"grpc.{which}_reconnect_backoff_ms", 20) for which in ("initial", "min", "max")]


def start(code: str, *arguments: str) -> tuple[float, str]:
    """Seconds from the start of an interpreter to its first line, and that line."""
    begin = time.perf_counter()
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        return time.perf_counter() - begin, line


def start_and_query_server(root: Path, message: bytes) -> tuple[float, float, str]:
    """Seconds from the start of `tagstore serve` to its first answer, and to ready; the answer's entries."""
    address = f"127.0.0.1:{free_port()}"
    begin = time.perf_counter()
    process = start_server(root, "--workers", "1", "--address", address)
    with grpc.insecure_channel(address, [*CHANNEL_OPTIONS, *FAST_RECONNECT]) as channel:
        call = channel.unary_unary(RETRIEVE, None, pb.RetrieveResponse.FromString)
        while True:
            try:
                response = call(message, timeout=60, wait_for_ready=True)
                break
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE:
                    raise
                time.sleep(0.005)
    answered = time.perf_counter() - begin
    assert process.stdout is not None
    process.stdout.readline()
    ready = time.perf_counter() - begin
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    return answered, ready, " ".join(str(n.entry_id) for n in response.retrievals[0].neighbours)


def drop(root: Path) -> float:
    """Drop all files of a store from the page cache; the share of their pages that the kernel still holds."""
    drop_from_page_cache(root)
    files = [path for path in root.rglob("*") if path.is_file() and path.stat().st_size]
    resident = np.concatenate([_resident_pages(path) for path in files])
    return float(resident.mean())


def _resident_pages(path: Path) -> np.ndarray:
    """Which pages of a file are in memory (mincore)."""
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        pointers = (
            ctypes.c_void_p(view.ctypes.data),
            ctypes.c_size_t(size),
            ctypes.c_void_p(pages.ctypes.data),
        )
        failed = libc.mincore(*pointers)
        del view
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return pages & 1


def report(root: Path, n: int, digest: str, vector: np.ndarray, message: bytes, times: int) -> str:
    """The table of a store. Raises `RuntimeError` if two ways to start give different entries."""
    query = root / "cold-query.npy"
    np.save(query, vector[None])
    rows, answers = [], set()
    resident = 1.0
    for state in ("in the page cache", "dropped"):
        figures: dict[str, list[float]] = {}
        for _ in range(times):
            took, _ = start(IMPORTS)
            figures.setdefault("interpreter and imports of numpy, faiss, lmdb alone", []).append(took)
            for version, kind in ((CURRENT, "HNSW"), (FLAT, "exact")):
                path = f"{root.resolve()}/{STORE}" + (f"@{version}" if version else "")
                for name, code, url in (
                    ("file:// client", CLIENT, f"file://{path}"),
                    ("Engine", ENGINE, path),
                ):
                    resident = drop(root) if state == "dropped" else resident
                    took, line = start(code, url, str(query), digest)
                    figures.setdefault(f"{name}, {kind}, first answer", []).append(took)
                    answers.add((kind, line))
            resident = drop(root) if state == "dropped" else resident
            first, ready, line = start_and_query_server(root, message)
            figures.setdefault("tagstore serve, HNSW, first answer by vector", []).append(first)
            figures.setdefault("tagstore serve, ready", []).append(ready)
            answers.add(("HNSW", line))
        rows += [
            [name, state, f"{np.median(times_):.2f} ({min(times_):.2f}–{max(times_):.2f})"]
            for name, times_ in figures.items()
        ]
    query.unlink()
    if len(answers) != 2:
        raise RuntimeError(f"the first answers differ: {sorted(answers)}")
    kept = "none" if resident < 0.02 else f"{resident:.0%}"
    about = (
        f"Cold start with {n:,} entries, seconds from the start of a process, medians of {times} "
        f"(pages of dropped files that the kernel kept: {kept})."
    )
    return about + "\n\n" + table(["what", "the store's files", "s"], rows)
