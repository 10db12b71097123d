"""What an ingest did, and what it says while it does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from tagstore.types import Rejected

MAX_REPORTED_REJECTS = 1000
"""Quarantined pairs that a report holds; the version, if one was made, has them all."""

Advance = Callable[[str, int], None]
"""Called with the name of a stage and how many pairs (or tags) it has done since."""
Outcome = Literal["added", "unchanged", "quarantined"]
Settled = Callable[[list[tuple[str, Outcome, str]]], None]
"""Called with (key, outcome, reason) of each pair of a batch, once its entries are written."""


@dataclass(slots=True)
class Report:
    """What an ingest did."""

    store: str
    version: int
    pairs: int = 0
    """Read from the source, quarantined ones included."""
    added: int = 0
    """Entries written: new ones, and those that replaced an entry of the same key."""
    unchanged: int = 0
    """Pairs that the store already had as they are."""
    entries: int = 0
    """Entries of the version."""
    tags: int = 0
    """Tags of the version, over all entries."""
    unique_tags: int = 0
    """Different tags of the version."""
    quarantined: list[Rejected] = field(default_factory=list)
    """The first `MAX_REPORTED_REJECTS`."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Pairs quarantined, by reason without its particulars."""
    captions: int = 0
    """Captions that were mined in this run, if the miner counts them."""
    unread: dict[str, int] = field(default_factory=dict)
    """Those in languages that the miner does not read, by ISO 639-1 code."""
    resumed: int = 0
    """Pairs that an earlier run, cut off, had already done."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of the pipeline by what it was spent on or waiting for, and "total"."""
