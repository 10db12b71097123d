"""Short answers: exact match after the normalisation of VQA, and VQA's soft accuracy over ten human answers.

Goyal et al., "Making the V in VQA Matter", CVPR 2017; the normalisation follows the official evaluation
(lower case, no punctuation, no articles, number words as digits).
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

from tuna_model.evaluation.bootstrap import Metric, mean

SHORT_PROMPT = "Answer the question using a single word or phrase."
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(value) for value, word in enumerate(_NUMBER_WORDS)}}
_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = re.compile(r"[^\w\s.:']|(?<!\d)[.:]|[.:](?!\d)")


def normalise(answer: str) -> str:
    """Normalise an answer for comparison, as VQA does."""
    words = _PUNCTUATION.sub(" ", answer.lower().replace(",", "")).split()
    return " ".join(_NUMBERS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """With ten references: min(1, equal ones / 3), averaged over leaving each out. With fewer: 1 if any is
    equal."""
    text = normalise(answer)
    equal = [text == normalise(reference) for reference in references]
    if len(equal) < 10:
        return float(any(equal))
    return sum(min(1.0, (sum(equal) - same) / 3) for same in equal) / len(equal)


def vqa(
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
    images: Sequence[Hashable],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Metric]:
    """Exact match with any reference, and VQA accuracy."""
    pairs = list(zip(answers, references, strict=True))
    exact = [float(normalise(answer) in map(normalise, some)) for answer, some in pairs]
    soft = [vqa_accuracy(answer, some) for answer, some in pairs]
    return [
        mean("exact match", exact, images, resamples=resamples, seed=seed),
        mean("VQA accuracy", soft, images, resamples=resamples, seed=seed),
    ]
