"""`naming` counts answers that hold the right name, and says whether the tags that were given held it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from pictures import COLOURS, picture
from tagstore.errors import InvalidInput
from tuna_model.cli import cli
from tuna_model.evaluation import Question, TaskAnswer, TaskOptions, evaluate, load_task
from tuna_model.evaluation.answerer import PipelineAnswerer
from tuna_model.evaluation.audit import audit
from tuna_model.evaluation.naming import fold, holds, naming
from tuna_model.inference.pipeline import Pipeline


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        ("This is a Royal-Gala.", "royal gala"),
        ("A bottle of Coca-Cola!", "Coca Cola"),
        ("Pink\nLady", "pink  lady"),
        ("Ｇｏｌｄｅｎ, it is", "Golden"),
        ("Straße", "STRASSE"),
    ],
)
def test_case_and_punctuation_do_not_count(answer: str, name: str):
    assert holds(answer, name)


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        ("A pineapple.", "apple"),
        ("Gala, royal", "royal gala"),
        ("royal red gala", "royal gala"),
        ("", "gala"),
        ("...", "!?"),
        ("some apples", "apple"),
    ],
)
def test_a_name_is_whole_words_in_their_order(answer: str, name: str):
    assert not holds(answer, name)


def test_words_of_a_name():
    assert fold("  Granny_Smith (organic) 2% ") == "granny smith organic 2"


ANSWERS = [
    TaskAnswer("A Pink Lady apple.", ("apple", "Pink-Lady")),
    TaskAnswer("An apple.", ("pink lady", "apple")),
    TaskAnswer("A mango", ("pink lady apple", "mangos")),  # its tags hold more than the name, or less
    TaskAnswer("A lemon", ()),
]
NAMES = ["pink lady", "Pink Lady", "mango", "lime"]


def test_naming_by_hand():
    metrics = naming(ANSWERS, NAMES, ["a", "b", "c", "d"], splits=["x", "x", "y", ""])
    figures = {metric.name: (metric.value, metric.count) for metric in metrics}
    assert figures == {
        "named": (0.5, 4),
        "named if among tags": (0.5, 2),
        "name among tags": (0.5, 4),
        "top tag is the name": (0.25, 4),
        "x: named": (0.5, 2),
        "x: named if among tags": (0.5, 2),
        "x: name among tags": (1.0, 2),
        "x: top tag is the name": (0.5, 2),
        "y: named": (1.0, 1),
        "y: name among tags": (0.0, 1),
        "y: top tag is the name": (0.0, 1),
    }
    assert all(metric.low <= metric.value <= metric.high for metric in metrics)


def test_paraphrases_of_one_question_are_drawn_together():
    answers = [TaskAnswer("lime")] * 3 + [TaskAnswer("lemon")] * 3
    by_image = naming(answers, ["lime"] * 6, list("aaabbb"), resamples=200)[0]
    by_question = naming(answers, ["lime"] * 6, list("abcdef"), resamples=200)[0]
    assert by_image.high - by_image.low > by_question.high - by_question.low


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two questions about each of six pictures, whose colours are their names."""
    lines = []
    for i, colour in enumerate(COLOURS):
        (tmp_path / f"{colour}.png").write_bytes(picture(colour, "circle", size=90))
        for text in ("What is this?", "Name it."):
            question = {"question_id": len(lines), "image": f"{colour}.png", "text": text}
            lines.append(question | {"name": f"{colour} circle", "split": "even" if i % 2 else "odd"})
    (tmp_path / "names.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "names.jsonl"


class Reader:
    """Answers with the last of its tags."""

    def answer(self, questions: list[Question], *, max_new_tokens: int, tags=None) -> list[TaskAnswer]:
        texts = [t.texts for t in tags] if tags is not None else [("a cat", "red circle")] * len(questions)
        return [TaskAnswer(f"It is a {given[-1] if given else 'cat'}.", given) for given in texts]

    def describe(self):
        return {}


def test_a_question_has_its_own_text_and_a_split(data: Path):
    task = load_task("naming", TaskOptions(data))
    assert [question.text for question in task.questions[:2]] == ["What is this?", "Name it."]
    result = evaluate(task, Reader())
    assert result.value("named") == pytest.approx(2 / 12)
    assert result.value("named if among tags") == 1.0
    assert result.value("top tag is the name") == 0.0
    assert result.value("odd: named") == pytest.approx(2 / 6)
    only_even = load_task("naming", TaskOptions(data, split="even"))
    assert {question.image_key for question in only_even.questions} == {f"{c}.png" for c in COLOURS[1::2]}
    assert "even: named" in {metric.name for metric in evaluate(only_even, Reader()).metrics}
    with pytest.raises(InvalidInput, match="no question of split 'odder'"):
        load_task("naming", TaskOptions(data, split="odder"))


def test_the_tags_of_an_interrupted_run_are_scored_too(data: Path, tmp_path: Path):
    task = load_task("naming", TaskOptions(data, resamples=10))
    first = evaluate(task, Reader(), out=tmp_path / "out")
    again = evaluate(task, Reader(), out=tmp_path / "out")
    assert again.metrics == first.metrics
    assert len((tmp_path / "out" / "naming.answers.jsonl").read_text().splitlines()) == 13


def test_lines_that_are_no_question_about_a_name_are_refused(data: Path):
    line = json.loads(data.read_text().splitlines()[0])
    for change, message in (
        ({"name": "?!"}, "question 0: 'name' is the right name"),
        ({"name": 3}, "question 0: 'name' is the right name"),
    ):
        data.write_text(json.dumps(line | change) + "\n")
        with pytest.raises(InvalidInput, match=message):
            load_task("naming", TaskOptions(data))
    data.write_text(json.dumps(line) + "\n" + json.dumps(line | {"text": "Name it."}) + "\n")
    with pytest.raises(InvalidInput, match="line 2: the question_id 0 is there twice"):
        load_task("naming", TaskOptions(data))


def test_names_are_audited_with_the_tags_of_each_condition(data: Path, shapes_root: Path):
    pipeline = Pipeline.load("tiny", store=f"file://{shapes_root}/shapes?k=1")

    class First(PipelineAnswerer):
        def answer(self, questions, *, max_new_tokens, tags=None):
            return [TaskAnswer(" and ".join(given.texts), given.texts) for given in tags]

    with pipeline.source:
        task = load_task("naming", TaskOptions(data, resamples=10))
        report = audit(task, First(pipeline), pipeline.source)
    assert report.metric == "named"
    assert report.scores["matched"].value == 1.0
    assert report.scores["none"].value == 0.0


def test_tuna_eval_naming(data: Path, shapes_root: Path):
    words = ["eval", "naming", "--model", "tiny", "--store", f"file://{shapes_root}/shapes", "--json"]
    words += ["--data", str(data), "--limit", "4", "--max-tokens", "3", "--resamples", "10"]
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    report = json.loads(result.stdout)
    figures = {metric["name"]: metric["value"] for metric in report["metrics"]}
    assert figures["name among tags"] == 1.0
    assert report["settings"]["max_new_tokens"] == 3
