"""Captions in, tags out. Importing this package loads no language model; the first `mine` does."""

from tagstore.mining.loading import load_miner, mine
from tagstore.mining.merging import MergedTag, merge
from tagstore.mining.miner import (
    Miner,
    PictureMiner,
    Pictures,
    identity,
    mine_seen,
    reads_pictures,
    refuse,
    unread_captions,
)
from tagstore.mining.vocabulary import Rules, load_rules

__all__ = [
    "MergedTag",
    "Miner",
    "PictureMiner",
    "Pictures",
    "Rules",
    "identity",
    "load_miner",
    "load_rules",
    "merge",
    "mine",
    "mine_seen",
    "reads_pictures",
    "refuse",
    "unread_captions",
]
