"""Several processes on one port: a supervisor that starts them, starts them again when they die, and lets them drain.

The kernel spreads connections over the workers (SO_REUSEPORT); index and LMDB are mapped, so they are in memory once. The supervisor opens
no store and serves no call. It talks with each worker in JSON lines: down its standard input go the settings and then commands, up its
standard output come what it has to say. A worker whose supervisor is gone drains and ends.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tagstore.errors import InvalidInput, TagstoreError, Unavailable
from tagstore.serving.ports import reserved
from tagstore.serving.settings import Settings, checked_host

log = logging.getLogger(__name__)

DRAIN_SECONDS = 35.0
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""What FAISS, numpy and torch read when they are loaded."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0
"""Before a worker is started again: twice as long each time that one dies before it was ready."""


class Supervisor:
    """Serves `root` with `settings.workers` processes. Same face as `server.Server`.

    Raises:
        InvalidInput: an address or setting that cannot be used.
        Unavailable: the address is taken.
    """

    def __init__(
        self,
        root: str | Path,
        address: str = "127.0.0.1:50051",
        *,
        device: str = "auto",
        settings: Settings = Settings(),  # noqa: B008  frozen
    ) -> None:
        self._host = checked_host(address, settings)
        self._root, self._device = str(root), device
        cores = settings.cores or max(1, (os.cpu_count() or 1) // settings.workers)
        self.settings = replace(settings, cores=cores)
        self._socket = reserved(self._host, int(address.rpartition(":")[2]), address)
        self._port = self._socket.getsockname()[1]
        self._workers: dict[int, _Worker] = {}
        self._unloaded: set[str] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._metrics = tempfile.mkdtemp(prefix="tagstore-metrics-") if settings.metrics else ""
        self._stop_metrics: Callable[[], None] | None = None

    @property
    def address(self) -> str:
        """`HOST:PORT` that clients connect to."""
        return f"{self._host}:{self._port}"

    @property
    def pids(self) -> list[int]:
        """Of the workers that run."""
        with self._lock:
            return [worker.process.pid for worker in self._workers.values()]

    def start(self) -> None:
        """Start the workers; returns once all of them answer. Raises what keeps one from starting."""
        for number in range(self.settings.workers):
            self._launch(number, warm_first=False)
        try:
            for worker in list(self._workers.values()):
                worker.ready.wait()
                if worker.error is not None:
                    raise worker.error
        except TagstoreError:
            self.stop()
            raise
        if self.settings.metrics:
            from tagstore.serving import metrics

            self._stop_metrics, _ = metrics.serve(self.settings.metrics, self._metrics)
        log.info("listening on %s: %s", self.address, self.settings.describe())

    def stop(self) -> None:
        """Let every worker finish what it has in flight, then end."""
        self._stopping.set()
        with self._lock:
            workers = list(self._workers.values())
        for worker in workers:
            worker.process.terminate()
        end = time.monotonic() + DRAIN_SECONDS
        for worker in workers:
            try:
                worker.process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.error("worker %d did not drain in %g s: it is killed", worker.process.pid, DRAIN_SECONDS)
                worker.process.kill()
            worker.thread.join()
        self._socket.close()
        if self._stop_metrics is not None:
            self._stop_metrics()
        if self._metrics:
            shutil.rmtree(self._metrics, ignore_errors=True)

    def _launch(self, number: int, *, warm_first: bool) -> None:
        order = {
            "root": self._root,
            "address": self.address,
            "device": self._device,
            "settings": replace(self.settings, metrics="").to_json(),
            "warm_first": warm_first,
            "unloaded": sorted(self._unloaded),
            "level": logging.getLogger().getEffectiveLevel(),
        }
        threads = {name: os.environ.get(name, str(self.settings.cores)) for name in THREADS}
        environment = {
            **os.environ,
            **threads,
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        }
        if self._metrics:
            environment["PROMETHEUS_MULTIPROC_DIR"] = self._metrics
        process = subprocess.Popen(
            [sys.executable, "-m", "tagstore.serving.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        worker = _Worker(process)
        with self._lock:
            self._workers[number] = worker
        worker.tell(order)
        worker.thread = threading.Thread(
            target=self._attend, args=(number, worker), name=f"rpc-worker-{number}", daemon=True
        )
        worker.thread.start()

    def _attend(self, number: int, worker: _Worker) -> None:
        """Listen to a worker until it ends, and see to it that there is another."""
        assert worker.process.stdout is not None
        for line in worker.process.stdout:
            self._heed(worker, json.loads(line))
        code = worker.process.wait()
        worker.process.stdout.close()
        if worker.process.stdin is not None:
            worker.process.stdin.close()
        was_ready = worker.ready.is_set() and worker.error is None
        if worker.error is None and not was_ready:
            worker.error = Unavailable(
                f"a worker ended with code {code} before it was ready; its log is on standard error"
            )
        worker.ready.set()
        if self._metrics:
            from tagstore.serving import metrics

            metrics.forget(worker.process.pid, self._metrics)
        if self._stopping.is_set() or not (was_ready or worker.again):
            return
        pause = FIRST_PAUSE if was_ready else min(LONGEST_PAUSE, 2 * worker.pause)
        log.error("worker %d ended with code %d: another one is started", worker.process.pid, code)
        if not self._stopping.wait(pause):
            self._launch(number, warm_first=True)
            self._workers[number].again, self._workers[number].pause = True, pause

    def _heed(self, worker: _Worker, message: Mapping[str, Any]) -> None:
        if "ready" in message:
            worker.ready.set()
        elif "error" in message:
            worker.error = (
                Unavailable(message["error"])
                if message["kind"] == "Unavailable"
                else InvalidInput(message["error"])
            )
            worker.ready.set()
        else:
            # one worker was told by an administrator: all are to know
            for name in ("load", "unload"):
                if name in message:
                    (self._unloaded.add if name == "unload" else self._unloaded.discard)(message[name])
            with self._lock:
                others = [other for other in self._workers.values() if other is not worker]
            for other in others:
                other.tell(message)


class _Worker:
    """One process, as its supervisor sees it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.ready = threading.Event()
        self.error: TagstoreError | None = None
        self.again = False
        self.pause = FIRST_PAUSE
        self.thread: threading.Thread
        self._lock = threading.Lock()

    def tell(self, message: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        with self._lock:
            try:
                self.process.stdin.write(json.dumps(message) + "\n")
                self.process.stdin.flush()
            except (BrokenPipeError, ValueError):
                log.info("worker %d has gone, and was to be told %s", self.process.pid, sorted(message))


def _say(message: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> None:
    """A worker: what it is told on standard input, until that ends or SIGTERM comes."""
    order = json.loads(sys.stdin.readline())
    settings = Settings.from_json(order["settings"])
    logging.basicConfig(level=order["level"], format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if settings.json_logs:
        from tagstore.serving.logs import use_json

        use_json()
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C in a terminal reaches everybody; the supervisor decides
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    try:
        import faiss

        from tagstore.serving.server import Server

        faiss.omp_set_num_threads(settings.cores)
        server = Server(
            order["root"], order["address"], device=order["device"], settings=settings, shared=True
        )
        server.announce = _say
        for store in order["unloaded"]:
            server.catalog.unload(store)
        server.start(warm_first=order["warm_first"])
    except TagstoreError as error:
        _say({"error": str(error), "kind": type(error).__name__})
        sys.exit(1)
    _say({"ready": server.address})

    commands = {"load": server.catalog.load, "unload": server.catalog.unload}

    def listen() -> None:
        for line in sys.stdin:
            for command, store in json.loads(line).items():
                try:
                    commands[command](store)
                except TagstoreError as error:
                    log.warning("%s %s: %s", command, store, error)
        stopping.set()

    threading.Thread(target=listen, daemon=True).start()
    stopping.wait()
    server.stop()


if __name__ == "__main__":
    main()
