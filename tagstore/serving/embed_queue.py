"""Concurrent calls become batches without a thread of their own and without waiting for company.

A call that finds a free slot runs at once, in its own thread: an idle server adds no hop and no window. Calls that come while all slots are
taken wait in a queue; whoever finishes hands its slot to the first of them, which runs everything in the queue that fits with its own
work as one batch. So the window is as long as the work before it takes: zero when idle, and the busier, the larger the batches.

The queue is bounded by time: a call that would wait longer than `max_wait` is refused at once with `Overloaded` (unless hardly anything
waits), and one whose deadline passes while it waits is dropped before any work is done for it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, Generic, TypeVar

from tagstore.errors import Overloaded, TimedOut

T = TypeVar("T")
R = TypeVar("R")

Observe = Callable[[int, float], None]
"""Called for each batch with its rows and the seconds that the first of it waited."""


class _Call(Generic[T, R]):
    __slots__ = ("arrived", "batch", "deadline", "error", "gate", "item", "key", "result", "rows")

    def __init__(self, key: object, item: T, rows: int, deadline: float) -> None:
        self.key, self.item, self.rows, self.deadline = key, item, rows, deadline
        self.arrived = time.monotonic()
        self.gate = Lock()
        self.gate.acquire()
        self.batch: list[_Call[T, R]] | None = None
        self.result: R | None = None
        self.error: BaseException | None = None


class Batcher(Generic[T, R]):
    """Runs items of concurrent calls together. Safe for threads.

    Args:
        run: computes the results of items that have the same key, in their order. If it raises for several, each is run by itself, so that
            one bad item does not fail the others.
        name: of the work, for messages: "search".
        rows: at most so many rows a batch; an item larger than that runs alone.
        slots: batches that run at a time.
        max_wait: seconds that a call may be expected to wait.
        spare: rows that may always wait, however slow the work is.
        observe: see `Observe`.
    """

    def __init__(
        self,
        run: Callable[[Any, Sequence[T]], Sequence[R]],
        *,
        name: str,
        rows: int,
        slots: int,
        max_wait: float,
        spare: int = 0,
        observe: Observe = lambda rows, waited: None,
    ) -> None:
        self._run, self.name, self.rows, self.slots, self._observe = run, name, rows, slots, observe
        self.max_wait, self.spare = max_wait, spare
        self._lock = Lock()
        self._queue: deque[_Call[T, R]] = deque()
        self._queued = 0
        self._running = 0
        self._seconds_a_row = 0.0

    @property
    def depth(self) -> int:
        """Rows that wait."""
        return self._queued

    def expected(self) -> float:
        """Seconds that a call which comes now would wait, as things went lately."""
        return self._queued * self._seconds_a_row / self.slots if self._running >= self.slots else 0.0

    def admit(self) -> None:
        """Raises `Overloaded` as a call would: for what has work to do before it gets here."""
        wait = self.expected()
        if wait > self.max_wait and self._queued >= self.spare:
            raise Overloaded(
                f"{self._queued} queries wait for the {self.name}, {wait:.2f} s of work: try again later",
                wait,
            )

    def __call__(self, key: object, item: T, rows: int = 1, deadline: float = float("inf")) -> R:
        """The result of an item.

        Args:
            key: only items of equal keys share a batch.
            rows: how much work the item is.
            deadline: on the monotonic clock.

        Raises:
            Overloaded: the queue is as long as it may be.
            TimedOut: the deadline passed before its turn came.
            Whatever `run` raises for this item.
        """
        call: _Call[T, R] = _Call(key, item, rows, deadline)
        if call.arrived >= deadline:
            raise TimedOut(f"the deadline had passed before the {self.name} began: allow more time")
        with self._lock:
            if self._running < self.slots:
                self._running += 1
                call.batch = [call]
            else:
                self.admit()
                self._queue.append(call)
                self._queued += rows
        if call.batch is None:
            self._wait(call)
        if call.batch is not None:
            self._lead(call, call.batch)
        if call.error is not None:
            raise call.error
        return call.result  # type: ignore[return-value]

    def _wait(self, call: _Call[T, R]) -> None:
        """Until the call's result is there, or it is its turn to lead."""
        timeout = min(call.deadline - time.monotonic(), 3600.0)
        if call.gate.acquire(timeout=max(0.0, timeout)):
            return
        with self._lock:
            if call in self._queue:
                self._queue.remove(call)
                self._queued -= call.rows
                call.error = TimedOut(
                    f"the deadline passed while the query waited for the {self.name}: allow more time, or come when it is calm"
                )
                return
        call.gate.acquire()  # it is under way already

    def _lead(self, leader: _Call[T, R], batch: list[_Call[T, R]]) -> None:
        start = time.monotonic()
        due = []
        for call in batch:
            if call.deadline <= start:
                call.error = TimedOut(
                    f"the deadline passed while the query waited for the {self.name}: allow more time"
                )
            else:
                due.append(call)
        try:
            if due:
                self._observe(sum(call.rows for call in due), start - due[0].arrived)
                self._answer(due)
        finally:
            self._hand_over(sum(call.rows for call in due), time.monotonic() - start)
            for call in batch:
                if call is not leader:
                    call.gate.release()

    def _answer(self, calls: list[_Call[T, R]]) -> None:
        try:
            for call, result in zip(
                calls, self._run(calls[0].key, [call.item for call in calls]), strict=True
            ):
                call.result = result
        except Exception as error:  # noqa: BLE001  it is raised in the thread of the call that it belongs to
            if len(calls) == 1:
                calls[0].error = error
                return
            for call in calls:
                self._answer([call])

    def _hand_over(self, rows: int, seconds: float) -> None:
        """Give the slot to the first of the queue and what fits with it, or let it go."""
        with self._lock:
            if rows:
                now = seconds / rows
                self._seconds_a_row = (
                    now if not self._seconds_a_row else 0.9 * self._seconds_a_row + 0.1 * now
                )
            if not self._queue:
                self._running -= 1
                return
            first = self._queue.popleft()
            batch, taken, left = [first], first.rows, deque[_Call[T, R]]()
            for call in self._queue:
                if call.key == first.key and taken + call.rows <= self.rows:
                    batch.append(call)
                    taken += call.rows
                else:
                    left.append(call)
            self._queue = left
            self._queued -= taken
            first.batch = batch
            first.gate.release()
