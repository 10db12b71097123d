"""Small real things that many tests need: an encoder, a store of them, a server on a free port."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pictures import ingest_shapes
from tagstore.encoding.torchvision_shim import prepare_when_imported

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which open_clip does

prepare_when_imported()  # tests import transformers before anything of ours


@pytest.fixture(scope="session")
def mini():
    from tagstore.encoding.encoder import load_encoder

    return load_encoder("mini", device="cpu")


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory, mini) -> Path:
    """A root with the store "shapes" at version 1; tests must not write to it."""
    return ingest_shapes(tmp_path_factory.mktemp("root"), mini)


@pytest.fixture(scope="session")
def server_address(shapes_root: Path) -> Iterator[str]:
    from tagstore.serving.server import Server

    server = Server(shapes_root, "127.0.0.1:0", device="cpu")
    server.start()
    yield server.address
    server.stop(0)


@pytest.fixture
def served(shapes_root: Path, mini, monkeypatch) -> Iterator:
    """Makes servers with a loaded encoder: call it with limits for a server and its stub."""
    import grpc

    from serving import limited
    from tagstore.serving.live_catalog import LiveCatalog
    from tagstore_proto.v1 import tagstore_pb2_grpc as pb_grpc

    monkeypatch.setattr(LiveCatalog, "encoder", lambda *_: mini)
    servers = []

    def make(**limits):
        server = limited(shapes_root, **limits)
        channel = grpc.insecure_channel(server.address)
        servers.append((server, channel))
        return server, pb_grpc.TagStoreStub(channel)

    yield make
    for server, channel in servers:
        channel.close()
        server.stop(0)


@pytest.fixture(scope="session")
def foreign_environment(tmp_path_factory) -> dict[str, str]:
    """The environment of other software's commands: without the network, and with torchvision usable beside
    a CPU torch, as in all our commands."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(
        "from tagstore.encoding.torchvision_shim import prepare_when_imported\nprepare_when_imported()\n"
    )
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    return os.environ | offline | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_thread_left_behind() -> Iterator[None]:
    """A test that leaves a non-daemon thread running would hang the run at its end."""
    before = set(threading.enumerate())
    yield
    new_threads = [
        t
        for t in threading.enumerate()
        if t not in before and not t.daemon and not t.name.startswith(("decode", "rpc", "scan"))
    ]
    for thread in new_threads:
        thread.join(30)  # gRPC's own end a moment after a server has stopped
    assert not [thread for thread in new_threads if thread.is_alive()]
