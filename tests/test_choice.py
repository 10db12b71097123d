"""`choice` reads the files of MMBench, ScienceQA and SEED-Bench, and which option an answer means."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from pictures import picture
from tagstore.errors import InvalidInput, NotFound
from tuna_model.cli import cli
from tuna_model.cli.eval import TASK_NAMES
from tuna_model.evaluation import TASKS, Question, TaskAnswer, TaskOptions, evaluate, load_task
from tuna_model.evaluation.choice import read_choice

COLOURS = ["red", "dark red", "blue", "A dog"]


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        ("B", 1),
        (" c ", 2),
        ("(b)", 1),
        ("B. dark red", 1),
        ("C) because it is red", 2),
        ("C: it is red", 2),
        ("The answer is B.", 1),
        ("I think the correct option: (c)", 2),
        ("A dog", 3),  # an article is no letter
        ("It is a dog", 3),
        ("It is DARK-RED!", 1),  # and not red
        ("Red", 0),
        ("Z", None),
        ("blue or red", None),
        ("Z. blue", 2),
        ("reddish", None),
        ("I do not know", None),
        ("", None),
    ],
)
def test_which_option_an_answer_means(answer: str, option: int | None):
    assert read_choice(answer, COLOURS) == option


def test_numbers_and_signs_as_options():
    assert read_choice("It is 2", ["1", "2", "12"]) == 1
    assert read_choice("<", ["<", ">"]) is None
    assert read_choice("B", ["<", ">"]) == 1


class Parrot:
    """Gives one answer to every question."""

    def __init__(self, says: str) -> None:
        self.says = says

    def answer(self, questions: list[Question], *, max_new_tokens: int) -> list[TaskAnswer]:
        assert all(question.image.read().startswith(b"\x89PNG") for question in questions)
        return [TaskAnswer(self.says)] * len(questions)

    def describe(self):
        return {}


def write_mmbench(path: Path) -> Path:
    red, blue = (base64.b64encode(picture(c, "circle")).decode() for c in ("red", "blue"))
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "split"]
    rows = [
        [241, "Which colour?", 'Two\nlines, and a "quote"', "blue", "red", "", "", "B", "colour", red, "dev"],
        [242, "Which shape?", "", "circle", "square", "line", "dot", "A", "shape", blue, "dev"],
        [1000241, "Which colour?", "", "red", "blue", "", "", "A", "colour", "241", "dev"],
    ]
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([columns, *rows])
    return path


def test_mmbench(tmp_path: Path):
    task = load_task("choice", TaskOptions(write_mmbench(tmp_path / "dev.tsv")))
    first, _, again = task.questions
    assert first.text == (
        'Two\nlines, and a "quote"\nWhich colour?\nA. blue\nB. red\n'
        "Answer with the option's letter from the given choices directly."
    )
    assert first.image.read() == picture("red", "circle")
    assert (again.key, again.image_key, again.image) == ("1000241", first.image_key, first.image)
    result = evaluate(task, Parrot("A"))
    assert result.value("accuracy") == pytest.approx(2 / 3)
    assert (result.value("colour: accuracy"), result.value("shape: accuracy")) == (0.5, 1.0)
    assert evaluate(task, Parrot("red")).value("accuracy") == pytest.approx(2 / 3)
    assert evaluate(task, Parrot("red")).value("unread") == pytest.approx(1 / 3)
    assert len(load_task("choice", TaskOptions(tmp_path / "dev.tsv", limit=2)).questions) == 2


def test_scienceqa(tmp_path: Path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "1.png").write_bytes(picture("red", "circle"))
    shared = {"question": "Which colour?", "hint": "", "split": "test"}
    lines = [
        {**shared, "image": "test/1.png", "choices": ["blue", "red"], "answer": 1, "subject": "art"},
        {**shared, "image": None, "choices": ["yes", "no"], "answer": 0, "subject": "language"},
        {**shared, "image": "test/1.png", "choices": ["a", "b", "red"], "answer": 0, "split": "val"},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = load_task("choice", TaskOptions(tmp_path / "q.jsonl", split="test"))
    [question] = task.questions  # a question without an image is left out
    assert question.picture()[1].key == "test/1"
    result = evaluate(task, Parrot("It is red."))
    assert {m.name: m.value for m in result.metrics} == {"accuracy": 1, "unread": 0, "art: accuracy": 1}


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_seed_bench(suffix: str, tmp_path: Path):
    (tmp_path / "1454426_259").write_bytes(picture("red", "circle"))  # its files have no extension
    question = {
        "question": "Which colour?", "question_id": "101669", "question_type_id": 1, "data_type": "image",
        "data_id": "1454426_259", "choice_a": "blue", "choice_b": "green", "choice_c": "none",
        "choice_d": "red", "answer": "D",
    }  # fmt: skip
    video = {**question, "question_id": "7", "data_type": "video", "data_id": "x.webm"}
    path = tmp_path / f"SEED-Bench.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps({"questions": [question, video], "question_type": {"Scene": 1}}))
    else:
        path.write_text(json.dumps(question) + "\n" + json.dumps(video) + "\n")
    task = load_task("choice", TaskOptions(path))
    assert [q.key for q in task.questions] == ["101669"]
    result = evaluate(task, Parrot("(D) red"))
    assert result.value("accuracy") == 1.0
    assert ("Scene: accuracy" in {metric.name for metric in result.metrics}) == (suffix == "json")


def test_what_is_no_question_is_refused_with_its_place(tmp_path: Path):
    path = write_mmbench(tmp_path / "dev.tsv")
    tsv = path.read_text()
    (tmp_path / "a.png").write_bytes(picture("red", "circle"))
    good = {"image": "a.png", "question": "?", "choices": ["x", "y"], "answer": 1, "id": 1}
    for content, name, message in (
        (tsv.replace("\tB\t", "\t\t"), "test.tsv", "line 3: a question has 'question'"),  # a test split
        (tsv.replace("\tB\t", "\tC\t"), "c.tsv", "line 3: a question has 'question'"),
        (tsv + '"open', "open.tsv", "unexpected end of data"),
        ("[1]", "x.json", "as SEED-Bench has it"),
        ("{", "y.json", "as SEED-Bench has it"),
        (json.dumps({**good, "answer": 2}), "range.jsonl", "line 1: a question has 'question'"),
        (json.dumps({**good, "answer": True}), "bool.jsonl", "line 1: a question has 'question'"),
        (json.dumps({**good, "choices": "xy"}), "text.jsonl", "line 1: a question has 'question'"),
        (json.dumps({**good, "image": "../a.png"}), "out.jsonl", "leads out of the folder"),
        (json.dumps(good) + "\n" + json.dumps(good), "twice.jsonl", "the question 1 is there twice"),
        (json.dumps({**good, "image": ""}), "none.jsonl", "has no question with an image"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(InvalidInput, match=message):
            load_task("choice", TaskOptions(tmp_path / name))
    with pytest.raises(NotFound, match=r"nothing\.tsv"):
        load_task("choice", TaskOptions(tmp_path / "nothing.tsv"))
    (tmp_path / "latin.tsv").write_bytes(tsv.replace("shape?", "gr\xf6\xdfe?").encode("latin1"))
    with pytest.raises(InvalidInput, match="not UTF-8"):
        load_task("choice", TaskOptions(tmp_path / "latin.tsv"))


def test_tuna_eval_choice(tmp_path: Path, shapes_root: Path):
    path = write_mmbench(tmp_path / "dev.tsv")
    words = ["eval", "choice", "--model", "tiny", "--data", str(path), "--max-tokens", "3", "--json"]
    words += ["--store", f"file://{shapes_root}/shapes?exclude=self", "--resamples", "10"]
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert {"accuracy", "unread"} <= {metric["name"] for metric in json.loads(result.stdout)["metrics"]}


def test_the_command_knows_every_task():
    assert set(TASK_NAMES) == set(TASKS)
