"""CHAIR: the share of objects in a caption that are not in the picture.

Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018. The synonym list is the paper's own
(GitHub, LisaAnne/Hallucination, data/synonyms.txt): a line for each of the 80 COCO categories, its name
first. It states no licence, so it is not included and its path is an argument.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tagstore.errors import InvalidInput, NotFound
from tuna_model.evaluation.bootstrap import Metric, Rows, metric

_PAIRS = [
    "motor bike",
    "motor cycle",
    "air plane",
    "traffic light",
    "street light",
    "traffic signal",
    "stop light",
    "\nfire hydrant",
    "stop sign",
    "parking meter",
    "suit case",
    "sports ball",
    "baseball bat",
    "baseball glove",
    "tennis racket",
    "wine glass",
    "hot dog",
    "\ncell phone",
    "mobile phone",
    "teddy bear",
    "hair drier",
    "potted plant",
    "bow tie",
    "laptop computer",
    "stove top oven",
    "home plate",
    "\ntrain track",
]
"""The paper's own list of words that together mean another object than alone."""
_ANIMALS = (
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub",
)  # fmt: skip
_VEHICLES = ("jet", "train")
# "home plate" is no plate, "train track" no train
_INSTEAD = {"bow tie": "tie", "home plate": "", "train track": ""}
_WORDS = re.compile(r"[a-z]+")
_IRREGULAR = {
    "people": "people", "men": "man", "women": "woman", "children": "child", "knives": "knife",
    "mice": "mouse", "geese": "goose", "wolves": "wolf", "sheep": "sheep", "skis": "skis",
    "scissors": "scissors", "policemen": "policeman", "loaves": "loaf", "halves": "half", "buses": "bus",
    "calves": "calf", "shelves": "shelf", "cookies": "cookie", "ties": "tie", "movies": "movie",
    "pies": "pie",
}  # fmt: skip


class Synonyms:
    """Maps words and phrases to categories."""

    def __init__(self, lines: Sequence[str]) -> None:
        self._category: dict[str, str] = {}
        for line in lines:
            names = [name.strip().lower() for name in line.split(",") if name.strip()]
            for name in names:
                self._category.setdefault(name, names[0])
        if not self._category:
            raise InvalidInput(
                "the synonym list is empty: write a line for each category, its name first, "
                "separated by commas"
            )
        self._phrases = {
            **{pair.strip(): pair.strip() for pair in _PAIRS},
            **{f"{young} {animal}": animal for animal in _ANIMALS for young in ("baby", "adult")},
            **{f"passenger {vehicle}": vehicle for vehicle in _VEHICLES},
            **_INSTEAD,
            **{name: name for name in self._category if " " in name},
        }

    @classmethod
    def read(cls, path: str | Path) -> Synonyms:
        """Read a file. Raises `NotFound`, `InvalidInput`."""
        try:
            return cls(Path(path).read_text(encoding="utf-8").splitlines())
        except OSError as error:
            raise NotFound(f"cannot read the synonym list {path}: {error.strerror}") from error

    def category(self, name: str) -> str:
        """The category of an object's name; "" if there is none."""
        return self._category.get(name.lower(), "")

    def objects(self, caption: str) -> list[str]:
        """Categories of the objects in a caption, repeated as they are; two words for one object count
        once."""
        words = [_singular(word) for word in _WORDS.findall(caption.lower())]
        if "toilet" in words:  # its seat is no chair, which the list takes a seat for
            words = [word for word in words if word != "seat"]
        categories: list[str] = []
        i = 0
        while i < len(words):
            width = next(
                (n for n in (3, 2) if i + n <= len(words) and " ".join(words[i : i + n]) in self._phrases), 1
            )
            phrase = " ".join(words[i : i + width])
            if category := self._category.get(self._phrases.get(phrase, phrase)):
                categories.append(category)
            i += width
        return categories


def chair(
    answers: Sequence[str],
    truths: Sequence[set[str]],
    images: Sequence[Hashable],
    synonyms: Synonyms,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Metric]:
    """CHAIRi (share of named objects that are absent), CHAIRs (share of captions with one), and recall of
    present objects.

    Args:
        truths: the categories in each picture (`present`).
    """
    named = [synonyms.objects(answer) for answer in answers]
    rows = [
        (len(some), sum(name not in truth for name in some), len(truth.intersection(some)), len(truth))
        for some, truth in zip(named, truths, strict=True)
    ]
    count, absent, recalled, present_count = np.asarray(rows, np.float64).reshape(-1, 4).T

    def ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> Callable[[Rows], float]:
        return lambda rows: part[rows].sum() / max(1.0, whole[rows].sum())

    figures = {
        "CHAIRi": ratio(absent, count),
        "CHAIRs": lambda rows: float((absent > 0)[rows].mean()),
        "recall": ratio(recalled, present_count),
        "objects": lambda rows: float(count[rows].mean()),
    }
    return [metric(name, figure, images, resamples=resamples, seed=seed) for name, figure in figures.items()]


def present(annotated: Sequence[str], captions: Sequence[str], synonyms: Synonyms) -> set[str]:
    """Categories in a picture: of its annotations and of its reference captions."""
    return {category for name in annotated if (category := synonyms.category(name))} | {
        category for caption in captions for category in synonyms.objects(caption)
    }


def _singular(word: str) -> str:
    """Singular of an English word, by rules and the exceptions in COCO captions."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) > 3 and word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes", "zes", "toes")):
        return word[:-2]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word
