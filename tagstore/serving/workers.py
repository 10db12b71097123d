"""Several serving processes on one port, and the supervisor that starts, restarts and drains them.

The kernel spreads connections over the workers (SO_REUSEPORT). Index and LMDB are mapped, so memory holds
them once. The supervisor opens no store and serves no call. It sends each worker JSON lines on standard
input, the settings and then commands, and reads the worker's messages from standard output. A worker drains
and ends when that input closes.
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
from tagstore.serving import metrics, probes
from tagstore.serving.ports import reserve
from tagstore.serving.settings import Settings, checked_host

log = logging.getLogger(__name__)

DRAIN_SECONDS = 35.0
"""Seconds that workers get to drain before they are killed."""
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables with the number of threads, which FAISS, numpy and torch read when they are loaded."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0
"""Seconds before a worker is restarted: the pause doubles each time that one dies before it is ready."""


class Supervisor:
    """Serves `root` with `settings.workers` processes. It is used like `server.Server`.

    Raises:
        InvalidInput: the address or a setting cannot be used.
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
        self._socket = reserve(self._host, int(address.rpartition(":")[2]), address)
        self._port = self._socket.getsockname()[1]
        self._workers: dict[int, _Worker] = {}
        self._unloaded: set[str] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._metrics = tempfile.mkdtemp(prefix="tagstore-metrics-") if settings.metrics else ""
        self._stop_probes: Callable[[], None] | None = None
        self._phase = "opening stores"

    @property
    def address(self) -> str:
        """`HOST:PORT` that clients connect to."""
        return f"{self._host}:{self._port}"

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        with self._lock:
            return [worker.process.pid for worker in self._workers.values()]

    def start(self) -> None:
        """Start the workers and return once all of them answer. Raises the error of one that cannot start."""
        if self.settings.metrics:
            self._stop_probes, port = probes.serve(self.settings.metrics, self.state, self._metrics)
            log.info("metrics on port %d", port)
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
        self._phase = "serving"
        log.info("listening on %s: %s", self.address, self.settings.describe())

    def state(self) -> probes.State:
        """Say how far the workers are, and which stores are damaged."""
        with self._lock:
            workers = list(self._workers.values())
        answering = any(worker.ready.is_set() and worker.error is None for worker in workers)
        damaged = {store: what for worker in workers for store, what in worker.damaged.items()}
        return probes.State(self._phase == "serving" and answering, self._phase, damaged)

    def stop(self) -> None:
        """Let every worker finish its calls in flight, then end it."""
        self._stopping.set()
        self._phase = "stopping"
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
        if self._stop_probes is not None:
            self._stop_probes()
        if self._metrics:
            shutil.rmtree(self._metrics, ignore_errors=True)

    def _launch(self, number: int, *, warm_first: bool) -> None:
        job = {
            "root": self._root,
            "address": self.address,
            "device": self._device,
            "settings": replace(
                self.settings, metrics="", scrub=0 if number else self.settings.scrub
            ).to_json(),
            "warm_first": warm_first,
            "unloaded": sorted(self._unloaded),
            "level": logging.getLogger().getEffectiveLevel(),
        }
        threads = {name: os.environ.get(name, str(self.settings.cores)) for name in THREADS}
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **threads}
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
        worker.send(job)
        worker.thread = threading.Thread(
            target=self._attend, args=(number, worker), name=f"rpc-worker-{number}", daemon=True
        )
        worker.thread.start()

    def _attend(self, number: int, worker: _Worker) -> None:
        """Handle a worker's messages until it ends, then start another."""
        assert worker.process.stdout is not None
        for line in worker.process.stdout:
            self._handle(worker, json.loads(line))
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
            metrics.forget(worker.process.pid, self._metrics)
        if self._stopping.is_set() or not (was_ready or worker.restarted):
            return
        pause = FIRST_PAUSE if was_ready else min(LONGEST_PAUSE, 2 * worker.pause)
        log.error("worker %d ended with code %d: starting another one", worker.process.pid, code)
        if not self._stopping.wait(pause):
            self._launch(number, warm_first=True)
            self._workers[number].restarted, self._workers[number].pause = True, pause

    def _handle(self, worker: _Worker, message: Mapping[str, Any]) -> None:
        if "ready" in message:
            worker.ready.set()
        elif "error" in message:
            kind = Unavailable if message["kind"] == "Unavailable" else InvalidInput
            worker.error = kind(message["error"])
            worker.ready.set()
        elif "damaged" in message:
            worker.damaged = message["damaged"]
        else:
            # one worker has loaded, unloaded or left out a store: pass it on to all others
            for name in ("load", "unload"):
                if name in message:
                    (self._unloaded.add if name == "unload" else self._unloaded.discard)(message[name])
            with self._lock:
                others = [other for other in self._workers.values() if other is not worker]
            for other in others:
                other.send(message)


class _Worker:
    """The supervisor's side of one worker."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.ready = threading.Event()
        self.error: TagstoreError | None = None
        self.damaged: Mapping[str, str] = {}
        """What is wrong with each store that the worker leaves out."""
        self.restarted = False
        self.pause = FIRST_PAUSE
        self.thread: threading.Thread
        self._lock = threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        with self._lock:
            try:
                self.process.stdin.write(json.dumps(message) + "\n")
                self.process.stdin.flush()
            except (BrokenPipeError, ValueError):
                log.info("worker %d has ended and does not get %s", self.process.pid, sorted(message))


def _report(message: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run a worker: obey standard input until it closes or SIGTERM arrives."""
    job = json.loads(sys.stdin.readline())
    settings = Settings.from_json(job["settings"])
    logging.basicConfig(level=job["level"], format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if settings.json_logs:
        from tagstore.serving.logs import use_json

        use_json()
    # Ctrl-C in a terminal reaches all processes; the supervisor decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    try:
        import faiss

        from tagstore.serving.server import Server

        faiss.omp_set_num_threads(settings.cores)
        server = Server(job["root"], job["address"], device=job["device"], settings=settings, shared=True)
        server.announce = _report
        for store in job["unloaded"]:
            server.catalog.unload(store)
        server.start(warm_first=job["warm_first"])
    except TagstoreError as error:
        _report({"error": str(error), "kind": type(error).__name__})
        sys.exit(1)
    _report({"ready": server.address})

    commands: dict[str, Callable[[Any], object]] = {
        "load": server.catalog.load,
        "unload": server.catalog.unload,
        "leave_out": lambda about: server.catalog.leave_out(*about),
    }

    def listen() -> None:
        for line in sys.stdin:
            for command, argument in json.loads(line).items():
                try:
                    commands[command](argument)
                except TagstoreError as error:
                    log.warning("%s %s: %s", command, argument, error)
        stopping.set()

    threading.Thread(target=listen, daemon=True).start()
    stopping.wait()
    server.stop()


if __name__ == "__main__":
    main()
