"""The call that a thread is working on: how long it may take, and for whom the work is counted."""

from __future__ import annotations

import threading


class _Current(threading.local):
    deadline = float("inf")
    """On the monotonic clock."""
    store = ""

    embedding = 0.0
    """Seconds that this thread has spent on embedding, ever."""


current = _Current()
