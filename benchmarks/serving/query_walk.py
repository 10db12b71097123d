"""The walk of one query by vector over gRPC: how many files, calls and moves from file to file it takes.

    python -m benchmarks.serving.query_walk [--root DIR --store NAME --queries FILE.npy]
                                            [--trace] [--keep]

Client and server run in this process. Every call of a function of `tagstore` is noted, in every thread, for
one query after five others; a move is a call in another file than the call before. The answer must equal that
of file://.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import tempfile
import threading
from itertools import pairwise
from pathlib import Path
from types import FrameType

import numpy as np

import tagstore
from benchmarks import report
from tagstore.client import connect

PACKAGE = f"{Path(tagstore.__file__).parent}/"
FIXTURES = Path(__file__).parents[2] / "tests" / "written_before"
WARM_UP = 5
"""Queries before the one that is noted."""


def walk(root: Path, store: str, queries: np.ndarray) -> list[tuple[str, str]]:
    """File and function of each call that the query makes, in order."""
    try:
        from tagstore.serving.server import Server
    except ModuleNotFoundError:  # a revision before the rooms
        from tagstore.server import Server

    calls: list[tuple[str, str]] = []
    noting = False

    def note(frame: FrameType, event: str, _: object) -> None:
        path = frame.f_code.co_filename
        if noting and event == "call" and path.startswith(PACKAGE):
            calls.append((path.removeprefix(PACKAGE), frame.f_code.co_name))

    threading.setprofile(note)
    server = Server(root, "127.0.0.1:0", device="cpu")
    server.start()
    try:
        with (
            connect(f"grpc://{server.address}/{store}") as remote,
            connect(f"file://{root}/{store}") as local,
        ):
            fingerprint = remote.info().fingerprint
            for _ in range(WARM_UP):
                answer = remote.retrieve(vectors=queries, fingerprint=fingerprint)
            if answer != local.retrieve(vectors=queries, fingerprint=fingerprint):
                raise SystemExit("the answers of grpc:// and file:// differ")
            noting = True
            sys.setprofile(note)
            remote.retrieve(vectors=queries, fingerprint=fingerprint)
            sys.setprofile(None)
            noting = False
    finally:
        server.stop(0)
        threading.setprofile(None)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, help="stores; by default those of tests/written_before")
    parser.add_argument("--store", default="shapes")
    parser.add_argument(
        "--queries", type=Path, default=FIXTURES / "queries.npy", help="the first row is asked"
    )
    parser.add_argument("--trace", action="store_true", help="print every call")
    parser.add_argument("--keep", action="store_true", help="keep the result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = options.root
        if root is None:
            root = Path(scratch)
            with tarfile.open(FIXTURES / "root.tar.xz") as archive:
                archive.extractall(root, filter="data")
        calls = walk(root, options.store, np.load(options.queries).astype(np.float32)[:1])
    files = sorted({file for file, _ in calls})
    moves = sum(before[0] != after[0] for before, after in pairwise(calls))
    if options.trace:
        print(*(f"{file} {function}" for file, function in calls), sep="\n")
    figures = report.table(["files", "calls", "moves"], [[len(files), len(calls), moves]])
    listed = "Files: " + ", ".join(files) + "."
    report.write("query-walk", "The walk of a query by vector over gRPC", figures, listed, keep=options.keep)


if __name__ == "__main__":
    main()
