"""Tag trust: what the model's answers are worth when its tags are good, spoilt, of another image, random, or absent, and how far it follows
a single tag that is wrong.

    report = audit(task, answerer, source)
    report.markdown(); plot(report, "trust.svg")

A model that ignores tags scores the same in every column; one that believes everything falls below `none` as soon as tags are bad.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tagstore.client import TagSource
from tagstore.errors import InvalidInput, MissingExtra
from tuna_model.evaluation.answerer import PipelineAnswerer
from tuna_model.evaluation.bootstrap import Metric, mean
from tuna_model.evaluation.tasks import Question, Task
from tuna_model.evaluation.yes_no import is_yes
from tuna_model.processing.tags import ImageTags
from tuna_model.training.noise import TagPool, replace_rows

CONDITIONS = ("matched", "corrupted", "irrelevant", "random", "none")
"""`matched`: the store's. `corrupted`: some of them exchanged for others of the vocabulary. `irrelevant`: another image's. `random`: as
many of the vocabulary. `none`: no tags."""
_OBJECT = re.compile(r"is there (?:an?|any|some)?\s*(.+?) in the (?:image|picture|photo)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Audit:
    """What came out."""

    task: str
    metric: str
    """Which of the task's figures `scores` are."""
    scores: Mapping[str, Metric]
    """By condition."""
    follows: Metric | None
    """Questions about a thing that is not there: share of those answered no without tags that become yes when the thing is given as a
    tag. None where the task has no such questions."""
    follows_truth: Metric | None
    """Questions about a thing that is there: share of those answered no without tags that become yes when it is given as a tag."""
    settings: Mapping[str, Any]

    def markdown(self) -> str:
        """As a table and two sentences."""
        rows = "\n".join(
            f"| {name} | {m.value:.4f} | {m.low:.4f} to {m.high:.4f} |" for name, m in self.scores.items()
        )
        text = f"## {self.task}: {self.metric} by tags\n\n| tags | {self.metric} | 95 % interval |\n| --- | --- | --- |\n{rows}\n"
        for metric, what in ((self.follows, "wrong"), (self.follows_truth, "right")):
            if metric is not None:
                text += (
                    f"\nOf {metric.count} answers that were no without tags, {100 * metric.value:.1f} % "
                    f"({100 * metric.low:.1f} to {100 * metric.high:.1f}) became yes with one {what} tag."
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
        rate: of tags that are exchanged in `corrupted`.
        progress: called as (answers so far, of how many).

    Raises:
        InvalidInput: the store gives no tags for these images, or the task has no figure that needs no judge.
    """
    questions = list(task.questions)
    images = {question.image_key: question for question in questions}
    tags = _matched(model, list(images.values()), batch_size)
    if not any(len(some) for some, _ in tags.values()):
        raise InvalidInput(
            "the store gives no tags for these images: audit a model with --store grpc://... or file://..."
        )
    pool = TagPool.draw(source, 4096, seed)
    given = {name: _condition(name, tags, pool, rate, seed) for name in CONDITIONS}
    probes = [(question, thing) for question in questions if (thing := _thing(question)) is not None]
    total = len(CONDITIONS) * len(questions) + len(probes)
    done = 0

    def ask(some: Sequence[Question], with_tags: Sequence[ImageTags]) -> list[str]:
        nonlocal done
        said = []
        for start in range(0, len(some), batch_size):
            part = slice(start, start + batch_size)
            said += [
                one.text
                for one in model.answer(some[part], max_new_tokens=task.max_new_tokens, tags=with_tags[part])
            ]
            done += len(some[part])
            progress(done, total)
        return said

    answers = {
        name: ask(questions, [given[name][question.image_key] for question in questions])
        for name in CONDITIONS
    }
    scored = {name: task.score(said) for name, said in answers.items()}
    if not all(scored.values()):
        raise InvalidInput(f"task '{task.name}' gives no figure without a judge: audit one that does")
    main = (
        "accuracy"
        if task.name in ("pope", "mme")
        else scored["none"][-1].name
        if task.name == "captions"
        else scored["none"][0].name
    )
    scores = {name: next(m for m in metrics if m.name.endswith(main)) for name, metrics in scored.items()}
    injected = _injected(model, probes, tags)
    said = dict(zip((q.key for q, _ in probes), ask([q for q, _ in probes], injected), strict=True))
    before = {question.key: text for question, text in zip(questions, answers["none"], strict=True)}
    settings = {**task.settings, **model.describe(), "corrupted rate": rate, "seed": seed}
    return Audit(
        task.name, main, scores, _flips(probes, before, said, "no", seed), _flips(probes, before, said, "yes", seed), settings
    )  # fmt: skip


def plot(report: Audit, path: str | Path) -> None:
    """The scores as bars with their intervals, into an SVG, PNG or PDF. Raises `MissingExtra` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtra("the plot needs matplotlib: pip install 'tagstore[eval]'") from error
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    names = list(report.scores)
    values = [report.scores[name].value for name in names]
    low = [max(0.0, report.scores[name].value - report.scores[name].low) for name in names]
    high = [max(0.0, report.scores[name].high - report.scores[name].value) for name in names]
    axes.bar(
        names,
        values,
        yerr=[low, high],
        capsize=4,
        color=["#2e7f79", "#c9a227", "#c4683a", "#b5838d", "#8d8d8d"],
    )
    axes.axhline(report.scores["none"].value, color="#8d8d8d", linewidth=1, linestyle="--")
    axes.set_ylabel(report.metric)
    axes.set_title(f"{report.task}: what the answers are worth with these tags", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


def _matched(
    model: PipelineAnswerer, questions: Sequence[Question], batch_size: int
) -> dict[str, tuple[ImageTags, Any]]:
    """Tags and vector of each image."""
    pipeline = model.pipeline
    found: dict[str, tuple[ImageTags, Any]] = {}
    for start in range(0, len(questions), batch_size):
        some = questions[start : start + batch_size]
        pixels = pipeline.processor.image_processor([question.image.read() for question in some])[
            "pixel_values"
        ]
        _, vectors = pipeline.model.encode_images(pixels.to(pipeline.model.device))
        if vectors is None:
            raise InvalidInput(
                "this model's own tower has no vectors in a store's space: call join_encoder('hf:...') and save it first"
            )
        rows = vectors.float().cpu().numpy()
        tags = pipeline.lookup(vectors, pipeline.model.config.encoder_digest)
        found |= {question.image_key: (one, row) for question, one, row in zip(some, tags, rows, strict=True)}
    return found


def _condition(
    name: str, tags: Mapping[str, tuple[ImageTags, Any]], pool: TagPool, rate: float, seed: int
) -> dict[str, ImageTags]:  # fmt: skip
    keys = list(tags)
    given: dict[str, ImageTags] = {}
    for place, key in enumerate(keys):
        own, vector = tags[key]
        rng = np.random.default_rng([seed, place])
        if name == "matched":
            given[key] = own
        elif name == "irrelevant":
            given[key] = tags[keys[(place + max(1, len(keys) // 2)) % len(keys)]][0].for_image(vector)
        elif name in ("corrupted", "random"):
            rows = np.flatnonzero(rng.random(len(own)) < (rate if name == "corrupted" else 1.0))
            given[key] = replace_rows(
                own, rows, pool.take(rng.integers(len(pool.ids), size=len(rows))), vector
            )
        else:
            given[key] = ImageTags.none(own.embeddings.shape[1])
    return given


def _thing(question: Question) -> str | None:
    """What a yes-or-no question asks for; None if it asks for something else."""
    if "label" not in question.truth:
        return None
    if named := question.truth.get("object"):
        return str(named)
    match = _OBJECT.search(str(question.truth.get("text", "")))
    return match[1] if match else None


def _injected(
    model: PipelineAnswerer, probes: Sequence[tuple[Question, str]], tags: Mapping[str, tuple[ImageTags, Any]]
) -> list[ImageTags]:
    """The thing that is asked for as the only tag, with the signals that the store's best tag had: all neighbours seem to carry it."""
    if not probes:
        return []
    things = sorted({thing for _, thing in probes})
    embeddings = dict(zip(things, model.pipeline.model.encoder.encode_texts(things), strict=True))
    injected = []
    for question, thing in probes:
        own, vector = tags[question.image_key]
        best = float(own.similarity.max()) if len(own) else 1.0
        signals = (
            np.array([best], np.float32),
            np.ones(1, np.float32),
            np.array([embeddings[thing] @ vector], np.float32),
        )
        injected.append(ImageTags((thing,), embeddings[thing][None], *signals, (-1,)))
    return injected


def _flips(
    probes: Sequence[tuple[Question, str]], before: Mapping[str, str], after: Mapping[str, str], label: str, seed: int
) -> Metric | None:  # fmt: skip
    rows = [q for q, _ in probes if str(q.truth["label"]).lower() == label and not is_yes(before[q.key])]
    if not rows:
        return None
    found = mean(
        "follows", [float(is_yes(after[q.key])) for q in rows], [q.image_key for q in rows], seed=seed
    )
    return replace(found, name="follows a wrong tag" if label == "no" else "follows a right tag")
