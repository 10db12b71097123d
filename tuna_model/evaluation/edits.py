"""Edits of a store: which answers change when it does, and whether they should, in the four measures of BEAF.

    right with the store before and after it, where the right answer changes    true understanding
    wrong with both                                                             ignorance
    right with one of them: of yes and no, the answer that was kept             stubbornness
    right with one of them, where the right answer stays                        indecision

BEAF (Ye-Bin et al., "Observing BEfore-AFter Changes to Evaluate Hallucination in Vision-language Models",
ECCV 2024) edits pictures and asks about objects. Here the picture stays and the store is edited: an entry is
added or removed, or a domain swapped.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tagstore.errors import InvalidInput, NotFound
from tuna_model.evaluation.bootstrap import Metric, Rows, mean, metric
from tuna_model.evaluation.naming import fold, holds
from tuna_model.evaluation.questions import Question, read_answers
from tuna_model.evaluation.yes_no import is_yes

SIDES = ("before", "after")
_YES_NO = ("yes", "no")


def check_truths(question: Question) -> None:
    """Raise `InvalidInput` if a question does not say what is right with the store before and after its
    edit."""
    values = [question.truth.get(side, "") for side in SIDES]
    folded = [fold(value) if isinstance(value, str) else value for value in values]
    yes_no = [value in _YES_NO for value in folded]
    if not all(value is None or (isinstance(value, str) and value) for value in folded):
        raise InvalidInput(
            f"question {question.key}: 'before' and 'after' are the right answers with either store: yes or "
            "no, or names, or null where the other one's name is wrong"
        )
    if any(yes_no) != all(yes_no) or folded == [None, None]:
        raise InvalidInput(
            f"question {question.key}: 'before' is {values[0]!r} and 'after' {values[1]!r}: give yes or no "
            "twice, or at least one name"
        )


def is_right(answer: str, question: Question, side: str) -> bool:
    """Whether an answer is right with the store of that side (of `SIDES`).

    Yes and no are read as POPE reads them. A name must stand in the answer, as in `naming`; if it is null,
    the other side's name must not.
    """
    expected = question.truth[side]
    if expected is None:
        return not any(holds(answer, question.truth[other]) for other in SIDES if other != side)
    if fold(expected) in _YES_NO:
        return is_yes(answer) is (fold(expected) == "yes")
    return holds(answer, expected)


def edits(
    before: Sequence[str],
    after: Sequence[str],
    questions: Sequence[Question],
    images: Sequence[Hashable],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Metric]:
    """BEAF's measures of answers with a store before and after its edit, and `f1`, the harmonic mean of true
    understanding and 1 - indecision.

    Those of questions whose right answer changes, or stays, are left out where there is no such question.
    """
    right = np.array(
        [
            [is_right(text, question, side) for side, text in zip(SIDES, texts, strict=True)]
            for question, *texts in zip(questions, before, after, strict=True)
        ]
    )
    times = right.sum(axis=1)
    both, neither, one = times == 2, times == 0, times == 1
    changes = np.array([_folded(question, "before") != _folded(question, "after") for question in questions])

    def share(name: str, values: NDArray[np.bool_], rows: Sequence[int]) -> list[Metric]:
        chosen = [float(values[i]) for i in rows], [images[i] for i in rows]
        return [mean(name, *chosen, resamples=resamples, seed=seed)] if len(rows) else []

    def f1(rows: Rows) -> float:
        changing, staying = rows[changes[rows]], rows[~changes[rows]]
        if not len(changing) or not len(staying):
            return float("nan")
        understood, steady = float(both[changing].mean()), 1 - float(one[staying].mean())
        return 2 * understood * steady / (understood + steady) if understood + steady else 0.0

    changing, staying = np.flatnonzero(changes).tolist(), np.flatnonzero(~changes).tolist()
    metrics = share("true understanding", both, changing)
    metrics += share("ignorance", neither, changing)
    metrics += share("stubbornness", one, changing)
    metrics += share("indecision", one, staying)
    if changing and staying:
        metrics.append(metric("f1", f1, images, resamples=resamples, seed=seed))
    return metrics


def answers_before(folder: Path, questions: Sequence[Question]) -> list[str]:
    """Read what `tuna eval edits --out FOLDER` answered with the store before its edit, in the order of the
    questions. Raises `NotFound`, and `InvalidInput` if an answer is missing."""
    path = folder / "edits.answers.jsonl"
    if not path.exists():
        raise NotFound(
            f"there is no {path}: run tuna eval edits with the store before its edit, --out {folder}"
        )
    answers = read_answers(path)
    for question in questions:
        if question.key not in answers:
            raise InvalidInput(f"{path} has no answer to question {question.key}: ask the same questions")
    return [answers[question.key].text for question in questions]


def _folded(question: Question, side: str) -> str | None:
    value = question.truth[side]
    return None if value is None else fold(value)
