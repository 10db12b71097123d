"""CHAIR: how many of the objects that a caption names are not in the picture.

Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018. The synonym list is the paper's own (github
LisaAnne/Hallucination, data/synonyms.txt): a line for each of the 80 COCO categories, its name first. It states no licence and is
therefore given by path.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np

from tagstore.errors import InvalidInput, NotFound
from tuna_model.evaluation.bootstrap import Metric, mean, metric

# Two words that together are an object, or an object that together they are not: the paper's own lists.
_PAIRS = """motor bike;motor cycle;air plane;traffic light;street light;traffic signal;stop light;fire hydrant;stop sign;parking meter;
suit case;sports ball;baseball bat;baseball glove;tennis racket;wine glass;hot dog;cell phone;mobile phone;teddy bear;hair drier;
potted plant;bow tie;laptop computer;stove top oven;home plate;train track"""
_ANIMALS = (
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "animal",
    "cub",
)
_VEHICLES = ("jet", "train")
# "home plate" is no plate, "train track" no train
_INSTEAD = {"bow tie": "tie", "home plate": "", "train track": ""}
_WORDS = re.compile(r"[a-z]+")
_IRREGULAR = {
    "people": "people", "men": "man", "women": "woman", "children": "child", "knives": "knife", "mice": "mouse", "geese": "goose",
    "wolves": "wolf", "sheep": "sheep", "skis": "skis", "scissors": "scissors",
    "policemen": "policeman", "loaves": "loaf", "halves": "half",
    "buses": "bus", "calves": "calf", "shelves": "shelf", "cookies": "cookie", "ties": "tie", "movies": "movie", "pies": "pie",
}  # fmt: skip


class Synonyms:
    """Which category a word or phrase means."""

    def __init__(self, lines: Sequence[str]) -> None:
        self._category: dict[str, str] = {}
        for line in lines:
            names = [name.strip().lower() for name in line.split(",") if name.strip()]
            for name in names:
                self._category.setdefault(name, names[0])
        if not self._category:
            raise InvalidInput(
                "the synonym list is empty: give one line for each category, its name first, with commas between"
            )
        self._phrases = {
            **{pair.strip(): pair.strip() for pair in _PAIRS.split(";")},
            **{f"{young} {animal}": animal for animal in _ANIMALS for young in ("baby", "adult")},
            **{f"passenger {vehicle}": vehicle for vehicle in _VEHICLES},
            **_INSTEAD,
            **{name: name for name in self._category if " " in name},
        }

    @classmethod
    def read(cls, path: str | Path) -> Synonyms:
        """From a file. Raises `NotFound`, `InvalidInput`."""
        try:
            return cls(Path(path).read_text(encoding="utf-8").splitlines())
        except OSError as error:
            raise NotFound(f"cannot read the synonym list {path}: {error.strerror}") from error

    def category(self, name: str) -> str:
        """Of an object's name; "" if it is none of the categories."""
        return self._category.get(name.lower(), "")

    def objects(self, caption: str) -> list[str]:
        """Categories that a caption names, as often as it names them; two words that are one object count once."""
        words = [_singular(word) for word in _WORDS.findall(caption.lower())]
        if "toilet" in words:
            words = [
                word for word in words if word != "seat"
            ]  # the list takes a seat as a chair; that of a toilet is none
        found: list[str] = []
        i = 0
        while i < len(words):
            width = next(
                (n for n in (3, 2) if i + n <= len(words) and " ".join(words[i : i + n]) in self._phrases), 1
            )
            phrase = " ".join(words[i : i + width])
            if category := self._category.get(self._phrases.get(phrase, phrase)):
                found.append(category)
            i += width
        return found


def chair(
    answers: Sequence[str],
    truths: Sequence[set[str]],
    images: Sequence[Hashable],
    synonyms: Synonyms,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Metric]:
    """CHAIRi (share of named objects that are not there), CHAIRs (share of captions with one), and recall of what is there.

    Args:
        truths: the categories in each picture: of its annotations, together with those that its reference captions name (`present`).
    """
    named = [synonyms.objects(answer) for answer in answers]
    wrong = np.asarray(
        [sum(one not in truth for one in some) for some, truth in zip(named, truths, strict=True)], np.float64
    )
    count = np.asarray([len(some) for some in named], np.float64)
    found = np.asarray(
        [len(truth.intersection(some)) for some, truth in zip(named, truths, strict=True)], np.float64
    )
    there = np.asarray([len(truth) for truth in truths], np.float64)
    return [
        metric(
            "CHAIRi",
            lambda rows: wrong[rows].sum() / max(1.0, count[rows].sum()),
            images,
            resamples=resamples,
            seed=seed,
        ),
        mean("CHAIRs", (wrong > 0).tolist(), images, resamples=resamples, seed=seed),
        metric(
            "recall",
            lambda rows: found[rows].sum() / max(1.0, there[rows].sum()),
            images,
            resamples=resamples,
            seed=seed,
        ),
        mean("objects", count.tolist(), images, resamples=resamples, seed=seed),
    ]


def present(annotated: Sequence[str], captions: Sequence[str], synonyms: Synonyms) -> set[str]:
    """Categories in a picture: its annotations and what its reference captions name."""
    return {category for name in annotated if (category := synonyms.category(name))} | {
        category for caption in captions for category in synonyms.objects(caption)
    }


def _singular(word: str) -> str:
    """English plurals by rule; exceptions are those that COCO captions have."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) > 3 and word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes", "zes", "toes")):
        return word[:-2]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word
