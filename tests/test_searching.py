"""The search queue: which queries share a batch, which are refused, which are dropped."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest

from tagstore.errors import Overloaded, TimedOut
from tagstore.serving import batch_queue
from tagstore.serving.batch_queue import BatchQueue
from waiting import Clock


class Work:
    """Finds numbers, in the batches that it writes down, and doubles them; may be held up."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self.finishers: set[int] = set()
        self.pause = 0.0
        self.go = threading.Event()
        self.go.set()

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.threads.add(threading.get_ident())
        assert self.go.wait(30)
        if 13 in items:
            raise ValueError("13")
        return list(items)

    def double(self, items: Sequence[int], found: list[int]) -> list[int]:
        assert list(items) == found
        self.finishers.add(threading.get_ident())
        time.sleep(self.pause)
        if 17 in items:
            raise ValueError("17")
        return [2 * item for item in items]


def searches(work: Work, **options) -> BatchQueue[int, list[int], int]:
    return BatchQueue(
        "search",
        work,
        work.double,
        asyncio.get_running_loop(),
        **{"rows": 4, "threads": 2, "max_wait": 10.0, **options},
    )


async def begun(work: Work, batches: int) -> None:
    end = time.monotonic() + 60
    while len(work.batches) < batches:
        assert time.monotonic() < end
        await asyncio.sleep(0.001)


async def test_what_waits_goes_together_in_batches_that_fit() -> None:
    work = Work()
    work.go.clear()
    together = searches(work)
    first = together.submit("a", 0)
    await begun(work, 1)
    rest = [together.submit("a", i) for i in range(1, 7)]
    other = together.submit("b", 100)  # of another kind: not held up
    await begun(work, 2)
    assert together.depth == 6
    work.go.set()
    assert await asyncio.gather(first, *rest, other) == [0, 2, 4, 6, 8, 10, 12, 200]
    assert work.batches == [[0], [100], [1, 2, 3, 4], [5, 6]]
    assert together.depth == 0
    together.close()


async def test_items_that_come_in_one_turn_of_the_loop_are_one_batch() -> None:
    work = Work()
    together = searches(work)
    assert await asyncio.gather(*(together.submit("a", i) for i in range(4))) == [0, 2, 4, 6]
    assert work.batches == [[0, 1, 2, 3]]
    together.close()


async def test_an_item_that_fails_fails_alone() -> None:
    work = Work()
    together = searches(work)
    found = await asyncio.gather(*(together.submit("a", i) for i in (12, 13, 14)), return_exceptions=True)
    assert found[0] == 24
    assert isinstance(found[1], ValueError)
    assert found[2] == 28
    together.close()


async def test_only_a_lone_item_of_a_quick_kind_is_worked_on_in_the_loop() -> None:
    work, alone = Work(), [True]
    together = searches(work, inline=60.0, alone=lambda: alone[0])
    await together.submit("a", 1)  # how quick it is is not known yet
    assert threading.get_ident() not in work.threads
    await together.submit("a", 2)
    assert threading.get_ident() in work.threads
    work.threads.clear()
    await asyncio.gather(together.submit("a", 3), together.submit("a", 4))
    alone[0] = False
    await together.submit("a", 5)
    assert threading.get_ident() not in work.threads
    together.close()


async def test_results_are_made_in_the_loop_where_that_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_queue, "FINISH_SECONDS", 60.0)
    work, here = Work(), threading.get_ident()
    together = searches(work)
    await together.submit("a", 1)  # how quick it is is not known yet
    assert here not in work.finishers
    work.finishers.clear()
    assert await asyncio.gather(together.submit("a", 2), together.submit("a", 3)) == [4, 6]
    assert (work.finishers, here in work.threads) == ({here}, False)
    found = await asyncio.gather(*(together.submit("a", i) for i in (16, 17, 18)), return_exceptions=True)
    assert (found[0], found[2]) == (32, 36)
    assert isinstance(found[1], ValueError)
    monkeypatch.setattr(batch_queue, "FINISH_SECONDS", 0.01)
    work.pause = 0.05
    await together.submit("slow", 1)
    work.finishers.clear()
    assert await together.submit("slow", 2) == 4
    assert here not in work.finishers
    together.close()


async def test_those_who_are_answered_and_ask_again_go_along_with_those_who_wait() -> None:
    work = Work()
    together = searches(work, rows=8)

    async def caller(number: int) -> None:
        for _ in range(3):
            await together.submit("a", number)

    work.go.clear()
    one, two = asyncio.create_task(caller(1)), asyncio.create_task(caller(2))
    await begun(work, 1)
    three = asyncio.create_task(caller(3))  # comes while the others are worked on
    await asyncio.sleep(0.3)  # so slow a batch is followed by a pause
    work.go.set()
    await asyncio.gather(one, two, three)
    assert sorted(work.batches[1]) == [1, 2, 3]
    together.close()


async def test_a_long_queue_refuses_and_says_for_how_long() -> None:
    work = Work()
    together = searches(work, max_wait=0.0, spare=2, rows=1)
    work.pause = 0.02
    for _ in range(batch_queue.TRUSTED_BATCHES):
        await together.submit("a", 0)
    work.go.clear()
    first = together.submit("a", 1)
    await begun(work, batch_queue.TRUSTED_BATCHES + 1)
    waiting = [together.submit("a", i) for i in (2, 3)]
    with pytest.raises(Overloaded) as caught:
        together.submit("a", 4)
    assert caught.value.retry_after > 0.02
    assert together.submit("b", 5) is not None  # of a kind that nothing waits for
    work.go.set()
    assert await asyncio.gather(first, *waiting) == [2, 4, 6]
    together.close()


async def test_nothing_is_done_for_those_who_have_gone_or_are_too_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work, clock = Work(), Clock()
    monkeypatch.setattr(batch_queue, "time", clock)
    together = searches(work)
    with pytest.raises(TimedOut):
        together.submit("a", 1, deadline=time.monotonic() - 1)
    work.go.clear()
    first = together.submit("a", 0)
    await begun(work, 1)
    late, gone, stays = (
        together.submit("a", 1, deadline=time.monotonic() + 5),
        together.submit("a", 2),
        together.submit("a", 3),
    )
    gone.cancel()
    together.sweep()
    assert together.depth == 2
    clock.ahead = 6
    work.go.set()
    assert await first == 0
    assert await stays == 6
    with pytest.raises(TimedOut):
        await late
    assert work.batches == [[0], [3]]
    together.close()
