"""Makes glibc give memory back that a server has freed.

By itself it keeps what was freed once for later: after six pictures of 400 MB a process stayed at 6.8 GB.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
"""Options of glibc's mallopt."""
MAPPED_BYTES = 8 << 20
"""Blocks of this size or more go back to the system when they are freed: those of large pictures and
messages, not those of an encoder, which needs the same ones again and again. glibc raises it by itself unless
it is set."""
ARENAS = 2
"""With an arena for each thread, no thread reuses memory that another has freed, and a busy server grows."""
TRIM_BYTES = 64 << 20
"""Bytes of requests, pictures and answers after which free pages between smaller blocks are given back."""


def configure() -> None:
    """Set the options of this process's allocator."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_ARENA_MAX, ARENAS)
    libc.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)


def trim() -> None:
    """Give free memory back to the system."""
    ctypes.CDLL(None).malloc_trim(0)


class Trimmer:
    """Trims after much was allocated and freed, and once more when nothing is any longer.

    Args:
        moved: tells how many bytes have been allocated so far for requests, pictures and answers.
    """

    def __init__(self, moved: Callable[[], int]) -> None:
        self._moved = moved
        self._last = self._trimmed = moved()

    def look(self) -> bool:
        """Trim if it is time; call this every second or so. Tells whether it did."""
        moved = self._moved()
        still, self._last = moved == self._last, moved
        if moved - self._trimmed < TRIM_BYTES and not (still and moved > self._trimmed):
            return False
        self._trimmed = moved
        trim()
        return True
