"""The scrub of a server: a process that reads the stores slowly; what it finds goes into log and metrics."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from threading import Event, Lock, Thread

from tagstore.serving import metrics

COMMAND = ("-m", "tagstore.upkeep.scrub")
RESTART_SECONDS = 60.0
"""Seconds before a scrub that died is started again."""
CRASHES = (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT)


class Scrubber:
    """Runs `upkeep.scrub` until it is stopped.

    Args:
        rate: MiB a second.
        damaged: returns the stores that are not to be read.
        found: called with a store and what is wrong with it.
    """

    def __init__(
        self,
        root: Path,
        rate: int,
        damaged: Callable[[], Collection[str]],
        found: Callable[[str, str], None],
    ) -> None:
        self._command = [sys.executable, *COMMAND, str(root), str(rate << 20)]
        self._damaged, self._found = damaged, found
        self._ended, self._lock = Event(), Lock()
        self._process: subprocess.Popen[str] | None = None
        self._thread = Thread(target=self._run, name="rpc-scrub", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the process."""
        with self._lock:
            self._ended.set()
            if self._process is not None:
                self._process.terminate()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            with self._lock:
                if self._ended.is_set():
                    return
                self._process = process = subprocess.Popen(
                    [*self._command, *self._damaged()],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            with process:
                store = self._follow(process)
            if process.returncode in CRASHES and store:
                self._found(store, f"reading it brought the reader down (exit code {process.returncode})")
            self._ended.wait(RESTART_SECONDS)

    def _follow(self, process: subprocess.Popen[str]) -> str:
        """Handle what the process says until it ends; returns the store that it was reading."""
        assert process.stdout is not None
        store = ""
        for line in process.stdout:
            message = json.loads(line)
            store = message.get("store", store)
            if "bytes" in message:
                metrics.SCRUBBED.inc(message["bytes"])
            if "share" in message:
                metrics.child(metrics.SCRUB_SHARE, store).set(message["share"])
            if "damaged" in message:
                self._found(message["damaged"], message["what"])
        return store
