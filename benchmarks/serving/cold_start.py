"""Cold start: from the start of a process to its first answer, with the store's files in the page cache and with them dropped from it.

Nothing else may have the store open, or its pages stay. Only the store's files are dropped, as a process without rights can: the
interpreter's and the libraries' stay where they are.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
import numpy as np

from benchmarks.report import table
from benchmarks.serving.callers import LOCAL, RETRIEVE
from benchmarks.serving.prepared_stores import CURRENT, FLAT
from benchmarks.serving.servers import free_port, serving
from benchmarks.synthetic import STORE
from tagstore_proto.v1 import tagstore_pb2 as pb

CLIENT = """
import sys
import numpy as np
from tagstore.client import connect
with connect(sys.argv[1]) as source:
    found = source.retrieve(vectors=np.load(sys.argv[2]), fingerprint=sys.argv[3])
print(*(n.entry_id for n in found[0].neighbours), flush=True)
"""
ENGINE = """
import sys
import numpy as np
from tagstore.retrieval.engine import Engine
from tagstore.storage.store import Store
root, _, version = sys.argv[1].partition("@")
found = Engine(Store(root.rpartition("/")[0], root.rpartition("/")[2]).snapshot(int(version or 0) or None)).retrieve(np.load(sys.argv[2]))
print(*(n.entry_id for n in found[0].neighbours), flush=True)
"""
IMPORTS = "import numpy, faiss, lmdb"
SOON = [(f"grpc.{which}_reconnect_backoff_ms", 20) for which in ("initial", "min", "max")]


def start(code: str, *arguments: str) -> tuple[float, str]:
    """Seconds from the start of an interpreter to its first line, and that line."""
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        took = time.perf_counter() - began
    return took, line


def start_server(root: Path, message: bytes) -> tuple[float, float, str]:
    """Seconds from the start of `tagstore serve` to its first answer by vector, and to ready; that answer's entries."""
    address = f"127.0.0.1:{free_port()}"
    began = time.perf_counter()
    process = serving(root, "--workers", "1", "--address", address)
    with grpc.insecure_channel(address, [*LOCAL, *SOON]) as channel:
        call = channel.unary_unary(RETRIEVE)
        while True:
            try:
                data = call(message, timeout=60, wait_for_ready=True)
                break
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE:
                    raise
                time.sleep(0.005)
    answered = time.perf_counter() - began
    assert process.stdout is not None
    process.stdout.readline()
    ready = time.perf_counter() - began
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    return (
        answered,
        ready,
        " ".join(str(n.entry_id) for n in pb.RetrieveResponse.FromString(data).retrievals[0].neighbours),
    )


def drop(root: Path) -> float:
    """Ask the kernel to forget the pages of all files of a store; the share of them that it still holds."""
    pages = held = 0
    for path in root.rglob("*"):
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                there = _resident(file.fileno(), path.stat().st_size)
            pages, held = pages + len(there), held + int(there.sum())
    return held / max(1, pages)


def _resident(file: int, size: int) -> np.ndarray:
    """Which pages of a file are in memory (mincore)."""
    with mmap.mmap(file, size, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        there = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(there.ctypes.data)
        )
        del view
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return there & 1


def report(root: Path, n: int, digest: str, vector: np.ndarray, message: bytes, times: int) -> str:
    """The table of a store; ways that give different entries end it."""
    query = root / "cold-query.npy"
    np.save(query, vector[None])
    rows, answers = [], set()
    left = 1.0
    for state in ("in the page cache", "dropped"):
        found: dict[str, list[float]] = {}
        for _ in range(times):
            found.setdefault("interpreter and imports of numpy, faiss, lmdb alone", []).append(
                start(IMPORTS + "; print()")[0]
            )
            for version, kind in ((CURRENT, "HNSW"), (FLAT, "exact")):
                url = f"{root.resolve()}/{STORE}" + (f"@{version}" if version else "")
                for name, code, where in (
                    ("file:// client", CLIENT, f"file://{url}"),
                    ("Engine", ENGINE, url),
                ):
                    left = drop(root) if state == "dropped" else left
                    took, line = start(code, where, str(query), digest)
                    found.setdefault(f"{name}, {kind}, first answer", []).append(took)
                    answers.add((kind, line))
            left = drop(root) if state == "dropped" else left
            first, ready, line = start_server(root, message)
            found.setdefault("tagstore serve, HNSW, first answer by vector", []).append(first)
            found.setdefault("tagstore serve, ready", []).append(ready)
            answers.add(("HNSW", line))
        rows += [
            [name, state, f"{np.median(some):.2f} ({min(some):.2f}–{max(some):.2f})"]
            for name, some in found.items()
        ]
    query.unlink()
    if len(answers) != 2:
        raise RuntimeError(f"the first answers differ: {sorted(answers)}")
    took = "the kernel let go of them" if left < 0.02 else f"the kernel kept {left:.0%} of them"
    about = f"Cold start with {n:,} entries, seconds from the start of a process, medians of {times} (dropped pages of the store: {took})."
    return about + "\n\n" + table(["what", "the store's files", "s"], rows)
