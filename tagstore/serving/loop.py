"""The event loop that all servers of a process share: gRPC's asyncio API has one event queue per process."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def loop() -> asyncio.AbstractEventLoop:
    """Return the loop, which runs in its own thread."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = uvloop.new_event_loop()
            threading.Thread(target=_run, args=(_loop,), name="rpc-loop", daemon=True).start()
        return _loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in the loop and return its result. Call this from another thread than the loop's."""
    return asyncio.run_coroutine_threadsafe(work, loop()).result()


def _forget() -> None:
    global _loop, _lock
    _loop, _lock = None, threading.Lock()  # a forked child has none of its parent's threads


os.register_at_fork(after_in_child=_forget)
