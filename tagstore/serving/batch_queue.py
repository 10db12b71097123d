"""Batches the work of concurrent calls: searches in one queue, images and texts in another.

The event loop receives calls and sends answers; threads do the work. A call that arrives while a batch of its
kind runs waits for it, then joins all others that wait. So there is no window to tune, an idle server adds no
delay, and batches grow with the load. One batch of a kind runs at a time: it uses all cores, and further
Python threads would contend for the interpreter (four threads cost twice the CPU time of one). For the same
reason the loop itself finishes a batch, which is Python work, if that is known to be short: a thread would
contend with the loop (a sixth fewer answers). A lone query of a short kind runs in the loop of an idle
server, because handing it to a thread takes longer.

Time bounds the queue. A call that would wait longer than `max_wait` is refused at once with `Overloaded`,
unless few rows wait. A call whose caller leaves or whose deadline passes is dropped before any work for it.
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
from tagstore.serving import metrics

T = TypeVar("T")
F = TypeVar("F")
R = TypeVar("R")

MAX_PACES = 4096
"""Kinds of work whose pace is kept."""
REGROUP_SHARE = 0.1
"""Pause after a batch, as a share of its run time. Callers that were answered ask again and join those that
came meanwhile; without the pause they form two groups that wait for each other."""
MIN_PAUSE = 0.001
"""Seconds of the shortest pause that gets a timer."""
TRUSTED_BATCHES = 8
"""Batches to observe before the pace of a kind is trusted: the first of a version read cold pages."""
FINISH_SECONDS = 0.005
"""Seconds that finishing a batch may take in the loop: 1.5 times that of 64 plain queries on a slow core."""


class _Call(Generic[T, R]):
    """An item that waits for a batch."""

    __slots__ = ("arrived", "deadline", "future", "item", "rows", "store")

    def __init__(
        self, item: T, rows: int, deadline: float, store: str, arrived: float, future: asyncio.Future[R]
    ) -> None:
        self.item, self.rows, self.deadline, self.store = item, rows, deadline, store
        self.arrived, self.future = arrived, future


class _Pace:
    """Moving averages of the seconds per row that a kind takes, to run and to finish."""

    __slots__ = ("batches", "finish", "run")

    def __init__(self) -> None:
        self.run = self.finish = 0.0
        self.batches = 0

    def update(self, rows: int, run: float, finish: float) -> None:
        share = 0.1 if self.batches else 1.0
        self.run += share * (run / rows - self.run)
        self.finish += share * (finish / rows - self.finish)
        self.batches += 1


class _Batch(Generic[T, F, R]):
    """Calls of one kind that are processed together."""

    __slots__ = (
        "calls",
        "finish_here",
        "finish_seconds",
        "key",
        "outcome",
        "results",
        "rows",
        "run_seconds",
        "waited",
    )

    def __init__(
        self, key: Hashable, calls: list[_Call[T, R]], rows: int, waited: float, finish_here: bool
    ) -> None:
        self.key, self.calls, self.rows, self.waited = key, calls, rows, waited
        self.finish_here = finish_here
        """Whether the thread that runs the batch also finishes it."""
        self.outcome: F | None = None
        self.results: Sequence[R | Exception] | None = None
        self.run_seconds = self.finish_seconds = 0.0


class BatchQueue(Generic[T, F, R]):
    """Runs items of concurrent calls together. Other threads than the loop's may use `wait` only.

    Args:
        name: name of the worker, for messages: "search".
        run: does most of the work for items of one key, in any thread, and releases the interpreter
            meanwhile. If it or `finish` raises for several items, each is run by itself, so that one bad item
            does not fail the rest.
        finish: makes the results of the items, in their order, from what `run` returned; in any thread.
        stages: names of `run`, and of `finish` if it is measured, for metrics.
        rows: largest number of rows in a batch; a larger item runs alone.
        threads: number of batches, of different keys, that run at a time.
        max_wait: longest expected wait of a call, in seconds.
        spare: rows that may always wait, however slow the work is.
        inline: longest expected time of a lone item in the loop's thread, in seconds.
        alone: tells whether the loop has nothing else to do.
        trusted_batches: as `TRUSTED_BATCHES`.
        regroup_share: as `REGROUP_SHARE`.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[Sequence[T]], F],
        finish: Callable[[Sequence[T], F], Sequence[R]],
        loop: asyncio.AbstractEventLoop,
        *,
        rows: int,
        threads: int,
        max_wait: float,
        stages: Sequence[str] = (),
        spare: int = 0,
        inline: float = 0.0,
        alone: Callable[[], bool] = lambda: True,
        trusted_batches: int = TRUSTED_BATCHES,
        regroup_share: float = REGROUP_SHARE,
    ) -> None:
        self.name, self._stages = name, stages
        self._run, self._finish, self._loop, self.rows = run, finish, loop, rows
        self.max_wait, self.spare, self.inline, self._alone = max_wait, spare, inline, alone
        self._trusted_batches, self._regroup_share = trusted_batches, regroup_share
        self._waiting: dict[Hashable, deque[_Call[T, R]]] = {}
        self._running: set[Hashable] = set()
        self._paces: dict[Hashable, _Pace] = {}
        """Pace of each kind, the last used one last."""
        self._free = threads
        self._scheduled = False
        self.depth = 0
        """Rows that wait."""
        self._work: SimpleQueue[_Batch[T, F, R] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._serve, name=f"{name}-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Let the threads end."""
        for _ in self._threads:
            self._work.put(None)

    def expected(self, key: Hashable) -> float:
        """Estimate the seconds that a new call would wait for its kind; 0 while the pace is unknown."""
        waiting, pace = self._waiting.get(key), self._paces.get(key)
        if not waiting or pace is None or pace.batches < self._trusted_batches:
            return 0.0
        return sum(call.rows for call in waiting) * (pace.run + pace.finish)

    def admit(self, key: Hashable) -> None:
        """Raise `Overloaded` if a new call would wait too long."""
        if self.depth >= self.spare and (wait := self.expected(key)) > self.max_wait:
            raise Overloaded(
                f"{self.depth} queries wait for the {self.name}, {wait:.2f} s of work: try again later", wait
            )

    def submit(
        self, key: Hashable, item: T, rows: int = 1, deadline: float = float("inf"), store: str = ""
    ) -> asyncio.Future[R]:
        """Queue an item; the future gets its result, or what `run` or `finish` raises for it.

        Args:
            key: only items of equal keys share a batch.
            rows: amount of work of the item.
            deadline: time on the monotonic clock.
            store: store that metrics count the work for.

        Raises:
            Overloaded: the queue is full.
            TimedOut: the deadline has passed.
        """
        now = self._in_time(deadline)
        waiting = self._waiting.get(key)
        if waiting is None:
            waiting = self._waiting[key] = deque()
        else:
            self.admit(key)
        call: _Call[T, R] = _Call(item, rows, deadline, store, now, self._loop.create_future())
        waiting.append(call)
        self.depth += rows
        if self._free > 0 and not self._scheduled and key not in self._running:
            self._scheduled = True
            self._loop.call_soon(self._start)  # later calls of this turn of the loop join the batch
        return call.future

    def wait(
        self, key: Hashable, item: T, rows: int = 1, deadline: float = float("inf"), store: str = ""
    ) -> R:
        """Queue an item and return its result, in another thread than the loop's.

        Raises `TimedOut` at the deadline; otherwise as `submit`.
        """
        timeout = None if deadline == float("inf") else deadline - self._in_time(deadline)
        future = asyncio.run_coroutine_threadsafe(
            self._submitted(key, item, rows, deadline, store), self._loop
        )
        try:
            return future.result(timeout)
        except TimeoutError:
            future.cancel()
            raise TimedOut(
                f"the deadline passed while the query waited for the {self.name}: allow more time"
            ) from None

    def _in_time(self, deadline: float) -> float:
        """Return the time. Raises `TimedOut` if the deadline has passed."""
        now = time.monotonic()
        if now >= deadline:
            raise TimedOut(f"the deadline had passed before the {self.name} began: allow more time")
        return now

    async def _submitted(self, key: Hashable, item: T, rows: int, deadline: float, store: str) -> R:
        try:
            return await self.submit(key, item, rows, deadline, store)
        except asyncio.CancelledError:
            self.sweep()
            raise

    def sweep(self) -> None:
        """Drop the calls that nobody waits for any more; call this when a waiting call was cancelled."""
        for key, waiting in list(self._waiting.items()):
            kept = deque(call for call in waiting if not call.future.done())
            self.depth -= sum(call.rows for call in waiting) - sum(call.rows for call in kept)
            if kept:
                self._waiting[key] = kept
            else:
                del self._waiting[key]

    def _start(self) -> None:
        """Give batches to free threads, the kind that has waited longest first."""
        self._scheduled = False
        for key in list(self._waiting):
            if self._free <= 0:
                return
            if key in self._running:
                continue
            batch = self._next_batch(key)
            if batch is None:
                continue
            lone = len(batch.calls) == 1 and not self._running and not self._waiting
            if lone and self._alone() and self._runs_in_loop(batch):
                batch.finish_here = True
                self._process(batch)
                self._answer(batch)
            else:
                self._running.add(key)
                self._free -= 1
                self._work.put(batch)

    def _runs_in_loop(self, batch: _Batch[T, F, R]) -> bool:
        pace = self._paces.get(batch.key)
        return pace is not None and (pace.run + pace.finish) * batch.rows <= self.inline

    def _next_batch(self, key: Hashable) -> _Batch[T, F, R] | None:
        """Take the first call of a kind and those that fit with it; drop the calls that nobody waits for."""
        waiting = self._waiting.pop(key)
        calls: list[_Call[T, R]] = []
        rows, now = 0, time.monotonic()
        while waiting and (not calls or rows + waiting[0].rows <= self.rows):
            call = waiting.popleft()
            self.depth -= call.rows
            if call.future.done():
                continue
            if call.deadline <= now:
                call.future.set_exception(
                    TimedOut(
                        f"the deadline passed while the query waited for the {self.name}: allow more time"
                    )
                )
                continue
            calls.append(call)
            rows += call.rows
        if waiting:
            self._waiting[key] = waiting  # last, after the other kinds
        if not calls:
            return None
        pace = self._paces.get(key)
        finish_here = pace is None or pace.finish * rows > FINISH_SECONDS
        return _Batch(key, calls, rows, now - calls[0].arrived, finish_here)

    def _serve(self) -> None:
        while (batch := self._work.get()) is not None:
            self._process(batch)
            self._loop.call_soon_threadsafe(self._complete, batch)
            del batch  # its memory must not wait for the next one

    def _process(self, batch: _Batch[T, F, R]) -> None:
        """Run a batch and, if it says so, finish it; run its items one by one if they fail together."""
        items = [call.item for call in batch.calls]
        start = middle = time.monotonic()
        try:
            batch.outcome = self._run(items)
            middle = time.monotonic()
            if batch.finish_here:
                batch.results = self._finish(items, batch.outcome)
        except Exception as error:  # noqa: BLE001  its own call raises it
            batch.results = [error] if len(items) == 1 else [self._result(item) for item in items]
        batch.run_seconds, batch.finish_seconds = middle - start, time.monotonic() - middle

    def _result(self, item: T) -> R | Exception:
        try:
            return self._finish([item], self._run([item]))[0]
        except Exception as error:  # noqa: BLE001  its own call raises it
            return error

    def _complete(self, batch: _Batch[T, F, R]) -> None:
        """Start the next batch, then finish this one if its thread has not, and answer."""
        self._free += 1
        pause = self._regroup_share * batch.run_seconds
        if pause > MIN_PAUSE and len(batch.calls) > 1 and batch.rows < self.rows:
            self._loop.call_later(pause, self._release, batch.key)
            self._start()
        else:
            self._release(batch.key)
        if batch.results is None and not self._finish_in_loop(batch):
            self._running.add(batch.key)
            self._free -= 1
            self._work.put(batch)  # a thread runs the items one by one
            return
        self._answer(batch)

    def _release(self, key: Hashable) -> None:
        self._running.discard(key)
        self._start()

    def _finish_in_loop(self, batch: _Batch[T, F, R]) -> bool:
        assert batch.outcome is not None
        start = time.monotonic()
        try:
            batch.results = self._finish([call.item for call in batch.calls], batch.outcome)
        except Exception:  # noqa: BLE001  a thread runs the items one by one
            batch.finish_here = True
            return False
        batch.finish_seconds = time.monotonic() - start
        return True

    def _answer(self, batch: _Batch[T, F, R]) -> None:
        pace = self._paces.pop(batch.key, None) or _Pace()
        pace.update(batch.rows, batch.run_seconds, batch.finish_seconds)
        self._paces[batch.key] = pace
        if len(self._paces) > MAX_PACES:
            del self._paces[next(iter(self._paces))]
        store = batch.calls[0].store
        if self._stages:
            metrics.batch(self._stages[0], batch.rows, self.depth)
            metrics.stage("queue", store, batch.waited)
            for stage, seconds in zip(self._stages, (batch.run_seconds, batch.finish_seconds), strict=False):
                metrics.stage(stage, store, seconds)
        assert batch.results is not None
        for call, result in zip(batch.calls, batch.results, strict=True):
            if call.future.done():
                continue  # its caller has gone
            if isinstance(result, Exception):
                call.future.set_exception(result)
            else:
                call.future.set_result(result)
