"""Keep gRPC and fork apart, so that the workers of a DataLoader do not hang.

gRPC hangs in the child or the parent of a fork that happens while a thread is inside a call, and in every
child if its fork support is off, which is the default. So fork support is turned on before grpc is imported,
a fork waits until the calls under way have ended (`hold_forks`), and a process never uses what another one
opened (`PerProcess`).
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

from tagstore.errors import TagstoreError

# read once, when grpc is imported
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "1")

P = ParamSpec("P")
T = TypeVar("T")

_gate = threading.Condition()
_calls_under_way = 0
_used_here = False
"""Whether this process has called gRPC."""
_used_by_ancestor = False
"""Whether a process from which this one was forked has."""


def hold_forks(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function of gRPC. A fork waits until it returns, and it waits until a fork is over.

    Raises `TagstoreError` in a forked process where gRPC would hang, because its parent used gRPC without
    fork support.
    """
    global _calls_under_way, _used_here
    with _gate:
        if _used_by_ancestor and not _used_here:
            _check_fork_support()
        _used_here = True
        _calls_under_way += 1
    try:
        return function(*args, **kwargs)
    finally:
        with _gate:
            _calls_under_way -= 1
            _gate.notify_all()


def _check_fork_support() -> None:
    from grpc._cython import cygrpc

    if not cygrpc.is_fork_support_enabled():
        raise TagstoreError(
            "this process was forked from one that used gRPC without fork support, and would hang: "
            "import tagstore.client before grpc, set GRPC_ENABLE_FORK_SUPPORT=1, "
            "or start workers with spawn or forkserver"
        )


def _before_fork() -> None:
    _gate.acquire()
    # every call ends with its deadline at the latest
    while _calls_under_way:
        _gate.wait()


def _after_fork_in_parent() -> None:
    _gate.release()


def _after_fork_in_child() -> None:
    global _gate, _calls_under_way, _used_here, _used_by_ancestor
    _gate, _calls_under_way = threading.Condition(), 0
    _used_here, _used_by_ancestor = False, _used_here or _used_by_ancestor
    for instance in list(_fork_safe):
        instance.after_fork()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
)


class ForkSafe:
    """An object with a lock that is free in the child of a fork, whoever held it in the parent."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        with _gate:
            _fork_safe.add(self)

    def after_fork(self) -> None:
        """Renew the lock in the child: the thread that may have held it does not exist here."""
        self.lock = threading.Lock()


class PerProcess(ForkSafe, Generic[T]):
    """A value that each process opens at first use; the child of a fork leaves its parent's alone."""

    def __init__(self, opener: Callable[[], T]) -> None:
        super().__init__()
        self._opener = opener
        self._value: T | None = None
        self._inherited: list[T | None] = []
        """Values of parents, kept because destroying them would touch what the parents still use."""

    def get(self) -> T:
        """Return this process's value, and open it first if it is not open."""
        with self.lock:
            if self._value is None:
                self._value = self._opener()
            return self._value

    def take(self) -> T | None:
        """Hand over this process's value, if open, to be closed; the next `get` opens another."""
        with self.lock:
            value, self._value = self._value, None
            return value

    def after_fork(self) -> None:
        super().after_fork()
        self._inherited.append(self._value)
        self._value = None


_fork_safe: weakref.WeakSet[ForkSafe] = weakref.WeakSet()
