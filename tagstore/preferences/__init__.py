"""Preference data from a store: answers, and the same answers with a tag that is not true of the picture.

    samples ──pictures──▶ store ──tags of similar pictures──▶ one is put in where a true one stood ──▶ Parquet

Nobody is asked to write bad answers (POVID asks GPT-4V to): neighbours' tags are mistakes that are near
(Re-Align, Xing et al. 2025, arXiv 2502.13146, replaces what it masked by what similar pictures show).
"""

from tagstore.preferences.building import NO_PAIR, Report, write_pairs
from tagstore.preferences.swaps import Swap

__all__ = ["NO_PAIR", "Report", "Swap", "write_pairs"]
