"""Intervals of figures: percentile bootstrap (Efron and Tibshirani, 1993, chapter 13), resampled by image."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure with its interval."""

    name: str
    value: float
    low: float
    """The 2.5 % quantile of the resamples."""
    high: float
    """The 97.5 % quantile of the resamples."""
    count: int
    """Number of answers."""

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def metric(
    name: str,
    statistic: Callable[[Rows], float],
    groups: Sequence[Hashable],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Metric:
    """Compute `statistic` over all answers, with its 95 % interval.

    Args:
        statistic: the figure of the answers with these row numbers, which may repeat; NaN leaves a resample
            out.
        groups: the image of each answer. Answers about one image are correlated: resampling answers instead
            of images would make the interval too narrow.
        resamples: number of resamples; 0 for no interval (it is then the value itself).
    """
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    rows = [np.asarray(members_of_group, np.intp) for members_of_group in members.values()]
    value = float(statistic(np.arange(len(groups), dtype=np.intp))) if groups else float("nan")
    if not resamples or not rows:
        return Metric(name, value, value, value, len(groups))
    rng = np.random.default_rng(seed)
    drawn = [
        statistic(np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))]))
        for _ in range(resamples)
    ]
    low, high = np.nanquantile(np.asarray(drawn, np.float64), [0.025, 0.975])
    return Metric(name, value, float(low), float(high), len(groups))


def mean(
    name: str, values: Sequence[float], groups: Sequence[Hashable], *, resamples: int = 1000, seed: int = 0
) -> Metric:
    """Mean of one value per answer, with its interval."""
    array = np.asarray(values, np.float64)
    return metric(name, lambda rows: float(array[rows].mean()), groups, resamples=resamples, seed=seed)
