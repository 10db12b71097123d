"""`edits` compares answers before and after an edit of the store, by BEAF's four measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from pictures import picture
from tagstore.errors import InvalidInput, NotFound
from tagstore.readers.samples import Place
from tuna_model.cli import cli
from tuna_model.evaluation import Question, TaskAnswer, TaskOptions, evaluate, load_task
from tuna_model.evaluation.edits import check_truths, edits, is_right


def question(before: object, after: object, key: str = "0") -> Question:
    return Question(key, Place(Path("x.png")), key, "?", {"before": before, "after": after})


@pytest.mark.parametrize(
    ("before", "after", "answer", "right"),
    [
        ("yes", "no", "Yes, it is", (True, False)),
        ("No", "no", "No.", (True, True)),
        ("Gala", "Pink Lady", "a pink-lady", (False, True)),
        ("Gala", None, "A gala apple", (True, False)),
        ("Gala", None, "An apple", (False, True)),  # the name is no longer known
        (None, "Gala", "An apple", (True, False)),
    ],
)
def test_an_answer_is_right_with_a_store(before, after, answer: str, right: tuple[bool, bool]):
    asked = question(before, after)
    check_truths(asked)
    assert (is_right(answer, asked, "before"), is_right(answer, asked, "after")) == right


@pytest.mark.parametrize(
    ("before", "after"),
    [("yes", None), ("yes", "gala"), (None, None), ("gala", 3), ("gala", ""), ("gala", "?")],
)
def test_truths_that_mean_nothing_are_refused(before, after):
    with pytest.raises(InvalidInput, match="question 0: "):
        check_truths(question(before, after))
    with pytest.raises(InvalidInput, match="'before' and 'after' are the right answers"):
        check_truths(Question("0", Place(Path("x.png")), "0", "?", {"after": "gala"}))


def test_the_four_measures_by_hand():
    changing = [question("yes", "no", f"c{i}") for i in range(5)]
    staying = [question("yes", "yes", f"s{i}") for i in range(4)]
    before = ["yes", "yes", "no", "no", "yes", "yes", "yes", "no", "no"]
    after = ["no", "yes", "no", "yes", "no", "yes", "no", "yes", "no"]
    images = [asked.key for asked in changing + staying]
    metrics = edits(before, after, changing + staying, images, resamples=50)
    figures = {metric.name: metric.value for metric in metrics}
    assert figures == {
        "true understanding": 0.4, "ignorance": 0.2, "stubbornness": 0.4, "indecision": 0.5,
        "f1": pytest.approx(2 * 0.4 * 0.5 / 0.9),
    }  # fmt: skip
    counts = {metric.name: metric.count for metric in metrics}
    assert (counts["true understanding"], counts["indecision"]) == (5, 4)
    assert all(metric.low <= metric.value <= metric.high for metric in metrics)
    only_staying = edits(before[5:], after[5:], staying, images[5:])
    assert [metric.name for metric in only_staying] == ["indecision"]


def test_an_interval_leaves_out_resamples_without_one_kind_of_question():
    asked = [question("yes", "no", "a"), question("yes", "yes", "b")]  # a resample may be one image twice
    [f1] = [m for m in edits(["yes", "yes"], ["no", "yes"], asked, ["a", "b"]) if m.name == "f1"]
    assert (f1.low, f1.value, f1.high) == (1.0, 1.0, 1.0)


class Parrot:
    def __init__(self, says: str) -> None:
        self.says = says

    def answer(self, questions: list[Question], *, max_new_tokens: int) -> list[TaskAnswer]:
        return [TaskAnswer(self.says) for _ in questions]

    def describe(self):
        return {"says": self.says}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "red.png").write_bytes(picture("red", "circle", size=90))
    lines = [
        {"question_id": "swapped", "before": "circle", "after": "gala"},
        {"question_id": "kept", "before": "red", "after": "red"},
    ]
    shared = {"image": "red.png", "text": "What is it?"}
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(shared | line) + "\n" for line in lines))
    return tmp_path / "edits.jsonl"


def test_answers_before_come_from_a_run_with_the_store_as_it_was(data: Path, tmp_path: Path):
    options = {"before": tmp_path / "before", "resamples": 10}
    with pytest.raises(NotFound, match="run tuna eval edits with the store before its edit"):
        load_task("edits", TaskOptions(data, **options))
    first = load_task("edits", TaskOptions(data))
    # a line separator in an answer is no end of a line of the file
    says = "a red\u2028circle"
    assert evaluate(first, Parrot(says), out=tmp_path / "before").metrics == ()
    result = evaluate(load_task("edits", TaskOptions(data, **options)), Parrot("red gala"))
    assert {m.name: m.value for m in result.metrics} == {
        "true understanding": 1, "ignorance": 0, "stubbornness": 0, "indecision": 0, "f1": 1
    }  # fmt: skip
    assert result.settings["before"] == str(tmp_path / "before")
    again = evaluate(load_task("edits", TaskOptions(data, **options)), Parrot("a circle"))
    assert again.value("stubbornness") == 1.0
    assert again.value("indecision") == 1.0
    data.write_text(data.read_text().replace("kept", "new"))
    with pytest.raises(InvalidInput, match="no answer to question new"):
        load_task("edits", TaskOptions(data, **options))


def test_tuna_eval_edits_asks_two_stores(data: Path, tmp_path: Path, shapes_root: Path):
    def run(store: str, *words: str):
        command = ["eval", "edits", "--model", "tiny", "--data", str(data), "--store", store, "--json"]
        command += ["--max-tokens", "3", "--resamples", "10", *words]
        return CliRunner().invoke(cli, command)

    before, after = str(tmp_path / "before"), str(tmp_path / "after")
    assert run(f"file://{shapes_root}/shapes", "--out", before).exit_code == 0
    result = run("null://", "--before", before, "--out", after)
    figures = {metric["name"] for metric in json.loads(result.stdout)["metrics"]}
    assert figures == {"true understanding", "ignorance", "stubbornness", "indecision", "f1"}
    assert "would replace the answers" in run("null://", "--before", before, "--out", before).output
