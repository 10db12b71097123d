"""Waiting in tests: for a condition instead of a duration, and on a clock that a test moves."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Return once `condition()` is true; fail after `seconds`, which a correct program never needs."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not true within {seconds:g} s"
        time.sleep(0.001)


class Clock:
    """Stands for the module `time` in a module under test, moved `ahead` seconds of the real one."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead
