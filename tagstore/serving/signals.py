"""Run a server until a signal ends it."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from typing import Protocol

log = logging.getLogger(__name__)


class RunnableServer(Protocol):
    """A server of one process (`Server`) or of several on one port (`Supervisor`)."""

    @property
    def address(self) -> str: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...


def run(server: RunnableServer, ready: Callable[[str], None]) -> None:
    """Start, call `ready` with the address, serve until SIGINT or SIGTERM, drain."""
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    server.start()
    ready(server.address)
    stopping.wait()
    log.info("draining")
    server.stop()
