"""The audit measures how answers depend on tags: with a stand-in that believes every tag, and for real."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pictures import COLOURS, picture
from tagstore.client import connect
from tagstore.errors import InvalidInput
from tuna_model.evaluation import TaskAnswer, TaskOptions, evaluate, load_task
from tuna_model.evaluation.answerer import PipelineAnswerer
from tuna_model.evaluation.audit import CONDITIONS, audit, plot
from tuna_model.inference.pipeline import Pipeline


class Believer(PipelineAnswerer):
    """Says yes if a tag names the object of the question, else no; it ignores the picture."""

    def answer(self, questions, *, max_new_tokens, tags=None):
        assert tags is not None
        answers = []
        for question, texts in zip(questions, (image_tags.texts for image_tags in tags), strict=True):
            named = any(question.truth["object"] in text for text in texts)
            answers.append(TaskAnswer("yes" if named else "no", texts))
        return answers


class Sceptic(PipelineAnswerer):
    """Says no to every question."""

    def answer(self, questions, *, max_new_tokens, tags=None):
        return [TaskAnswer("no") for _ in questions]


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Twelve questions about six pictures: is the colour there that is, and one that is not?"""
    folder = tmp_path_factory.mktemp("questions")
    lines = []
    for i, colour in enumerate(COLOURS):
        (folder / f"{colour}.png").write_bytes(picture(colour, "circle", size=90))
        for thing, label in ((colour, "yes"), (COLOURS[(i + 1) % 6], "no")):
            question = {"question_id": len(lines), "text": f"Is there a {thing} in the image?"}
            answer = {"image": f"{colour}.png", "label": label, "object": thing}
            lines.append(json.dumps(question | answer) + "\n")
    (folder / "q.jsonl").write_text("".join(lines))
    return folder / "q.jsonl"


@pytest.fixture(scope="module")
def tuna(shapes_root: Path):
    pipeline = Pipeline.load("tiny", store=f"file://{shapes_root}/shapes")
    yield pipeline
    pipeline.source.close()


def test_a_believer_is_found_out(questions: Path, tuna: Pipeline, tmp_path: Path):
    task = load_task("pope", TaskOptions(questions, resamples=50))
    believer = Believer(tuna, name="believer", store="file://x")
    report = audit(task, believer, tuna.source, rate=0.5, batch_size=5)
    assert tuple(report.scores) == CONDITIONS
    assert report.metric == "accuracy"
    assert report.scores["none"].value == 0.5  # no tags, so it says no
    assert (report.follows.value, report.follows.count) == (1.0, 6)
    assert (report.follows_truth.value, report.follows_truth.count) == (1.0, 6)
    plot(report, tmp_path / "trust.svg")
    svg = (tmp_path / "trust.svg").read_text()
    assert svg.startswith("<?xml")
    assert "100.0 % (100.0 to 100.0) became yes with one wrong tag" in report.markdown()
    assert json.loads(json.dumps(report.to_dict()))["settings"]["corrupted rate"] == 0.5


def test_a_sceptic_scores_the_same_everywhere(questions: Path, tuna: Pipeline):
    report = audit(load_task("pope", TaskOptions(questions, resamples=0)), Sceptic(tuna), tuna.source)
    assert {m.value for m in report.scores.values()} == {0.5}
    assert report.follows.value == 0.0


def test_a_model_is_audited_and_evaluated(questions: Path, tuna: Pipeline):
    task = load_task("pope", TaskOptions(questions, limit=4, resamples=0))
    seen: list[tuple[int, int]] = []
    answerer = PipelineAnswerer(tuna, name="tiny", store=tuna.source.url)
    report = audit(task, answerer, tuna.source, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (24, 24)
    assert all(0 <= m.value <= 1 for m in report.scores.values())
    result = evaluate(task, answerer)
    assert result.model["store version"] == "shapes@1"
    assert result.value("accuracy") == report.scores["matched"].value  # the same tags, the same answers
    assert result.degraded == 0


def test_a_store_without_tags_cannot_be_audited(questions: Path, tuna: Pipeline):
    bare = Pipeline(tuna.model, tuna.processor, connect("null://"))
    with pytest.raises(InvalidInput, match="gives no tags"):
        audit(load_task("pope", TaskOptions(questions, limit=2)), PipelineAnswerer(bare), bare.source)


def test_conditions_are_drawn_the_same_way_every_time(questions: Path, tuna: Pipeline):
    class Recorder(Sceptic):
        said: list[tuple[str, ...]]

        def answer(self, questions, *, max_new_tokens, tags=None):
            self.said += [some.texts for some in tags]
            return super().answer(questions, max_new_tokens=max_new_tokens, tags=tags)

    runs = []
    for _ in range(2):
        recorder = Recorder(tuna)
        recorder.said = []
        audit(load_task("pope", TaskOptions(questions, resamples=0)), recorder, tuna.source, seed=3)
        runs.append(recorder.said)
    assert runs[0] == runs[1]
    matched, corrupted, irrelevant, random, none = np.array_split(np.array(runs[0], object)[:60], 5)
    assert all(len(some) == 0 for some in none)
    assert [len(some) for some in random] == [len(some) for some in matched]
    assert any(a != b for a, b in zip(matched, corrupted, strict=True))
    assert any(a != b for a, b in zip(matched, irrelevant, strict=True))
