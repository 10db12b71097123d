"""Embeddings of tags that are learnt from the pictures that carry them, instead of read from their words.

A text tower knows little of rare names, and those are what a store of one's own is for. The pictures that
carry a tag say what it looks like. Its embedding is the direction of a linear classifier that is fitted in
closed form, one against all others (ridge regression; with one covariance for all tags it is what linear
discriminant analysis finds, which Wang et al., "A Hard-to-Beat Baseline for Training-free CLIP-based
Adaptation", ICLR 2024, show to be hard to beat). With x_i the N unit vectors, of mean m and covariance C:

    w_t = (C + m m' + s I)^-1 sum(x_i of tag t)

s shrinks the covariance as much as its sample of N calls for (OAS: Chen, Wiesel, Eldar and Hero, "Shrinkage
Algorithms for MMSE Covariance Estimation", IEEE TSP 2010). A tag that few pictures carry is learnt badly, so
its cosines are made smaller: w_t is scaled to |w_t| / sqrt(|w_t|^2 + (PRIOR r)^2), where r is the length that
one picture gives, and its unit length is kept by a part along the direction in which the pictures differ
least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from tagstore.types import Vectors

PRIOR = 10.0
"""Pictures. A tag whose direction is as long as that of so many pictures has 0.7 of its cosines."""
TAGS_AT_ONCE = 1 << 15
"""Tags that one pass over the pictures learns: 128 MiB at 512 dimensions."""
MENTIONS_AT_ONCE = 1 << 14
"""Vectors that are summed together, one for each tag of a picture: 32 MiB at 512 dimensions."""
FLOOR = 1e-6
"""Least shrinkage, as a share of the mean square: fewer pictures than dimensions leave some without any."""

Pass = Callable[[], Iterator[tuple[Vectors, Sequence[Sequence[int]]]]]
"""Starts over: unit vectors `[n, D]` of some pictures and the ids of the tags of each."""


def learn(pictures: Pass, tags: int, dimension: int) -> Iterator[Vectors]:
    """Learn the embeddings of tags 0 to `tags` - 1, and yield them in order, `[n, D]` unit rows float32.

    Reads the pictures once, and once more for every `TAGS_AT_ONCE` tags. A tag without a picture gets the
    direction in which the pictures differ least: it fits none of them.
    """
    inverse, flat, length = _statistics(pictures, dimension)
    for first in range(0, tags, TAGS_AT_ONCE):
        count = min(TAGS_AT_ONCE, tags - first)
        learnt = _sums(pictures, first, count, dimension) @ inverse
        learnt /= np.sqrt(np.square(learnt).sum(1, keepdims=True) + (PRIOR * length) ** 2)
        learnt -= np.outer(learnt @ flat, flat)
        learnt += np.outer(np.sqrt(np.maximum(0, 1 - np.square(learnt).sum(1))), flat)
        yield (learnt / np.linalg.norm(learnt, axis=1, keepdims=True)).astype(np.float32)


def _statistics(pictures: Pass, dimension: int) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """The inverse of the shrunk second moment `[D, D]`; the direction in which pictures differ least `[D]`;
    and the length that the inverse gives a picture, root mean square."""
    moment, total, count = np.zeros((dimension, dimension)), np.zeros(dimension), 0
    for vectors, _ in pictures():
        rows = vectors.astype(np.float64)
        moment += rows.T @ rows
        total += rows.sum(0)
        count += len(rows)
    moment, mean = moment / count, total / count
    shrinkage = _oas(moment - np.outer(mean, mean), count) + FLOOR * np.trace(moment) / dimension
    squares, axes = np.linalg.eigh(moment)
    inverse = (axes / (np.maximum(squares, 0) + shrinkage)) @ axes.T
    flat = axes[:, 0] * np.sign(axes[np.abs(axes[:, 0]).argmax(), 0])
    length = float(np.sqrt(max(0.0, np.einsum("ij,jk,ki->", inverse, moment, inverse, optimize=True))))
    return inverse, flat, length


def _oas(covariance: NDArray[np.float64], count: int) -> float:
    """What OAS adds to the diagonal of a covariance of so many samples, relative to the rest of it."""
    d = len(covariance)
    trace, square = float(np.trace(covariance)), float(np.square(covariance).sum())
    spread = square - trace**2 / d
    if spread <= 0:
        return 0.0
    share = ((1 - 2 / d) * square + trace**2) / ((count + 1 - 2 / d) * spread)
    share = min(share, 0.99)
    return share / (1 - share) * trace / d


def _sums(pictures: Pass, first: int, count: int, dimension: int) -> NDArray[np.float64]:
    """The sum of the vectors that carry each of the tags from `first` on, `[count, D]`."""
    sums = np.zeros((count, dimension))
    for vectors, tags_of_each in pictures():
        numbers = np.repeat(np.arange(len(vectors)), [len(tags) for tags in tags_of_each])
        tags = np.fromiter(chain.from_iterable(tags_of_each), np.int64, len(numbers)) - first
        here = np.flatnonzero((tags >= 0) & (tags < count))
        here = here[np.argsort(tags[here], kind="stable")]
        for start in range(0, len(here), MENTIONS_AT_ONCE):
            part = here[start : start + MENTIONS_AT_ONCE]
            present, starts = np.unique(tags[part], return_index=True)
            sums[present] += np.add.reduceat(vectors[numbers[part]], starts, axis=0, dtype=np.float64)
    return sums
