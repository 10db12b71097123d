"""Naming what an image shows: whether the answer, and the tags that the model was given, hold the name.

An answer holds a name if the name's words stand in it one after the other, as whole words; a tag is a name if
it has the same words and no others. Case and punctuation do not count: "Coca-Cola." holds "coca cola".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Hashable, Sequence

from tuna_model.evaluation.bootstrap import Metric, mean
from tuna_model.evaluation.questions import TaskAnswer

_WORD = re.compile(r"[^\W_]+")


def fold(text: str) -> str:
    """Fold case and punctuation: the words in lower case, with single blanks between them."""
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def holds(answer: str, name: str) -> bool:
    """Whether an answer holds a name as whole words; nothing holds a name without words."""
    words = fold(name)
    return bool(words) and f" {words} " in f" {fold(answer)} "


def naming(
    answers: Sequence[TaskAnswer],
    names: Sequence[str],
    images: Sequence[Hashable],
    *,
    splits: Sequence[str] = (),
    resamples: int = 1000,
    seed: int = 0,
) -> list[Metric]:
    """Shares of the answers that hold the name, of those whose tags hold it, and of the tags.

    Args:
        names: the right name of each question's image.
        splits: of each question, or none: the same figures are added for each split, its name before them. A
            question with an empty one counts only in the first figures.

    `named if among tags` is left out where no answer had the name among its tags.
    """
    named = [holds(answer.text, name) for answer, name in zip(answers, names, strict=True)]
    tags = [[fold(tag) for tag in answer.tags] for answer in answers]
    among = [fold(name) in folded for folded, name in zip(tags, names, strict=True)]
    first = [folded[:1] == [fold(name)] for folded, name in zip(tags, names, strict=True)]

    def figures(rows: Sequence[int], prefix: str) -> list[Metric]:
        with_name = [i for i in rows if among[i]]
        parts = (
            ("named", named, rows),
            ("named if among tags", named, with_name),
            ("name among tags", among, rows),
            ("top tag is the name", first, rows),
        )
        return [
            mean(prefix + title, [values[i] for i in part], [images[i] for i in part],
                 resamples=resamples, seed=seed)
            for title, values, part in parts if part
        ]  # fmt: skip

    metrics = figures(range(len(answers)), "")
    for split in sorted(set(splits) - {""}):
        metrics += figures([i for i, of in enumerate(splits) if of == split], f"{split}: ")
    return metrics
