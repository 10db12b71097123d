"""Remote ingests hold few images and one language model, however many there are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pictures import picture
from tagstore.client.admin import administer
from tagstore.encoding.decode_memory import MemoryBudget
from tagstore.ingestion import ingest_pairs
from tagstore.ingestion.batches import next_batch
from tagstore.serving import admin_service, shared_miners
from tagstore.serving.server import Server
from tagstore.serving.settings import Settings
from tagstore.serving.shared_miners import SharedMiners
from tagstore.types import Pair, Rejected


def pairs(count: int, captions: tuple[str, ...] = ("A black circle.",), **metadata: object) -> list[Pair]:
    return [Pair(f"pair {i}", picture("black", "circle", shift=i), captions, metadata) for i in range(count)]


def test_a_batch_ends_early_by_what_its_pairs_take_in_memory() -> None:
    def size(items: list[Pair]) -> int:
        return len(list(next_batch(iter(items), 8, 100_000)))

    assert size(pairs(9)) == 8
    assert size(pairs(9, captions=("a",) * 2000)) == 1  # 2000 bytes on the wire, 114,000 in memory
    assert size(pairs(9, numbers=list(range(2000)))) == 1


def test_each_image_is_given_back_once(tmp_path: Path, mini) -> None:
    given: list[str] = []
    source: list[Pair | Rejected] = [
        *pairs(5),
        Pair("bad", b"no image", ("A caption.",)),
        Rejected("no", "", ""),
    ]
    report = ingest_pairs(
        source,
        root=tmp_path,
        store="new",
        source="test",
        encoder=mini,
        batch=2,
        decoded=lambda pair: given.append(pair.key),
    )
    assert (report.added, len(report.quarantined)) == (5, 2)
    assert sorted(given) == ["bad", *(f"pair {i}" for i in range(5))]


def test_ingests_wait_for_room_and_give_it_back_also_when_they_break(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = pairs(40)
    limit = 3 * len(some[0].image)
    monkeypatch.setattr(admin_service, "INGEST_IMAGE_BYTES", limit)
    budgets: list[MemoryBudget] = []
    held: list[int] = []
    take = MemoryBudget.take

    def taken(budget: MemoryBudget, size: int) -> None:
        take(budget, size)
        if budget.limit == limit:
            budgets.append(budget)
            held.append(budget.held)

    monkeypatch.setattr(MemoryBudget, "take", taken)
    server = Server(tmp_path, "127.0.0.1:0", device="cpu", settings=Settings(anonymous="admin"))
    server.start()

    def broken() -> Iterator[Pair]:
        yield from some
        raise OSError("the source is gone")

    try:
        with administer(f"grpc://{server.address}/new") as admin:
            refused = Pair("", some[0].image, ("A caption.",))
            assert admin.ingest(iter([refused, *some]), encoder="mini").added == 40
            with pytest.raises(OSError, match="the source is gone"):
                admin.ingest(broken())
    finally:
        server.stop(0)
    assert len(held) >= 40
    assert max(held) <= limit
    assert budgets[0].held == 0


def test_ingests_share_miners_of_which_few_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_miners, "KEPT", 1)
    miners = SharedMiners()
    first = miners.get("rules")
    assert miners.get("rules") is first
    assert [tag.text for tag in next(first.mine(pairs(1)))]
    miners.get("rules+rules")
    assert miners.get("rules") is not first
