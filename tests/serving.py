"""Servers for tests of serving: with limits, and with searches that wait until they are let go."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tagstore.serving.server import Server
from tagstore.serving.settings import Limits, Settings
from tagstore.wire import convert
from tagstore_proto.v1 import tagstore_pb2 as pb


def vector_request(mini, seed: int = 0, **fields) -> pb.RetrieveRequest:
    vectors = np.random.default_rng(seed).standard_normal((1, mini.dimension)).astype(np.float32)
    return pb.RetrieveRequest(
        store="shapes",
        vectors=convert.vectors_to_proto(vectors),
        fingerprint=mini.fingerprint.digest,
        **fields,
    )


def serve_command(root: Path, *options: str) -> list[str]:
    """Return the command of a server process on a free port, without a GPU."""
    place = ["--root", str(root), "--address", "127.0.0.1:0", "--device", "cpu"]
    return [sys.executable, "-m", "tagstore.cli", "serve", *place, *options]


class Held:
    """Searches that wait until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from tagstore.retrieval.engine import Query

        self.go, self.started, self.rows = threading.Event(), threading.Semaphore(0), []
        find = Query.find

        def held(query):
            self.rows.append(len(query.vectors))
            self.started.release()
            assert self.go.wait(60)
            return find(query)

        monkeypatch.setattr(Query, "find", held)


def limited(root: Path, cores: int = 1, **limits) -> Server:
    server = Server(
        root, "127.0.0.1:0", device="cpu", settings=Settings(cores=cores, limits=Limits(**limits))
    )
    server.start()
    return server
