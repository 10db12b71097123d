"""Questions about images, read from JSON Lines; answers to them; and tasks, which score answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image

from tagstore.encoding.images import decode, identify
from tagstore.errors import InvalidInput
from tagstore.readers.samples import Place, image_key, image_place, read_lines
from tagstore.types import Identity
from tuna_model.evaluation.bootstrap import Metric
from tuna_model.evaluation.captions import Tokeniser
from tuna_model.evaluation.judge import Judge


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one image."""

    key: str
    image: Place
    image_key: str
    """Identifies the image; intervals are over images."""
    text: str
    truth: Mapping[str, Any] = field(default_factory=dict)
    """The right answer, which its task scores against and the model never sees."""
    store_key: str = ""
    """Key that the image has in a store or a recorded map of the same data; empty if unknown."""

    def picture(self) -> tuple[Image, Identity]:
        """Read and decode the image, with its identity for the leak guard. Raises `NotFound`, `BadImage`."""
        data = self.image.read()
        picture = decode(data)
        return picture, identify(data, picture, self.store_key)


@dataclass(frozen=True, slots=True)
class TaskAnswer:
    """A model's answer to a question of a task, and the tags that it was given."""

    text: str
    tags: tuple[str, ...] = ()
    """In the order of the prompt."""
    degraded: bool = False
    """Whether the store did not answer, so that the model answered without tags."""


@dataclass(frozen=True, slots=True)
class Task:
    """Questions, and how answers are scored."""

    name: str
    questions: tuple[Question, ...]
    score: Callable[[Sequence[TaskAnswer]], list[Metric]]
    """Scores answers in the order of the questions."""
    max_new_tokens: int
    settings: Mapping[str, Any]
    """For the report: files, prompt, tokeniser."""


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """Files and settings of a task."""

    data: Path
    """Questions (JSON lines; also TSV and JSON for `choice`), or captioned images (JSON lines, JSON,
    WebDataset)."""
    images: Path | None = None
    """Directory that image names are relative to; by default that of `data`."""
    allow_outside: bool = False
    """Whether image paths, and links, may lead out of that directory."""
    labels: Path | None = None
    """pope: RePOPE's file; its labels replace those of `data`, and only its questions are asked."""
    synonyms: Path | None = None
    """chair: the paper's synonym list."""
    references: Path | None = None
    """llava-bench: reference answers, JSON lines with question_id and text."""
    contexts: Path | None = None
    """llava-bench: descriptions of the images for the judge, JSON lines with image and caption."""
    before: Path | None = None
    """edits: directory of the answers with the store before its edit; without it answers are only written."""
    split: str = ""
    """Keeps only questions, or captioned images, whose field `split` is this."""
    limit: int = 0
    """Number of questions to ask, the first ones; 0 for all."""
    prompt: str = ""
    """Replaces the task's own prompt."""
    tokeniser: Tokeniser = "plain"
    meteor: bool = False
    judge: Judge | None = None
    """llava-bench: gives the marks; without one, answers are only written."""
    resamples: int = 1000
    seed: int = 0


def read_answers(path: Path, header: str = "") -> dict[str, TaskAnswer]:
    """Read a file of answers that `evaluate` wrote, by the keys of their questions.

    Args:
        header: the first line that it must have to be read, or none for any. Without it there is no answer.
    """
    first, *lines = path.read_text(encoding="utf-8").split("\n")
    answers = {}
    for line in lines if header in ("", first) else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break  # the end, or the line that was being written when the run was cut off
        answers[record["key"]] = TaskAnswer(record["answer"], tuple(record["tags"]), record["degraded"])
    return answers


def read_questions(o: TaskOptions, suffix: str = "") -> list[Question]:
    """Read the questions of a JSON Lines file: image, text (or question), question_id, and the fields that
    the task scores against.

    Args:
        suffix: the task's prompt, on a line of its own after each question; `o.prompt` replaces it.

    Raises:
        NotFound: there is no such file.
        InvalidInput: a line is no question, two have the same id, or there is none.
    """
    folder = o.images or o.data.parent
    questions: dict[str, Question] = {}
    for number, line in read_lines(o.data):
        text = line.get("text", line.get("question"))
        where = f"{o.data}, line {number}"
        if not isinstance(text, str) or not isinstance(line.get("image"), str):
            raise InvalidInput(f"{where}: a question has 'image' and 'text', this has {', '.join(line)}")
        if o.split and line.get("split") != o.split:
            continue
        prompt = "\n".join(part for part in (text, o.prompt or suffix) if part)
        key = str(line.get("question_id", len(questions)))
        if key in questions:
            raise InvalidInput(f"{where}: the question_id {key} is there twice, and answers are kept by it")
        image = image_place(line["image"], folder, where, allow_outside=o.allow_outside)
        store_key = image_key(line, line["image"], folder, where)
        questions[key] = Question(key, image, line["image"], prompt, {**line, "text": text}, store_key)
        if len(questions) == o.limit:
            break
    if not questions:
        raise InvalidInput(f"{o.data} has no question" + (f" of split '{o.split}'" if o.split else ""))
    return list(questions.values())
