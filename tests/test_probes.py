"""The port for machines that watch a server: liveness, readiness with its details, metrics, nothing else."""

from __future__ import annotations

import json
import os
import re
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks import synthetic
from tagstore import errors
from tagstore.serving.server import Server
from tagstore.serving.settings import Settings
from tagstore.storage.generations import generation
from waiting import wait_until


def probe(port: int, path: str) -> tuple[int, str]:
    """The status and the body of a probe."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def port_of(log: str) -> int:
    return int(re.findall(r"metrics on port (\d+)", log)[-1])


def test_a_server_is_ready_once_its_stores_and_encoders_are_loaded(
    shapes_root: Path, mini, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tagstore.retrieval import catalog

    loading, loaded = threading.Event(), threading.Event()

    def load(*_, **__):
        loading.set()
        assert loaded.wait(60)
        return mini

    monkeypatch.setattr(catalog, "load_encoder_of", load)
    caplog.set_level("INFO")
    server = Server(shapes_root, "127.0.0.1:0", device="cpu", settings=Settings(metrics="127.0.0.1:0"))
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(server.start)
        assert loading.wait(60)
        wait_until(lambda: server.state().phase == "loading encoders")
        port = port_of(caplog.text)
        assert probe(port, "/healthz")[0] == 200
        for path in ("/readyz", "/ready"):
            status, body = probe(port, path)
            assert (status, json.loads(body)["phase"]) == (503, "loading encoders")
        loaded.set()
        started.result(60)
    for path in ("/readyz", "/ready"):
        assert probe(port, path) == (200, '{"ready": true, "phase": "serving", "damaged": {}}\n')
    assert "tagstore_in_flight" in probe(port, "/metrics")[1]
    for path in ("/", "/health", "/metrics/x", "/readyz/"):
        assert probe(port, path)[0] == 404
    server.stop(0)


def test_readiness_of_several_workers_names_damaged_stores(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tagstore.serving.workers import Supervisor

    for store in ("sound", "cut"):
        synthetic.build(tmp_path, 300, 64, store)  # of an encoder that cannot be loaded: nobody waits for it
    os.truncate(generation(tmp_path / "cut") / "data.mdb", 20_000)
    caplog.set_level("INFO")
    supervisor = Supervisor(
        tmp_path, "127.0.0.1:0", device="cpu", settings=Settings(workers=2, metrics="127.0.0.1:0")
    )
    try:
        supervisor.start()
        status, body = probe(port_of(caplog.text), "/readyz")
        assert status == 200
        assert "was cut off" in json.loads(body)["damaged"]["cut"]
    finally:
        supervisor.stop()
    assert not supervisor.state().ready


def test_metrics_that_others_can_reach_need_consent(shapes_root: Path) -> None:
    for metrics in ("0.0.0.0:0", "[::]:0"):
        with pytest.raises(errors.InvalidInput, match=r"the metrics at .* --insecure"):
            Server(shapes_root, "127.0.0.1:0", settings=Settings(metrics=metrics))
        server = Server(shapes_root, "127.0.0.1:0", settings=Settings(metrics=metrics, insecure=True))
        server.stop(0)
    with pytest.raises(errors.InvalidInput, match="no HOST:PORT"):
        Server(shapes_root, "127.0.0.1:0", settings=Settings(metrics="9100"))
