"""Captions in, tags out. Importing this package loads no language model; the first `mine` does."""

from tagstore.mining.merging import MergedTag, merge
from tagstore.mining.miner import Miner, load_miner, mine, refuse

__all__ = ["MergedTag", "Miner", "load_miner", "merge", "mine", "refuse"]
