"""Images and texts of concurrent calls go to the encoder together: at once when it is idle, bounded."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tagstore.errors import InvalidInput, Overloaded, TimedOut
from tagstore.serving.batch_queue import BatchQueue
from tagstore.serving.loop import loop
from waiting import wait_until

Queue = BatchQueue[tuple[str, int], list[tuple[str, int]], tuple[str, int]]


class Gated:
    """Work on pairs of a key and a number, which waits until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.started, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, items):
        numbers = [number for _, number in items]
        self.batches.append(numbers)
        self.started.release()
        self.go.acquire()
        if -1 in numbers:
            raise InvalidInput("-1 is bad")
        return items


@pytest.fixture
def queue() -> Iterator:
    queues: list[Queue] = []

    def make(work, *, rows: int = 8, max_wait: float = 1.0, threads: int = 1) -> Queue:
        options = {"rows": rows, "max_wait": max_wait, "threads": threads}
        made = BatchQueue("search", work, lambda items, found: found, loop(), trusted_batches=1, **options)
        queues.append(made)
        return made

    yield make
    for made in queues:
        made.close()


def ask(queue: Queue, key: str, number: int, deadline: float = float("inf")) -> tuple[str, int]:
    return queue.wait(key, (key, number), 1, deadline)


def waiting(queue: Queue, n: int) -> None:
    wait_until(lambda: queue.depth >= n)


def test_an_idle_queue_runs_a_call_at_once(queue) -> None:
    work = Gated()
    work.go.release()
    assert ask(queue(work), "k", 1) == ("k", 1)
    assert work.batches == [[1]]


def test_what_comes_while_it_is_busy_becomes_one_batch_by_key(queue) -> None:
    work = Gated()
    busy = queue(work, rows=3)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, busy, "a", 0)
        work.started.acquire()
        others = []
        for i, key in enumerate(["a", "b", "a", "a", "a"], 1):
            others.append(pool.submit(ask, busy, key, i))
            waiting(busy, i)
        for _ in range(4):
            work.go.release()
        assert [f.result(60) for f in (first, *others)] == [
            ("a", 0),
            ("a", 1),
            ("b", 2),
            ("a", 3),
            ("a", 4),
            ("a", 5),
        ]
    assert work.batches == [[0], [1, 3, 4], [2], [5]]
    assert busy.depth == 0


def test_one_bad_item_does_not_fail_its_company(queue) -> None:
    work = Gated()
    busy = queue(work)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, busy, "a", 0)
        work.started.acquire()
        others = []
        for n, i in enumerate((1, -1, 2), 1):
            others.append(pool.submit(ask, busy, "a", i))
            waiting(busy, n)
        for _ in range(9):
            work.go.release()
        assert first.result(60)[1] == 0
        assert (others[0].result(60)[1], others[2].result(60)[1]) == (1, 2)
        with pytest.raises(InvalidInput, match="-1 is bad"):
            others[1].result(60)


def test_work_whose_deadline_passed_in_the_queue_is_never_done(queue) -> None:
    work = Gated()
    busy = queue(work)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, busy, "a", 0)
        work.started.acquire()
        late = pool.submit(ask, busy, "a", 1, time.monotonic() + 1)
        with pytest.raises(TimedOut, match="while the query waited"):
            late.result(60)
        work.go.release()
        assert first.result(60)[1] == 0
    with pytest.raises(TimedOut, match="before the search began"):
        ask(busy, "a", 1, time.monotonic() - 1)
    assert work.batches == [[0]]


def test_a_queue_that_is_too_long_refuses_and_says_when_to_come_again(queue) -> None:
    work = Gated()
    busy = queue(work, max_wait=0.0)
    with ThreadPoolExecutor(8) as pool:
        work.go.release()
        pool.submit(ask, busy, "a", 0).result(60)
        work.started.acquire()
        first = pool.submit(ask, busy, "a", 1)
        work.started.acquire()
        second = pool.submit(ask, busy, "a", 2)
        waiting(busy, 1)
        with pytest.raises(Overloaded, match="1 queries wait for the search") as caught:
            ask(busy, "a", 3)
        assert caught.value.retry_after > 0
        work.go.release(2)
        assert (first.result(60)[1], second.result(60)[1]) == (1, 2)


def test_many_threads_get_each_their_own_result(queue) -> None:
    busy = queue(lambda items: items, rows=16, threads=2, max_wait=10)
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda i: ask(busy, i % 3, i), range(3000))) == [(i % 3, i) for i in range(3000)]
    assert busy.depth == 0
