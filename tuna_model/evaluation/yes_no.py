"""Scores of yes-or-no questions: POPE and RePOPE, and pairs of questions as in MME.

POPE: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023. RePOPE:
Neuhaus and Hein, 2025, the same questions with corrected labels. MME: Fu et al., arXiv 2306.13394.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from tuna_model.evaluation.bootstrap import Metric, Rows, metric

YES_NO_PROMPT = "Answer with yes or no."
_WORDS = re.compile(r"[a-z']+")
_NO = frozenset(("no", "not", "none", "isn't", "aren't", "doesn't", "don't", "can't", "cannot", "nope"))


def is_yes(answer: str) -> bool:
    """Whether an answer means yes, as POPE's own script reads it: it does unless its first sentence has a no
    or not."""
    first = re.split(r"[.\n]", answer.strip().lower(), maxsplit=1)[0]
    return not _NO.intersection(_WORDS.findall(first))


def says_neither(answer: str) -> bool:
    """Whether an answer begins with neither yes nor no: POPE's rule takes it as yes, so such answers are
    counted."""
    words = _WORDS.findall(answer.lower())
    return not words or words[0] not in ("yes", "no")


def pope(
    answers: Sequence[str],
    labels: Sequence[bool],
    images: Sequence[Hashable],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Metric]:
    """Accuracy, precision, recall, F1 and the share of yes as POPE reports them, and the share of answers
    that say neither."""
    yes = np.asarray([is_yes(answer) for answer in answers])
    true = np.asarray(labels, bool)
    neither = np.asarray([says_neither(answer) for answer in answers])
    figures = {
        "accuracy": lambda rows: _share(yes[rows] == true[rows]),
        "precision": lambda rows: _share(true[rows][yes[rows]]),
        "recall": lambda rows: _share(yes[rows][true[rows]]),
        "f1": lambda rows: _f1(yes[rows], true[rows]),
        "yes": lambda rows: _share(yes[rows]),
        "neither": lambda rows: _share(neither[rows]),
    }
    return [metric(name, figure, images, resamples=resamples, seed=seed) for name, figure in figures.items()]


def mme(
    answers: Sequence[str],
    labels: Sequence[bool],
    images: Sequence[Hashable],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Metric]:
    """MME's accuracy over questions, accuracy+ over images (all questions right), and their sum in percent,
    the score.

    An answer that begins with neither word is wrong, as in MME's own script.
    """
    pairs = zip(answers, labels, strict=True)
    right = np.array([not says_neither(text) and is_yes(text) is label for text, label in pairs], dtype=bool)
    _, group = np.unique(np.asarray([str(image) for image in images]), return_inverse=True)
    whole = np.ones(int(group.max()) + 1 if len(group) else 0, bool)
    np.logical_and.at(whole, group, right)

    def accuracy(rows: Rows) -> float:
        return _share(right[rows])

    def accuracy_plus(rows: Rows) -> float:
        # an image comes with all its questions: weights of one over their number count images
        weight = 1 / np.bincount(group)[group[rows]]
        return float((whole[group[rows]] * weight).sum() / weight.sum())

    figures = {
        "accuracy": accuracy,
        "accuracy+": accuracy_plus,
        "score": lambda rows: 100 * (accuracy(rows) + accuracy_plus(rows)),
    }
    return [metric(name, figure, images, resamples=resamples, seed=seed) for name, figure in figures.items()]


def _share(values: NDArray[np.bool_]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _f1(yes: NDArray[np.bool_], true: NDArray[np.bool_]) -> float:
    hits = int((yes & true).sum())
    return 2 * hits / max(1, int(yes.sum()) + int(true.sum()))
