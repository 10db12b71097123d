"""Batches of concurrent calls: none when idle, large when busy, bounded always."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tagstore.errors import InvalidInput, Overloaded, TimedOut
from tagstore.serving.embed_queue import Batcher
from waiting import wait_until


class Gated:
    """Work that waits until it is told to go on."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.batches: list[list[int]] = []
        self.started, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.seconds = seconds

    def __call__(self, key, items):
        self.batches.append(list(items))
        self.started.release()
        self.go.acquire()
        if -1 in items:
            raise InvalidInput("-1 is bad")
        return [(key, item, threading.get_ident()) for item in items]


def waiting(batcher: Batcher, n: int) -> None:
    wait_until(lambda: batcher.depth == n)


def test_an_idle_batcher_runs_a_call_at_once_in_its_own_thread() -> None:
    work = Gated()
    work.go.release()
    batcher = Batcher(work, name="search", rows=8, slots=1, max_wait=1)
    assert batcher("k", 1) == ("k", 1, threading.get_ident())


def test_what_comes_while_it_is_busy_becomes_one_batch_by_key() -> None:
    work = Gated()
    batcher = Batcher(work, name="search", rows=3, slots=1, max_wait=1)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(batcher, "a", 0)
        work.started.acquire()
        others = []
        for i, key in enumerate(["a", "b", "a", "a", "a"], 1):
            others.append(pool.submit(batcher, key, i))
            waiting(batcher, i)
        for _ in range(4):
            work.go.release()
        assert [f.result(60)[:2] for f in (first, *others)] == [
            ("a", 0),
            ("a", 1),
            ("b", 2),
            ("a", 3),
            ("a", 4),
            ("a", 5),
        ]
    assert work.batches == [[0], [1, 3, 4], [2], [5]]
    assert batcher.depth == 0


def test_one_bad_item_does_not_fail_its_company() -> None:
    work = Gated()
    batcher = Batcher(work, name="search", rows=8, slots=1, max_wait=1)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(batcher, "a", 0)
        work.started.acquire()
        others = []
        for n, i in enumerate((1, -1, 2), 1):
            others.append(pool.submit(batcher, "a", i))
            waiting(batcher, n)
        for _ in range(9):
            work.go.release()
        assert first.result(60)[1] == 0
        assert (others[0].result(60)[1], others[2].result(60)[1]) == (1, 2)
        with pytest.raises(InvalidInput, match="-1 is bad"):
            others[1].result(60)


def test_work_whose_deadline_passed_in_the_queue_is_never_done() -> None:
    work = Gated()
    batcher = Batcher(work, name="search", rows=8, slots=1, max_wait=1)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(batcher, "a", 0)
        work.started.acquire()
        late = pool.submit(batcher, "a", 1, 1, time.monotonic() + 1)
        with pytest.raises(TimedOut, match="while the query waited"):
            late.result(60)
        work.go.release()
        assert first.result(60)[1] == 0
    with pytest.raises(TimedOut, match="before the search began"):
        batcher("a", 1, 1, time.monotonic() - 1)
    assert work.batches == [[0]]


def test_a_queue_that_is_too_long_refuses_and_says_when_to_come_again() -> None:
    work = Gated()
    batcher = Batcher(work, name="search", rows=8, slots=1, max_wait=0.0)
    with ThreadPoolExecutor(8) as pool:
        work.go.release()
        pool.submit(batcher, "a", 0).result(60)
        work.started.acquire()
        first = pool.submit(batcher, "a", 1)
        work.started.acquire()
        second = pool.submit(batcher, "a", 2)
        waiting(batcher, 1)
        with pytest.raises(Overloaded, match="1 queries wait for the search") as caught:
            batcher("a", 3)
        assert caught.value.retry_after > 0
        work.go.release(2)
        assert (first.result(60)[1], second.result(60)[1]) == (1, 2)


def test_many_threads_get_each_their_own_result() -> None:
    batcher = Batcher(
        lambda key, items: [(key, i) for i in items], name="search", rows=16, slots=2, max_wait=10
    )
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda i: batcher(i % 3, i), range(3000))) == [(i % 3, i) for i in range(3000)]
    assert batcher.depth == 0
