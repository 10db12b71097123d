"""Queries of concurrent calls, searched together beside the event loop.

The loop takes calls in and sends answers; threads search. What comes while a search of its kind is under way waits for it, and then goes
with all the others that wait: no window to tune, zero when idle, and the busier, the larger the batches. One search of a kind at a time: it
uses the cores by itself, and more Python threads at work would only take the interpreter from each other and from the loop (four threads
cost twice the CPU of one here). A query that comes alone to an idle server, of a kind known to be quick, is searched at once in
the loop: to hand it to a thread and back takes longer than it may take.

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
R = TypeVar("R")

KINDS_REMEMBERED = 4096


class _Call(Generic[T, R]):
    __slots__ = ("arrived", "deadline", "future", "item", "rows")

    def __init__(self, item: T, rows: int, deadline: float, arrived: float, future: asyncio.Future[R]) -> None:
        self.item, self.rows, self.deadline, self.arrived, self.future = item, rows, deadline, arrived, future


class Searches(Generic[T, R]):
    """Runs items of concurrent calls together. All of it is used in the loop's thread, but for `run`.

    Args:
        run: computes the results of items that have the same key, in their order; called in any thread. If it raises for several, each is
            run by itself, so that one bad item does not fail the others.
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
        run: Callable[[Sequence[T]], Sequence[R]],
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
        self._run, self._loop, self.rows, self._observe = run, loop, rows, observe
        self.max_wait, self.spare, self.inline, self._alone = max_wait, spare, inline, alone
        self._waiting: dict[Hashable, deque[_Call[T, R]]] = {}
        self._running: set[Hashable] = set()
        self._seconds_a_row: dict[Hashable, float] = {}
        self._free = threads
        self._scheduled = False
        self.depth = 0
        """Rows that wait."""
        self._work: SimpleQueue[tuple[Hashable, list[_Call[T, R]]] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._serve, name=f"search-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def expected(self, key: Hashable) -> float:
        """Seconds that a call which comes now would wait for others of its kind, as things went lately."""
        waiting = self._waiting.get(key)
        return sum(call.rows for call in waiting) * self._seconds_a_row.get(key, 0.0) if waiting else 0.0

    def close(self) -> None:
        """Let the threads end."""
        for _ in self._threads:
            self._work.put(None)

    def submit(self, key: Hashable, item: T, rows: int = 1, deadline: float = float("inf")) -> asyncio.Future[R]:
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
            raise Overloaded(f"{self.depth} queries wait for the search, {wait:.2f} s of work: try again later", wait)
        call: _Call[T, R] = _Call(item, rows, deadline, now, self._loop.create_future())
        waiting.append(call)
        self.depth += rows
        if self._free and not self._scheduled and key not in self._running:
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
            if not self._free:
                return
            if key in self._running:
                continue
            batch = self._take(key)
            if not batch:
                continue
            if len(batch) == 1 and not self._running and not self._waiting and self._alone() and self._quick(key, batch[0].rows):
                self._finish(key, batch, *self._answered(batch))
            else:
                self._running.add(key)
                self._free -= 1
                self._work.put((key, batch))

    def _quick(self, key: Hashable, rows: int) -> bool:
        return self._seconds_a_row.get(key, float("inf")) * rows <= self.inline

    def _take(self, key: Hashable) -> list[_Call[T, R]]:
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
                call.future.set_exception(TimedOut("the deadline passed while the query waited for the search: allow more time"))
                continue
            batch.append(call)
            taken += call.rows
        if waiting:
            self._waiting[key] = waiting  # behind the others
        if batch:
            self._observe(batch[0].item, taken, now - batch[0].arrived)
        return batch

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            key, batch = work
            results, seconds = self._answered(batch)
            self._loop.call_soon_threadsafe(self._done, key, batch, results, seconds)
            del work, batch, results

    def _answered(self, batch: Sequence[_Call[T, R]]) -> tuple[Sequence[R | Exception], float]:
        start = time.monotonic()
        return self._results([call.item for call in batch]), time.monotonic() - start

    def _results(self, items: Sequence[T]) -> Sequence[R | Exception]:
        try:
            return self._run(items)
        except Exception as error:  # noqa: BLE001  it is raised in the call that it belongs to
            if len(items) == 1:
                return [error]
            return [result for item in items for result in self._results([item])]

    def _done(self, key: Hashable, batch: Sequence[_Call[T, R]], results: Sequence[R | Exception], seconds: float) -> None:
        self._running.discard(key)
        self._free += 1
        if self._waiting:
            self._start()
        self._finish(key, batch, results, seconds)

    def _finish(self, key: Hashable, batch: Sequence[_Call[T, R]], results: Sequence[R | Exception], seconds: float) -> None:
        now = seconds / sum(call.rows for call in batch)
        before = self._seconds_a_row.pop(key, now)
        self._seconds_a_row[key] = 0.9 * before + 0.1 * now
        if len(self._seconds_a_row) > KINDS_REMEMBERED:
            del self._seconds_a_row[next(iter(self._seconds_a_row))]
        for call, result in zip(batch, results, strict=True):
            if call.future.done():
                continue  # its caller has gone
            if isinstance(result, Exception):
                call.future.set_exception(result)
            else:
                call.future.set_result(result)
