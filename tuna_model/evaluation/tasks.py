"""What is asked, and how the answers are scored: one function for each benchmark, from its own files to a `Task`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tagstore.errors import InvalidInput
from tagstore.readers.samples import Place, image_place, read_lines, read_samples
from tuna_model.evaluation.bootstrap import Metric, mean
from tuna_model.evaluation.captions import Tokeniser, caption_metrics
from tuna_model.evaluation.chair import Synonyms, chair, present
from tuna_model.evaluation.judge import Judge
from tuna_model.evaluation.vqa import SHORT_PROMPT, vqa
from tuna_model.evaluation.yes_no import YES_NO_PROMPT, mme, pope
from tuna_model.processing.data import CAPTION_PROMPT

CHAIR_PROMPT = "Please describe this image in detail."


@dataclass(frozen=True, slots=True)
class Question:
    """One thing to ask about one image."""

    key: str
    image: Place
    image_key: str
    """What tells images apart; intervals are over images."""
    text: str
    truth: Mapping[str, Any] = field(default_factory=dict)
    """What its task scores against; nothing of it reaches the model."""


@dataclass(frozen=True, slots=True)
class Task:
    """Questions and the way to score answers to them."""

    name: str
    questions: tuple[Question, ...]
    score: Callable[[Sequence[str]], list[Metric]]
    """Answers in the order of the questions."""
    max_new_tokens: int
    settings: Mapping[str, Any]
    """For the report: files, prompt, tokeniser."""


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """Where a task's files are, and what they leave open."""

    data: Path
    """Questions (JSON lines), or captioned images (JSON lines, JSON, WebDataset)."""
    images: Path | None = None
    """Directory that image names are relative to; that of `data` if not given."""
    labels: Path | None = None
    """pope: RePOPE's file; its labels replace those of `data`, and only its questions are asked."""
    synonyms: Path | None = None
    """chair: the paper's synonym list."""
    references: Path | None = None
    """llava-bench: reference answers, JSON lines with question_id and text."""
    contexts: Path | None = None
    """llava-bench: descriptions of the images for the judge, JSON lines with image and caption."""
    split: str = ""
    limit: int = 0
    """Only so many questions, the first; 0 for all."""
    prompt: str = ""
    """Instead of the task's own."""
    tokeniser: Tokeniser = "plain"
    meteor: bool = False
    judge: Judge | None = None
    """llava-bench: without one, answers are written and not marked."""
    resamples: int = 1000
    seed: int = 0


def load_task(name: str, options: TaskOptions) -> Task:
    """The task of a benchmark. Raises `InvalidInput` for a name that there is not, or files that are not of its format; `NotFound`."""
    if name not in TASKS:
        raise InvalidInput(f"there is no task '{name}': take one of {', '.join(TASKS)}")
    return TASKS[name](options)


def _pope(o: TaskOptions) -> Task:
    questions = _asked(o, YES_NO_PROMPT)
    if o.labels is not None:
        corrected = {
            (line["image"], line.get("text", line.get("question"))): line["label"]
            for _, line in read_lines(o.labels)
        }
        questions = [
            Question(
                q.key,
                q.image,
                q.image_key,
                q.text,
                {**q.truth, "label": corrected[q.truth["image"], q.truth["text"]]},
            )
            for q in questions
            if (q.truth["image"], q.truth["text"]) in corrected
        ]
    labels = [_label(q, o) for q in questions]
    images = [q.image_key for q in questions]
    return _task(
        "pope", questions, lambda a: pope(a, labels, images, resamples=o.resamples, seed=o.seed), 8, o
    )


def _mme(o: TaskOptions) -> Task:
    questions = _asked(o, YES_NO_PROMPT)
    labels = [_label(q, o) for q in questions]
    categories = [str(q.truth.get("category", "")) for q in questions]

    def score(answers: Sequence[str]) -> list[Metric]:
        metrics: list[Metric] = []
        for category in sorted(set(categories)):
            rows = [i for i, one in enumerate(categories) if one == category]
            some = mme(
                [answers[i] for i in rows],
                [labels[i] for i in rows],
                [questions[i].image_key for i in rows],
                resamples=o.resamples,
                seed=o.seed,
            )
            metrics += [Metric(f"{category} {m.name}".strip(), m.value, m.low, m.high, m.count) for m in some]
        return metrics

    return _task("mme", questions, score, 8, o)


def _vqa(o: TaskOptions) -> Task:
    questions = _asked(o, SHORT_PROMPT)
    references = [_references(q, o) for q in questions]
    images = [q.image_key for q in questions]
    return _task(
        "vqa", questions, lambda a: vqa(a, references, images, resamples=o.resamples, seed=o.seed), 16, o
    )


def _captions(o: TaskOptions) -> Task:
    questions = _captioned(o, o.prompt or CAPTION_PROMPT)
    references = [q.truth["captions"] for q in questions]
    images = [q.image_key for q in questions]

    def score(answers: Sequence[str]) -> list[Metric]:
        return caption_metrics(
            answers, references, images, tokeniser=o.tokeniser, meteor=o.meteor, resamples=o.resamples, seed=o.seed
        )  # fmt: skip

    return _task("captions", questions, score, 40, o)


def _chair(o: TaskOptions) -> Task:
    if o.synonyms is None:
        raise InvalidInput(
            "chair needs the paper's synonym list: --synonyms FILE (LisaAnne/Hallucination, data/synonyms.txt)"
        )
    synonyms = Synonyms.read(o.synonyms)
    questions = [q for q in _captioned(o, o.prompt or CHAIR_PROMPT) if q.truth.get("objects") is not None]
    if not questions:
        raise InvalidInput(f"{o.data}: no image has a field 'objects', which says what is in it")
    truths = [
        present([_category(one) for one in q.truth["objects"]], q.truth["captions"], synonyms)
        for q in questions
    ]
    images = [q.image_key for q in questions]
    return _task(
        "chair",
        questions,
        lambda a: chair(a, truths, images, synonyms, resamples=o.resamples, seed=o.seed),
        128,
        o,
    )


def _llava_bench(o: TaskOptions) -> Task:
    questions = _asked(o, "")
    references = (
        {str(line["question_id"]): str(line["text"]) for _, line in read_lines(o.references)}
        if o.references
        else {}
    )
    contexts = (
        {str(line["image"]): str(line["caption"]) for _, line in read_lines(o.contexts)} if o.contexts else {}
    )
    judge = o.judge
    if judge is not None and (
        missing := [q.key for q in questions if q.key not in references or q.truth["image"] not in contexts]
    ):
        raise InvalidInput(
            f"to judge, question {missing[0]} needs a reference answer (--references) and a description (--contexts)"
        )

    def score(answers: Sequence[str]) -> list[Metric]:
        if judge is None:
            return []
        marks = [
            judge.marks(
                context=contexts[q.truth["image"]],
                question=str(q.truth["text"]),
                first=references[q.key],
                second=answer,
            )
            for q, answer in zip(questions, answers, strict=True)
        ]
        relative = [100 * ours / theirs for theirs, ours in marks]
        return [
            mean(
                "relative score",
                relative,
                [q.image_key for q in questions],
                resamples=o.resamples,
                seed=o.seed,
            )
        ]

    return _task("llava-bench", questions, score, 256, o)


TASKS: dict[str, Callable[[TaskOptions], Task]] = {
    "pope": _pope,
    "mme": _mme,
    "vqa": _vqa,
    "captions": _captions,
    "chair": _chair,
    "llava-bench": _llava_bench,
}


def _task(
    name: str,
    questions: Sequence[Question],
    score: Callable[[Sequence[str]], list[Metric]],
    tokens: int,
    o: TaskOptions,
) -> Task:
    files = {
        key: str(value)
        for key in ("data", "images", "labels", "synonyms", "references", "contexts")
        if (value := getattr(o, key))
    }
    settings: dict[str, Any] = {
        **files,
        "split": o.split,
        "questions": len(questions),
        "resamples": o.resamples,
        "seed": o.seed,
    }
    if name == "captions":
        settings["tokeniser"] = o.tokeniser
    return Task(name, tuple(questions), score, tokens, settings)


def _asked(o: TaskOptions, suffix: str) -> list[Question]:
    """Questions of a JSON-lines file: image, text (or question), question_id, and whatever the task scores against."""
    folder = o.images or o.data.parent
    questions: list[Question] = []
    for number, line in read_lines(o.data):
        text = line.get("text", line.get("question"))
        where = f"{o.data}, line {number}"
        if not isinstance(text, str) or not isinstance(line.get("image"), str):
            raise InvalidInput(f"{where}: a question has 'image' and 'text', this has {', '.join(line)}")
        asked = "\n".join(part for part in (text, o.prompt or suffix) if part)
        key = str(line.get("question_id", len(questions)))
        image = image_place(line["image"], folder, where)
        questions.append(Question(key, image, line["image"], asked, {**line, "text": text}))
        if len(questions) == o.limit:
            break
    if not questions:
        raise InvalidInput(f"{o.data} has no question")
    return questions


def _captioned(o: TaskOptions, prompt: str) -> list[Question]:
    samples = read_samples(o.data, images=o.images, split=o.split, limit=o.limit)
    questions = []
    for sample in samples:
        if not sample.captions or not sample.images:
            raise InvalidInput(f"{o.data}, {sample.key}: a captioned picture has an image and captions")
        truth = {"captions": list(sample.captions), "objects": sample.metadata.get("objects")}
        questions.append(Question(sample.key, sample.images[0], sample.key, prompt, truth))
    return questions


def _label(question: Question, o: TaskOptions) -> bool:
    label = str(question.truth.get("label", question.truth.get("answer", ""))).lower()
    if label not in ("yes", "no"):
        raise InvalidInput(f"{o.data}, question {question.key}: its label is {label!r}, not yes or no")
    return label == "yes"


def _references(question: Question, o: TaskOptions) -> list[str]:
    value = question.truth.get("answers", question.truth.get("answer"))
    if not value:
        raise InvalidInput(f"{o.data}, question {question.key}: no 'answer' or 'answers' to compare with")
    return [
        str(one.get("answer", "")) if isinstance(one, dict) else str(one)
        for one in (value if isinstance(value, list) else [value])
    ]


def _category(value: Any) -> str:
    return str(value.get("category", "")) if isinstance(value, dict) else str(value)
