"""A server that runs until it is told to end."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from typing import Protocol

log = logging.getLogger(__name__)


class Runs(Protocol):
    """What one process (`Server`) and several on a port (`Supervisor`) have in common."""

    @property
    def address(self) -> str: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...


def run(server: Runs, ready: Callable[[str], None]) -> None:
    """Start, call `ready` with the address, serve until SIGINT or SIGTERM, drain."""
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    server.start()
    ready(server.address)
    stopping.wait()
    log.info("draining")
    server.stop()
