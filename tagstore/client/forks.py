"""gRPC and fork, so that a DataLoader's workers don't hang.

gRPC hangs in the child, or the parent, of a fork that happens while any thread is inside a call, and in every child if its fork support
is off, which is the default. So fork support is turned on before grpc is imported, calls and forks exclude each other (`calling`), and
no channel is ever used by another process than the one that opened it (`Opened`).
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from tagstore.errors import TagstoreError

# read once, when grpc is imported
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "1")

T = TypeVar("T")

_gate = threading.Condition()
_calls = 0
_used = False
"""Whether this process has made a call."""
_inherited_use = False
"""Whether a process that this one was forked from had."""


@contextmanager
def calling() -> Iterator[None]:
    """Around each call of gRPC: a fork waits for it to end, and it for a fork.

    Raises `TagstoreError` in a forked process where gRPC would hang, because fork support was off when its parent used it.
    """
    global _calls, _used
    with _gate:
        if _inherited_use and not _used:
            _check_support()
        _used = True
        _calls += 1
    try:
        yield
    finally:
        with _gate:
            _calls -= 1
            _gate.notify_all()


def _check_support() -> None:
    from grpc._cython import cygrpc

    if not cygrpc.is_fork_support_enabled():
        raise TagstoreError(
            "this process was forked from one that used gRPC without fork support, and would hang: import tagstore.client before grpc, "
            "set GRPC_ENABLE_FORK_SUPPORT=1, or start workers with spawn or forkserver"
        )


def _before() -> None:
    _gate.acquire()
    # a call that waits for its answer ends with its deadline at the latest
    while _calls:
        _gate.wait()


def _after_in_parent() -> None:
    _gate.release()


def _after_in_child() -> None:
    global _gate, _calls, _used, _inherited_use
    _gate, _calls = threading.Condition(), 0
    _used, _inherited_use = False, _used or _inherited_use
    for opened in list(_opened):
        opened.leave()
    for lock in list(_locks):
        lock.renew()


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)


class Opened(Generic[T]):
    """Something that a process opens at first use; the child of a fork opens its own and leaves the parent's alone."""

    def __init__(self, opener: Callable[[], T]) -> None:
        self._opener = opener
        self._lock = threading.Lock()
        self._value: T | None = None
        self._inherited: list[T | None] = []
        """Kept, because destroying it would touch what the parent still uses."""
        with _gate:
            _opened.add(self)

    def get(self) -> T:
        """The process's own, opened now if it isn't yet."""
        with self._lock:
            if self._value is None:
                self._value = self._opener()
            return self._value

    def take(self) -> T | None:
        """The process's own, if open, for its owner to close; the next `get` opens another."""
        with self._lock:
            value, self._value = self._value, None
            return value

    def leave(self) -> None:
        """In the child of a fork: forget the parent's."""
        # the lock may have been held by a thread of the parent, which is not here to release it
        self._lock = threading.Lock()
        self._inherited.append(self._value)
        self._value = None


class Lock:
    """A lock that is free in the child of a fork, whoever held it in the parent."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        with _gate:
            _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def renew(self) -> None:
        """In the child of a fork: the thread that may have held it is not here."""
        self._lock = threading.Lock()


_opened: weakref.WeakSet[Opened[Any]] = weakref.WeakSet()
_locks: weakref.WeakSet[Lock] = weakref.WeakSet()
