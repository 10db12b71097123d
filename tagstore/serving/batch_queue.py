"""Queries of concurrent calls, searched together beside the event loop.

The loop takes calls in and sends answers; threads search. What comes while a search of its kind is under way waits for it, and then goes
with all the others that wait: no window to tune, zero when idle, and the busier, the larger the batches. One search of a kind at a time: it
uses the cores by itself, and more Python threads at work would only take the interpreter from each other and from the loop (four threads
cost twice the CPU of one here). For the same reason what is made of the finds, which is Python's work, is made in the loop where that is
known to be quick; a thread that did it beside the loop would only make both of them wait for the interpreter (a sixth fewer answers here).
A query that comes alone to an idle server, of a kind known to be quick, is searched at once in the loop: to hand it to a thread and back
takes longer than it may take.

The queue is bounded by time: a call that would wait longer than `max_wait` is refused at once with `Overloaded` (unless hardly anything
waits). One whose caller has gone, or whose deadline passes, while it waits is dropped before any work is done for it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from queue import SimpleQueue
from typing import Generic, TypeVar

from tagstore.errors import Overloaded, TimedOut

T = TypeVar("T")
F = TypeVar("F")
R = TypeVar("R")

KINDS_REMEMBERED = 4096
PAUSE, SHORTEST_PAUSE = 0.1, 0.001
"""After a batch of a slow kind, as a share of what it took, and the least worth a timer, in seconds: those who are answered ask again, and
go along with those that came meanwhile. Without it callers fall into two groups that wait for each other."""
FEWEST_BATCHES = 8
"""From which on it is known what a kind takes: the first ones of a new version read what nobody has read yet, and are small."""
FINISH_SECONDS = 0.005
"""What may be made in the loop's thread of a batch's finds: half as long again as 64 plain queries take on a slow core."""


class _Call(Generic[T, R]):
    __slots__ = ("arrived", "deadline", "future", "item", "rows")

    def __init__(
        self, item: T, rows: int, deadline: float, arrived: float, future: asyncio.Future[R]
    ) -> None:
        self.item, self.rows, self.deadline, self.arrived, self.future = item, rows, deadline, arrived, future


class _Pace:
    """Seconds a row that a kind took lately."""

    __slots__ = ("batches", "finish", "run")

    def __init__(self) -> None:
        self.run = self.finish = 0.0
        self.batches = 0

    def took(self, rows: int, run: float, finish: float) -> None:
        share = 0.1 if self.batches else 1.0
        self.run += share * (run / rows - self.run)
        self.finish += share * (finish / rows - self.finish)
        self.batches += 1


class _Batch(Generic[T, F, R]):
    """Calls of one kind, on their way through."""

    __slots__ = ("calls", "finish_seconds", "found", "key", "results", "rows", "run_seconds", "whole")

    def __init__(self, key: Hashable, calls: list[_Call[T, R]], rows: int, whole: bool) -> None:
        self.key, self.calls, self.rows = key, calls, rows
        self.whole = whole
        """Whether who runs it makes its results too."""
        self.found: F | None = None
        self.results: Sequence[R | Exception] | None = None
        self.run_seconds = self.finish_seconds = 0.0


class Searches(Generic[T, F, R]):
    """Runs items of concurrent calls together. All of it is used in the loop's thread, but for `run` and `finish`.

    Args:
        run: finds what there is to find for items that have the same key; called in any thread. Has most of the work, and leaves the
            interpreter to others while it does it. If it or `finish` raises for several items, each is run by itself, so that one bad item
            does not fail the others.
        finish: makes the results of the items from it, in their order; called in any thread.
        rows: at most so many rows a batch; an item larger than that runs alone.
        threads: batches that run at a time, of different keys.
        max_wait: seconds that a call may be expected to wait.
        spare: rows that may always wait, however slow the work is.
        inline: seconds that a lone item may be expected to take in the loop's thread.
        alone: whether the loop has nothing else in hand.
        observe: called for each batch with its first item, its rows and the seconds that the first waited.
    """

    def __init__(
        self,
        run: Callable[[Sequence[T]], F],
        finish: Callable[[Sequence[T], F], Sequence[R]],
        loop: asyncio.AbstractEventLoop,
        *,
        rows: int,
        threads: int,
        max_wait: float,
        spare: int = 0,
        inline: float = 0.0,
        alone: Callable[[], bool] = lambda: True,
        observe: Callable[[T, int, float], None] = lambda item, rows, waited: None,
    ) -> None:
        self._run, self._finish, self._loop, self.rows, self._observe = run, finish, loop, rows, observe
        self.max_wait, self.spare, self.inline, self._alone = max_wait, spare, inline, alone
        self._waiting: dict[Hashable, deque[_Call[T, R]]] = {}
        self._running: set[Hashable] = set()
        self._paces: dict[Hashable, _Pace] = {}
        self._free = threads
        self._scheduled = False
        self.depth = 0
        """Rows that wait."""
        self._work: SimpleQueue[_Batch[T, F, R] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._serve, name=f"search-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def expected(self, key: Hashable) -> float:
        """Seconds that a call which comes now would wait for others of its kind, as things went lately; 0 while that is not known."""
        waiting, pace = self._waiting.get(key), self._paces.get(key)
        if not waiting or pace is None or pace.batches < FEWEST_BATCHES:
            return 0.0
        return sum(call.rows for call in waiting) * (pace.run + pace.finish)

    def close(self) -> None:
        """Let the threads end."""
        for _ in self._threads:
            self._work.put(None)

    def submit(
        self, key: Hashable, item: T, rows: int = 1, deadline: float = float("inf")
    ) -> asyncio.Future[R]:
        """What will be the result of an item, or what `run` raises for it.

        Args:
            key: only items of equal keys share a batch.
            rows: how much work the item is.
            deadline: on the monotonic clock.

        Raises:
            Overloaded: the queue is as long as it may be.
            TimedOut: the deadline has passed.
        """
        now = time.monotonic()
        if now >= deadline:
            raise TimedOut("the deadline had passed before the search began: allow more time")
        waiting = self._waiting.get(key)
        if waiting is None:
            waiting = self._waiting[key] = deque()
        elif self.depth >= self.spare and (wait := self.expected(key)) > self.max_wait:
            raise Overloaded(
                f"{self.depth} queries wait for the search, {wait:.2f} s of work: try again later", wait
            )
        call: _Call[T, R] = _Call(item, rows, deadline, now, self._loop.create_future())
        waiting.append(call)
        self.depth += rows
        if self._free > 0 and not self._scheduled and key not in self._running:
            self._scheduled = True
            self._loop.call_soon(self._start)  # after what else came in this turn of the loop: it goes along
        return call.future

    def sweep(self) -> None:
        """Let go of what nobody waits for any more; to be called when a call that waited was cancelled."""
        for key, waiting in list(self._waiting.items()):
            kept = deque(call for call in waiting if not call.future.done())
            self.depth -= sum(call.rows for call in waiting) - sum(call.rows for call in kept)
            if kept:
                self._waiting[key] = kept
            else:
                del self._waiting[key]

    def _start(self) -> None:
        """Give what waits to free threads, the kind that has waited longest first."""
        self._scheduled = False
        for key in list(self._waiting):
            if self._free <= 0:
                return
            if key in self._running:
                continue
            batch = self._take(key)
            if batch is None:
                continue
            if (
                len(batch.calls) == 1
                and not self._running
                and not self._waiting
                and self._alone()
                and self._quick(batch)
            ):
                batch.whole = True
                self._work_on(batch)
                self._answer(batch)
            else:
                self._running.add(key)
                self._free -= 1
                self._work.put(batch)

    def _quick(self, batch: _Batch[T, F, R]) -> bool:
        pace = self._paces.get(batch.key)
        return pace is not None and (pace.run + pace.finish) * batch.rows <= self.inline

    def _take(self, key: Hashable) -> _Batch[T, F, R] | None:
        """The first of a kind and what fits with it; what nobody waits for any more is left out."""
        waiting = self._waiting.pop(key)
        batch: list[_Call[T, R]] = []
        taken, now = 0, time.monotonic()
        while waiting and (not batch or taken + waiting[0].rows <= self.rows):
            call = waiting.popleft()
            self.depth -= call.rows
            if call.future.done():
                continue
            if call.deadline <= now:
                call.future.set_exception(
                    TimedOut("the deadline passed while the query waited for the search: allow more time")
                )
                continue
            batch.append(call)
            taken += call.rows
        if waiting:
            self._waiting[key] = waiting  # behind the others
        if not batch:
            return None
        self._observe(batch[0].item, taken, now - batch[0].arrived)
        pace = self._paces.get(key)
        return _Batch(key, batch, taken, whole=pace is None or pace.finish * taken > FINISH_SECONDS)

    def _serve(self) -> None:
        while (batch := self._work.get()) is not None:
            self._work_on(batch)
            self._loop.call_soon_threadsafe(self._done, batch)
            del batch

    def _work_on(self, batch: _Batch[T, F, R]) -> None:
        """Find what there is to find, and of a whole batch make the results. One by one, if together they fail."""
        items = [call.item for call in batch.calls]
        start = middle = time.monotonic()
        try:
            batch.found = self._run(items)
            middle = time.monotonic()
            if batch.whole:
                batch.results = self._finish(items, batch.found)
        except Exception as error:  # noqa: BLE001  it is raised in the call that it belongs to
            batch.results = [error] if len(items) == 1 else [self._result(item) for item in items]
        batch.run_seconds, batch.finish_seconds = middle - start, time.monotonic() - middle

    def _result(self, item: T) -> R | Exception:
        try:
            return self._finish([item], self._run([item]))[0]
        except Exception as error:  # noqa: BLE001  as above
            return error

    def _done(self, batch: _Batch[T, F, R]) -> None:
        self._free += 1
        pause = PAUSE * batch.run_seconds
        if pause > SHORTEST_PAUSE and len(batch.calls) > 1 and batch.rows < self.rows:
            self._loop.call_later(pause, self._go_on, batch.key)
            self._start()
        else:
            self._go_on(batch.key)  # first, so that the next search is under way meanwhile
        if batch.results is None and not self._finished(batch):
            self._running.add(batch.key)
            self._free -= 1
            self._work.put(batch)  # again, by a thread, one by one
            return
        self._answer(batch)

    def _go_on(self, key: Hashable) -> None:
        self._running.discard(key)
        self._start()

    def _finished(self, batch: _Batch[T, F, R]) -> bool:
        assert batch.found is not None
        start = time.monotonic()
        try:
            batch.results = self._finish([call.item for call in batch.calls], batch.found)
        except Exception:  # noqa: BLE001  a thread finds out whose it is
            batch.whole = True
            return False
        batch.finish_seconds = time.monotonic() - start
        return True

    def _answer(self, batch: _Batch[T, F, R]) -> None:
        pace = self._paces.pop(batch.key, None) or _Pace()
        pace.took(batch.rows, batch.run_seconds, batch.finish_seconds)
        self._paces[batch.key] = pace  # the last one used stands last
        if len(self._paces) > KINDS_REMEMBERED:
            del self._paces[next(iter(self._paces))]
        assert batch.results is not None
        for call, result in zip(batch.calls, batch.results, strict=True):
            if call.future.done():
                continue  # its caller has gone
            if isinstance(result, Exception):
                call.future.set_exception(result)
            else:
                call.future.set_result(result)
