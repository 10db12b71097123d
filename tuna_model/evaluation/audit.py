"""Tag trust: how good the model's answers are when its tags are good, corrupted, of another image, random or
absent, and how often it follows a single wrong tag.

    report = audit(task, answerer, source)
    report.markdown(); plot(report, "trust.svg")

A model that ignores tags scores the same under every condition; one that believes all of them falls below
`none` when they are bad.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tagstore.client import TagSource
from tagstore.errors import InvalidInput, MissingExtra
from tuna_model.evaluation.answerer import PipelineAnswerer
from tuna_model.evaluation.bootstrap import Metric, mean
from tuna_model.evaluation.questions import Question, Task, TaskAnswer
from tuna_model.evaluation.yes_no import is_yes
from tuna_model.processing.tags import ImageTags
from tuna_model.training.noise import TagPool, replace_rows

CONDITIONS = ("matched", "corrupted", "irrelevant", "random", "none")
"""`matched`: the store's tags. `corrupted`: some of them replaced by others of the vocabulary. `irrelevant`:
another image's. `random`: as many of the vocabulary. `none`: no tags."""
_OBJECT = re.compile(r"is there (?:an?|any|some)?\s*(.+?) in the (?:image|picture|photo)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Audit:
    """The scores under each condition, and how often single tags are followed."""

    task: str
    metric: str
    """The metric of the task that `scores` holds."""
    scores: Mapping[str, Metric]
    """By condition."""
    follows: Metric | None
    """Of questions about an absent object that are answered no without tags: the share that become yes when
    the object is given as a tag. None if the task has no such questions."""
    follows_truth: Metric | None
    """The same of questions about an object that is present."""
    settings: Mapping[str, Any]

    def markdown(self) -> str:
        """As a table and two sentences."""
        rows = "\n".join(
            f"| {name} | {m.value:.4f} | {m.low:.4f} to {m.high:.4f} |" for name, m in self.scores.items()
        )
        header = f"| tags | {self.metric} | 95 % interval |\n| --- | --- | --- |"
        text = f"## {self.task}: {self.metric} by tags\n\n{header}\n{rows}\n"
        for metric, kind in ((self.follows, "wrong"), (self.follows_truth, "right")):
            if metric is not None:
                text += (
                    f"\nOf {metric.count} answers that were no without tags, {100 * metric.value:.1f} % "
                    f"({100 * metric.low:.1f} to {100 * metric.high:.1f}) became yes with one {kind} tag."
                )
        return text + "\n\n" + "\n".join(f"- {name}: {value}" for name, value in self.settings.items()) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def audit(
    task: Task,
    model: PipelineAnswerer,
    source: TagSource,
    *,
    rate: float = 0.5,
    seed: int = 0,
    batch_size: int = 8,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> Audit:
    """Ask a task's questions under every condition.

    Args:
        source: the store; wrong and random tags are drawn from its vocabulary.
        rate: share of tags that are replaced in `corrupted`.
        progress: called as (answers so far, total).

    Raises:
        InvalidInput: the store gives no tags for these images, or the task needs a judge.
    """
    questions = list(task.questions)
    images = {question.image_key: question for question in questions}
    tags = _matched(model, list(images.values()), batch_size)
    if not any(len(image_tags) for image_tags, _ in tags.values()):
        raise InvalidInput(
            "the store gives no tags for these images: audit a model with --store grpc://... or file://..."
        )
    pool = TagPool.draw(source, 4096, seed)
    given = {name: _condition(name, tags, pool, rate, seed) for name in CONDITIONS}
    probes = [(question, name) for question in questions if (name := _object_name(question)) is not None]
    total = len(CONDITIONS) * len(questions) + len(probes)
    done = 0

    def ask(asked: Sequence[Question], with_tags: Sequence[ImageTags]) -> list[TaskAnswer]:
        nonlocal done
        answers = []
        for start in range(0, len(asked), batch_size):
            part = slice(start, start + batch_size)
            answers += model.answer(asked[part], max_new_tokens=task.max_new_tokens, tags=with_tags[part])
            done += len(asked[part])
            progress(done, total)
        return answers

    answers = {
        name: ask(questions, [given[name][question.image_key] for question in questions])
        for name in CONDITIONS
    }
    metrics = {name: task.score(of_condition) for name, of_condition in answers.items()}
    if not all(metrics.values()):
        raise InvalidInput(f"task '{task.name}' gives no figure of one run alone: audit one that does")
    if task.name in ("pope", "mme"):
        main = "accuracy"
    else:
        main = metrics["none"][-1 if task.name == "captions" else 0].name
    scores = {name: next(m for m in some if m.name.endswith(main)) for name, some in metrics.items()}
    probed = [question for question, _ in probes]
    with_object = ask(probed, _injected(model, probes, tags))
    before = {question.key: answer.text for question, answer in zip(questions, answers["none"], strict=True)}
    after = {question.key: answer.text for question, answer in zip(probed, with_object, strict=True)}
    follows, follows_truth = (_flips(probed, before, after, label, seed) for label in ("no", "yes"))
    settings = {**task.settings, **model.describe(), "corrupted rate": rate, "seed": seed}
    return Audit(task.name, main, scores, follows, follows_truth, settings)


def plot(report: Audit, path: str | Path) -> None:
    """Draw the scores as bars with intervals into an SVG, PNG or PDF. Raises `MissingExtra` without
    matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtra("the plot needs matplotlib: pip install 'tagstore[eval]'") from error
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    scores = report.scores.values()
    below = [max(0.0, score.value - score.low) for score in scores]
    above = [max(0.0, score.high - score.value) for score in scores]
    colours = ["#2e7f79", "#c9a227", "#c4683a", "#b5838d", "#8d8d8d"]
    values = [score.value for score in scores]
    axes.bar(list(report.scores), values, yerr=[below, above], capsize=4, color=colours)
    axes.axhline(report.scores["none"].value, color="#8d8d8d", linewidth=1, linestyle="--")
    axes.set_ylabel(report.metric)
    axes.set_title(f"{report.task}: answers under each kind of tags", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


def _matched(
    model: PipelineAnswerer, questions: Sequence[Question], batch_size: int
) -> dict[str, tuple[ImageTags, Any]]:
    """The store's tags and the vector of each image."""
    pipeline = model.pipeline
    matched: dict[str, tuple[ImageTags, Any]] = {}
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        pictures = [question.picture() for question in batch]
        pixels = pipeline.processor.image_processor([picture for picture, _ in pictures])["pixel_values"]
        _, vectors = pipeline.model.encode_images(pixels.to(pipeline.model.device))
        if vectors is None:
            raise InvalidInput(
                "this model's own tower has no vectors in a store's space: "
                "call join_encoder('hf:...') and save it first"
            )
        identities = [identity for _, identity in pictures]
        tags = pipeline.lookup(vectors, pipeline.model.config.encoder_digest, identities=identities)
        pairs = zip(tags, vectors.float().cpu().numpy(), strict=True)
        matched |= {question.image_key: pair for question, pair in zip(batch, pairs, strict=True)}
    return matched


def _condition(
    name: str, tags: Mapping[str, tuple[ImageTags, Any]], pool: TagPool, rate: float, seed: int
) -> dict[str, ImageTags]:
    """The tags of each image under a condition."""
    keys = list(tags)
    given: dict[str, ImageTags] = {}
    for i, key in enumerate(keys):
        matched, vector = tags[key]
        rng = np.random.default_rng([seed, i])
        if name == "matched":
            given[key] = matched
        elif name == "irrelevant":
            other = keys[(i + max(1, len(keys) // 2)) % len(keys)]
            given[key] = tags[other][0].for_image(vector)
        elif name in ("corrupted", "random"):
            rows = np.flatnonzero(rng.random(len(matched)) < (rate if name == "corrupted" else 1.0))
            drawn = pool.take(rng.integers(len(pool.ids), size=len(rows)))
            given[key] = replace_rows(matched, rows, drawn, vector)
        else:
            given[key] = ImageTags.none(matched.embeddings.shape[1])
    return given


def _object_name(question: Question) -> str | None:
    """The object that a yes-or-no question asks about; None for other questions."""
    if "label" not in question.truth:
        return None
    if name := question.truth.get("object"):
        return str(name)
    match = _OBJECT.search(str(question.truth.get("text", "")))
    return match[1] if match else None


def _injected(
    model: PipelineAnswerer, probes: Sequence[tuple[Question, str]], tags: Mapping[str, tuple[ImageTags, Any]]
) -> list[ImageTags]:
    """The object of each question as the only tag: as similar as the store's best tag, and carried by all
    neighbours."""
    if not probes:
        return []
    objects = sorted({name for _, name in probes})
    embeddings = dict(zip(objects, model.pipeline.model.encoder.encode_texts(objects), strict=True))
    injected = []
    for question, name in probes:
        matched, vector = tags[question.image_key]
        best = float(matched.similarity.max()) if len(matched) else 1.0
        similarity, vote_share, relevance = np.array([[best], [1.0], [embeddings[name] @ vector]], np.float32)
        injected.append(ImageTags((name,), embeddings[name][None], similarity, vote_share, relevance, (-1,)))
    return injected


def _flips(
    questions: Sequence[Question], before: Mapping[str, str], after: Mapping[str, str], label: str, seed: int
) -> Metric | None:
    """Of the questions with this label that were answered no before: the share answered yes after."""
    asked = [q for q in questions if str(q.truth["label"]).lower() == label and not is_yes(before[q.key])]
    if not asked:
        return None
    name = "follows a wrong tag" if label == "no" else "follows a right tag"
    flipped = [float(is_yes(after[q.key])) for q in asked]
    return mean(name, flipped, [q.image_key for q in asked], seed=seed)
