"""Benchmarks as tasks: one function each, from the benchmark's own files to questions and their scoring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tagstore.errors import InvalidInput
from tagstore.readers.samples import read_lines, read_samples
from tuna_model.evaluation.bootstrap import Metric, mean
from tuna_model.evaluation.captions import caption_metrics
from tuna_model.evaluation.chair import Synonyms, chair, present
from tuna_model.evaluation.choice import choice, read_choices
from tuna_model.evaluation.edits import answers_before, check_truths, edits
from tuna_model.evaluation.naming import fold, naming
from tuna_model.evaluation.questions import Question, Task, TaskAnswer, TaskOptions, read_questions
from tuna_model.evaluation.vqa import SHORT_PROMPT, vqa
from tuna_model.evaluation.yes_no import YES_NO_PROMPT, mme, pope
from tuna_model.processing.data import CAPTION_PROMPT

CHAIR_PROMPT = "Please describe this image in detail."


def load_task(name: str, options: TaskOptions) -> Task:
    """Load the task of a benchmark. Raises `NotFound`, and `InvalidInput` for an unknown name or a wrong file
    format."""
    if name not in TASKS:
        raise InvalidInput(f"there is no task '{name}': take one of {', '.join(TASKS)}")
    return TASKS[name](options)


def _pope(o: TaskOptions) -> Task:
    questions = read_questions(o, YES_NO_PROMPT)
    if o.labels is not None:
        corrected = {
            (line["image"], line.get("text", line.get("question"))): line["label"]
            for _, line in read_lines(o.labels)
        }
        questions = [
            replace(q, truth={**q.truth, "label": corrected[q.truth["image"], q.truth["text"]]})
            for q in questions
            if (q.truth["image"], q.truth["text"]) in corrected
        ]
    labels = [_label(q, o) for q in questions]

    def score(answers: Sequence[TaskAnswer], **options: Any) -> list[Metric]:
        return pope(_texts(answers), labels, **options)

    return _task("pope", questions, score, 8, o)


def _mme(o: TaskOptions) -> Task:
    questions = read_questions(o, YES_NO_PROMPT)
    labels = [_label(q, o) for q in questions]
    categories = [str(q.truth.get("category", "")) for q in questions]

    def score(answers: Sequence[TaskAnswer], images: Sequence[str], **options: Any) -> list[Metric]:
        texts, metrics = _texts(answers), list[Metric]()
        for category in sorted(set(categories)):
            rows = [i for i, name in enumerate(categories) if name == category]
            category_metrics = mme(
                [texts[i] for i in rows], [labels[i] for i in rows], [images[i] for i in rows], **options
            )
            metrics += [replace(m, name=f"{category} {m.name}".strip()) for m in category_metrics]
        return metrics

    return _task("mme", questions, score, 8, o)


def _vqa(o: TaskOptions) -> Task:
    questions = read_questions(o, SHORT_PROMPT)
    references = [_references(q, o) for q in questions]

    def score(answers: Sequence[TaskAnswer], **options: Any) -> list[Metric]:
        return vqa(_texts(answers), references, **options)

    return _task("vqa", questions, score, 16, o)


def _captions(o: TaskOptions) -> Task:
    questions = _captioned(o, o.prompt or CAPTION_PROMPT)
    references = [q.truth["captions"] for q in questions]

    def score(answers: Sequence[TaskAnswer], **options: Any) -> list[Metric]:
        return caption_metrics(_texts(answers), references, tokeniser=o.tokeniser, meteor=o.meteor, **options)

    return _task("captions", questions, score, 40, o)


def _chair(o: TaskOptions) -> Task:
    if o.synonyms is None:
        raise InvalidInput(
            "chair needs the paper's synonym list: --synonyms FILE "
            "(LisaAnne/Hallucination, data/synonyms.txt)"
        )
    synonyms = Synonyms.read(o.synonyms)
    questions = [q for q in _captioned(o, o.prompt or CHAIR_PROMPT) if q.truth.get("objects") is not None]
    if not questions:
        raise InvalidInput(f"{o.data}: no image has a field 'objects' that lists what is in it")
    truths = [
        present([_category(value) for value in q.truth["objects"]], q.truth["captions"], synonyms)
        for q in questions
    ]

    def score(answers: Sequence[TaskAnswer], **options: Any) -> list[Metric]:
        return chair(_texts(answers), truths, synonyms=synonyms, **options)

    return _task("chair", questions, score, 128, o)


def _llava_bench(o: TaskOptions) -> Task:
    questions, judge = read_questions(o), o.judge
    reference_lines, context_lines = (read_lines(path) if path else () for path in (o.references, o.contexts))
    references = {str(line["question_id"]): str(line["text"]) for _, line in reference_lines}
    contexts = {str(line["image"]): str(line["caption"]) for _, line in context_lines}
    if judge is not None and (
        missing := [q.key for q in questions if q.key not in references or q.truth["image"] not in contexts]
    ):
        raise InvalidInput(
            f"to judge, question {missing[0]} needs a reference answer (--references) "
            "and a description (--contexts)"
        )

    def score(answers: Sequence[TaskAnswer], images: Sequence[str], **options: Any) -> list[Metric]:
        if judge is None:
            return []
        relative = []
        for q, answer in zip(questions, answers, strict=True):
            context, question = contexts[q.truth["image"]], str(q.truth["text"])
            reference_mark, mark = judge.marks(
                context=context, question=question, first=references[q.key], second=answer.text
            )
            relative.append(100 * mark / reference_mark)
        return [mean("relative score", relative, images, **options)]

    return _task("llava-bench", questions, score, 256, o)


def _naming(o: TaskOptions) -> Task:
    questions = read_questions(o)
    for q in questions:
        if not isinstance(q.truth.get("name"), str) or not fold(q.truth["name"]):
            raise InvalidInput(f"{o.data}, question {q.key}: 'name' is the right name, a text with a word")
    names = [q.truth["name"] for q in questions]
    splits = [str(q.truth.get("split", "")) for q in questions]

    def score(answers: Sequence[TaskAnswer], **options: Any) -> list[Metric]:
        return naming(answers, names, splits=splits, **options)

    return _task("naming", questions, score, 32, o)


def _choice(o: TaskOptions) -> Task:
    questions = read_choices(o)

    def score(answers: Sequence[TaskAnswer], **options: Any) -> list[Metric]:
        return choice(_texts(answers), questions, **options)

    return _task("choice", questions, score, 32, o)


def _edits(o: TaskOptions) -> Task:
    questions = read_questions(o)
    for q in questions:
        check_truths(q)
    before = answers_before(o.before, questions) if o.before is not None else None

    def score(answers: Sequence[TaskAnswer], **options: Any) -> list[Metric]:
        return [] if before is None else edits(before, _texts(answers), questions, **options)

    return _task("edits", questions, score, 32, o)


TASKS: dict[str, Callable[[TaskOptions], Task]] = {
    "pope": _pope,
    "mme": _mme,
    "vqa": _vqa,
    "captions": _captions,
    "chair": _chair,
    "llava-bench": _llava_bench,
    "naming": _naming,
    "choice": _choice,
    "edits": _edits,
}


def _task(
    name: str,
    questions: Sequence[Question],
    score: Callable[..., list[Metric]],
    max_new_tokens: int,
    o: TaskOptions,
) -> Task:
    """A task whose `score` gets the images of the answers, `resamples` and `seed` beside them."""
    options: dict[str, Any] = {"resamples": o.resamples, "seed": o.seed}
    images = [q.image_key for q in questions]
    names = ("data", "images", "labels", "synonyms", "references", "contexts", "before")
    files = {name: str(getattr(o, name)) for name in names if getattr(o, name)}
    settings = {**files, "split": o.split, "prompt": o.prompt, "questions": len(questions), **options}
    if name == "captions":
        settings["tokeniser"] = o.tokeniser
    return Task(
        name,
        tuple(questions),
        lambda answers: score(answers, images=images, **options),
        max_new_tokens,
        settings,
    )


def _texts(answers: Sequence[TaskAnswer]) -> list[str]:
    return [answer.text for answer in answers]


def _captioned(o: TaskOptions, prompt: str) -> list[Question]:
    samples = read_samples(
        o.data, images=o.images, split=o.split, limit=o.limit, allow_outside=o.allow_outside
    )
    questions = []
    for sample in samples:
        if not sample.captions or not sample.images:
            raise InvalidInput(f"{o.data}, {sample.key}: a captioned picture has an image and captions")
        truth = {"captions": list(sample.captions), "objects": sample.metadata.get("objects")}
        questions.append(Question(sample.key, sample.images[0], sample.key, prompt, truth, sample.key))
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
    values = value if isinstance(value, list) else [value]
    return [str(item.get("answer", "") if isinstance(item, dict) else item) for item in values]


def _category(value: Any) -> str:
    return str(value.get("category", "")) if isinstance(value, dict) else str(value)
