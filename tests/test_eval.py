"""Benchmarks: scores computed by hand, files in their own formats, interrupted runs, a judge over HTTP."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pictures import picture
from tagstore.cli import cli as tagstore
from tagstore.errors import InvalidInput, NotFound, Unavailable
from tuna_model.evaluation import Question, TaskAnswer, TaskOptions, evaluate, load_task
from tuna_model.evaluation.answerer import PipelineAnswerer
from tuna_model.evaluation.audit import audit
from tuna_model.evaluation.bootstrap import mean, metric
from tuna_model.evaluation.captions import caption_metrics, tokenise
from tuna_model.evaluation.chair import Synonyms, chair, present
from tuna_model.evaluation.chat_endpoint import ChatEndpoint
from tuna_model.evaluation.judge import OpenAIJudge, parse_marks
from tuna_model.evaluation.vqa import normalise, vqa_accuracy
from tuna_model.evaluation.yes_no import is_yes, mme, pope, says_neither
from tuna_model.inference.pipeline import Pipeline
from tuna_model.processing.tags import TagLookup


def values(metrics):
    return {metric.name: metric.value for metric in metrics}


# bootstrap


def test_an_interval_holds_the_value_and_is_the_same_every_time(rng):
    sample = rng.normal(size=200).tolist()
    first, second = (mean("m", sample, range(200), seed=3) for _ in range(2))
    assert first == second
    assert first.low < first.value < first.high
    # the normal approximation of a mean of 200
    assert (first.high - first.low) / (2 * 1.96) == pytest.approx(np.std(sample) / np.sqrt(200), rel=0.15)


def test_answers_about_one_image_are_drawn_together():
    scores = [1.0] * 50 + [0.0] * 50
    # two images: both draws may be the good one
    assert mean("m", scores, [i // 50 for i in range(100)]).high == 1.0
    assert mean("m", scores, range(100)).high < 0.65


def test_no_resamples_no_interval():
    length = metric("m", lambda rows: float(len(rows)), ["a", "b"], resamples=0)
    assert (length.low, length.value, length.high) == (2.0, 2.0, 2.0)


# yes or no


@pytest.mark.parametrize("answer", ["Yes", "yes. But no cat.", "A dog", "I know it is", ""])
def test_popes_script_takes_this_for_yes(answer):
    assert is_yes(answer) is True


@pytest.mark.parametrize("answer", ["No, there is not.", "There is not a dog", "Nope"])
def test_popes_script_takes_this_for_no(answer):
    assert is_yes(answer) is False


def test_an_answer_with_neither_word_is_noticed():
    assert says_neither("A dog")
    assert says_neither("")
    assert not says_neither("Yes, a dog")


def test_pope_by_hand():
    figures = values(pope(["yes", "yes", "no", "no", "yes"], [True, False, True, False, True], list("abcde")))
    ratios = {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3}
    assert figures == {"accuracy": 0.6, **ratios, "yes": 0.6, "neither": 0.0}


def test_mme_wants_both_answers_of_an_image():
    figures = values(mme(["yes", "no", "yes", "yes"], [True, False, True, False], ["a", "a", "b", "b"]))
    assert figures == {"accuracy": 0.75, "accuracy+": 0.5, "score": 125.0}


# captions

REFERENCES = [
    ["A dog runs on the grass.", "A brown dog is running.", "The dog runs over a lawn."],
    ["Two men sit on a bench.", "Men sitting on a bench in a park."],
    ["A red car on the street.", "A car is parked."],
]
ANSWERS = ["a dog runs on the lawn", "two men on a bench in a park", "a blue car on the street"]


def test_caption_metrics_are_pycocoevalcaps():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    figures = values(caption_metrics(ANSWERS, REFERENCES, range(3)))
    captions = dict(enumerate(tokenise([[a] for a in ANSWERS])))
    references = dict(enumerate(tokenise(REFERENCES)))
    bleu = Bleu(4).compute_score(references, captions, verbose=0)[0][3]
    assert figures["BLEU-4"] == pytest.approx(bleu, rel=1e-6)
    assert figures["CIDEr"] == pytest.approx(Cider().compute_score(references, captions)[0])
    assert 0 < figures["ROUGE-L"] <= 1


def test_a_short_caption_pays_bleus_brevity_penalty():
    from pycocoevalcap.bleu.bleu import Bleu

    captions, references = {0: ["a dog runs on"]}, {0: ["a dog runs on the grass"]}
    expected = Bleu(4).compute_score(references, captions, verbose=0)[0][3]
    figures = values(caption_metrics(captions[0], [references[0]], [0]))
    assert figures["BLEU-4"] == pytest.approx(expected, rel=1e-6)
    assert expected < 0.7


def test_plain_tokens():
    assert tokenise([["A man's dog, (brown) runs -- fast!"]]) == [["a man's dog brown runs fast"]]


@pytest.mark.skipif(
    shutil.which("java") is None, reason="METEOR and the Stanford tokeniser are Java programs"
)
@pytest.mark.slow
def test_meteor_and_the_stanford_tokeniser():
    figures = values(
        caption_metrics(ANSWERS, REFERENCES, range(3), tokeniser="ptb", meteor=True, resamples=10)
    )
    assert 0 < figures["METEOR"] < 1
    assert tokenise([["A man's dog."]], "ptb") == [["a man 's dog"]]


def test_without_java_meteor_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InvalidInput, match="no java"):
        caption_metrics(ANSWERS, REFERENCES, range(3), meteor=True)


# CHAIR

GROUPS = "person, man, woman, player|dog, puppy|chair, seat|toilet|hot dog|tie|train|bear, cub|wine glass"
SYNONYMS = Synonyms(GROUPS.split("|"))


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("Two men and a puppy", ["person", "dog"]),
        ("A hot dog and a dog", ["hot dog", "dog"]),
        ("A toilet with its seat up", ["toilet"]),
        ("He wears a bow tie on the train tracks", ["tie"]),
        ("A baby bear and wine glasses", ["bear", "wine glass"]),
        ("Nothing here", []),
    ],
)
def test_objects_of_a_caption(caption, objects):
    assert SYNONYMS.objects(caption) == objects


def test_chair_by_hand():
    truth = present(["person"], ["A man with his dogs"], SYNONYMS)
    assert truth == {"person", "dog"}
    figures = values(chair(["A man, a chair", "A woman"], [truth, {"person"}], ["a", "b"], SYNONYMS))
    shares = {"CHAIRi": pytest.approx(1 / 3), "CHAIRs": 0.5, "recall": pytest.approx(2 / 3)}
    assert figures == {**shares, "objects": 1.5}


# short answers


def test_vqa_by_hand():
    assert normalise("The two Dogs, sitting.") == "2 dogs sitting"
    assert normalise("3.5 metres at 4:30") == "3.5 metres at 4:30"
    assert vqa_accuracy("Two", ["2"]) == 1.0
    # two of ten said so: each of the two sees one other (1/3), each of the eight sees both (2/3)
    assert vqa_accuracy("red", ["red"] * 2 + ["blue"] * 8) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy("red", ["red"] * 10) == 1.0


# tasks and runs


class Parrot:
    """A model that gives one answer to every question and counts the questions."""

    def __init__(self, says: str) -> None:
        self.says, self.asked = says, 0

    def answer(self, questions: list[Question], *, max_new_tokens: int) -> list[TaskAnswer]:
        self.asked += len(questions)
        assert all(len(question.image.read()) > 0 for question in questions)
        return [TaskAnswer(self.says, ("a tag",)) for _ in questions]

    def describe(self):
        return {"model": f"parrot that says {self.says}"}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for colour in ("red", "blue"):
        (tmp_path / f"{colour}.png").write_bytes(picture(colour, "circle"))
    lines = {
        "pope.jsonl": [
            {"question_id": i, "image": f"{c}.png", "text": f"Is there a {o} in the image?", "label": a}
            for i, (c, o, a) in enumerate(
                [("red", "dog", "yes"), ("red", "cat", "no"), ("blue", "dog", "no")]
            )
        ],
        "repope.jsonl": [
            {"question_id": 0, "image": "red.png", "text": "Is there a dog in the image?", "label": "no"}
        ],
        "vqa.jsonl": [
            {"question_id": 7, "image": "red.png", "question": "What colour?", "answers": [{"answer": "red"}]}
        ],
        "captions.jsonl": [
            {"image": f"{c}.png", "captions": [f"a {c} dog", "one dog"], "objects": [{"category": "dog"}]}
            for c in ("red", "blue")
        ],
        "bench.jsonl": [{"question_id": 1, "image": "red.png", "category": "conv", "text": "What is it?"}],
        "references.jsonl": [{"question_id": 1, "text": "A red circle."}],
        "contexts.jsonl": [{"image": "red.png", "caption": "A red circle on white."}],
    }
    for name, records in lines.items():
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "synonyms.txt").write_text("dog, puppy\nperson, man\n")
    return tmp_path


def test_pope_from_its_file_and_repope_instead_of_its_labels(files: Path):
    task = load_task("pope", TaskOptions(files / "pope.jsonl"))
    assert task.questions[0].text == "Is there a dog in the image?\nAnswer with yes or no."
    assert evaluate(task, Parrot("no")).value("accuracy") == pytest.approx(2 / 3)
    corrected = load_task("pope", TaskOptions(files / "pope.jsonl", labels=files / "repope.jsonl"))
    assert len(corrected.questions) == 1
    assert evaluate(corrected, Parrot("no")).value("accuracy") == 1.0


def test_every_task_from_its_files(files: Path):
    synonyms = {"synonyms": files / "synonyms.txt"}
    for task, file, options, answer, figure, value in (
        ("vqa", "vqa.jsonl", {}, "Red.", "exact match", 1.0),
        ("mme", "pope.jsonl", {}, "no", "accuracy+", 0.5),
        ("captions", "captions.jsonl", {}, "one dog", "ROUGE-L", 1.0),
        ("chair", "captions.jsonl", synonyms, "A man.", "CHAIRi", 1.0),
    ):
        loaded = load_task(task, TaskOptions(files / file, **options))
        assert evaluate(loaded, Parrot(answer)).value(figure) == value, task


def test_results_are_written_with_what_they_depend_on_and_a_run_goes_on_where_it_was_cut_off(
    files: Path, tmp_path: Path
):
    task = load_task("pope", TaskOptions(files / "pope.jsonl", seed=5))
    parrot, out = Parrot("no"), tmp_path / "out"

    class PowerCut(Exception):
        pass

    def cut(answered: int) -> None:
        if answered:
            raise PowerCut

    with pytest.raises(PowerCut):
        evaluate(task, parrot, batch_size=2, out=out, progress=cut)
    lines = (out / "pope.answers.jsonl").read_text()
    (out / "pope.answers.jsonl").write_text(lines + '{"key": "2", "ans')  # a line half written
    evaluate(task, parrot, batch_size=2, out=out)
    assert parrot.asked == 3
    written = json.loads((out / "pope.json").read_text())
    assert written["settings"]["seed"] == 5
    assert written["model"] == {"model": "parrot that says no"}
    assert "| accuracy | 0.6667 |" in (out / "pope.md").read_text()
    other = Parrot("yes")
    evaluate(task, other, out=out)
    assert other.asked == 3  # answers of another model are not taken


def test_errors_say_which_line(files: Path):
    with pytest.raises(InvalidInput, match="there is no task 'popes'"):
        load_task("popes", TaskOptions(files / "pope.jsonl"))
    with pytest.raises(NotFound, match=r"nothing\.jsonl"):
        load_task("pope", TaskOptions(files / "nothing.jsonl"))
    with pytest.raises(InvalidInput, match="line 1: a question has 'image' and 'text'"):
        load_task("vqa", TaskOptions(files / "references.jsonl"))
    with pytest.raises(InvalidInput, match="question 1: its label is '', not yes or no"):
        load_task("pope", TaskOptions(files / "bench.jsonl"))
    with pytest.raises(InvalidInput, match="synonym list"):
        load_task("chair", TaskOptions(files / "captions.jsonl"))


# the leak guard


@pytest.fixture(scope="module")
def own_images(tmp_path_factory) -> Path:
    """Questions about pictures that are in the store of shapes: bytes, other bytes, other names."""
    folder = tmp_path_factory.mktemp("own")
    lines = []
    for name, data in (
        ("red-circle", picture("red", "circle")),  # the store's file under its name
        ("copy", picture("blue", "square")),
        ("green-triangle", picture("green", "triangle", size=97)),  # a copy that was scaled
    ):
        (folder / f"{name}.png").write_bytes(data)
        lines.append({"question_id": name, "image": f"{name}.png", "text": "Red?", "label": "yes"})
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "q.jsonl"


class Listener(TagLookup):
    """A lookup that keeps the keys of the neighbours."""

    def detailed(self, *args, **options):
        answers = super().detailed(*args, **options)
        self.keys = [[neighbour.key for neighbour in answer.neighbours] for _, answer in answers]
        return answers


@pytest.mark.parametrize("guarded", [True, False])
def test_a_store_with_exclude_self_does_not_show_the_test_image(
    guarded: bool, own_images: Path, shapes_root: Path, server_address: str
):
    own = {"red-circle", "blue-square", "green-triangle"}
    task = load_task("pope", TaskOptions(own_images))
    for place in (f"file://{shapes_root}", f"grpc://{server_address}"):
        tuna = Pipeline.load("tiny", store=f"{place}/shapes" + ("?exclude=self" if guarded else ""))
        tuna.lookup = Listener(tuna.source, k=3)
        with tuna.source:
            evaluate(task, PipelineAnswerer(tuna))
            evaluated = tuna.lookup.keys
            audit(task, PipelineAnswerer(tuna), tuna.source)
        for keys in (evaluated, tuna.lookup.keys):
            assert [len(some) for some in keys] == [3, 3, 3]
            leaks = [bool(own & {some[0]}) for some in keys]
            assert leaks == [not guarded] * 3
        assert evaluated == tuna.lookup.keys


def test_keys_of_questions_are_those_of_a_store_of_the_same_images(own_images: Path):
    def keys(name: str, **options) -> list[str]:
        task = load_task(name, TaskOptions(own_images.parent / "keys.jsonl", **options))
        return [question.picture()[1].key for question in task.questions]

    line = {"image": "copy.png", "text": "Red?", "label": "yes"}
    lines = [line, {**line, "key": "shop/7"}, {**line, "id": 8}]
    (own_images.parent / "keys.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert keys("pope") == ["copy", "shop/7", "8"]
    lines = [{"image": "copy.png", "captions": ["a red square"]}]
    (own_images.parent / "keys.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert keys("captions") == ["copy"]


def test_a_recorded_map_of_the_questions_gives_the_stores_tags(
    own_images: Path, shapes_root: Path, tmp_path: Path
):
    url = f"file://{shapes_root}/shapes@1?k=5&exclude=self"
    command = ["record", url, str(own_images), "--images", str(own_images.parent), "--out"]
    result = CliRunner().invoke(tagstore, [*command, str(tmp_path / "map")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    task = load_task("pope", TaskOptions(own_images))
    given = []
    for store in (url, f"replay://{tmp_path / 'map'}"):
        tuna = Pipeline.load("tiny", store=store)
        with tuna.source:
            given.append(PipelineAnswerer(tuna).answer(task.questions, max_new_tokens=2))
    assert given[0] == given[1]
    assert all(answer.tags for answer in given[0])


# the judge


def test_images_outside_of_the_folder_are_read_where_that_is_allowed(files: Path):
    for name, line in (
        ("vqa", {"image": "../outside.png", "question": "colour?", "answers": ["red"]}),
        ("captions", {"image": "../outside.png", "captions": ["a red square"]}),
    ):
        (files.parent / "outside.png").write_bytes(picture("red", "square"))
        data = files / f"outside-{name}.jsonl"
        data.write_text(json.dumps(line) + "\n")
        with pytest.raises(InvalidInput, match="--allow-outside"):
            load_task(name, TaskOptions(data))
        [question] = load_task(name, TaskOptions(data, allow_outside=True)).questions
        assert question.image.read() == picture("red", "square")


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[dict], list[str]]]:
    """A real HTTP server that speaks chat completions: (url, requests it got, texts it will say)."""
    requests, says = list[dict](), list[str]()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(request | {"key": self.headers["Authorization"]})
            answer = {"choices": [{"message": {"content": says.pop(0)}}]} if says else {"oops": 1}
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1", requests, says
        server.shutdown()


def test_llava_bench_with_and_without_a_judge(files: Path, endpoint, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    url, requests, says = endpoint
    options = TaskOptions(
        files / "bench.jsonl", references=files / "references.jsonl", contexts=files / "contexts.jsonl"
    )
    assert evaluate(load_task("llava-bench", options), Parrot("A circle.")).metrics == ()
    says += ["8 4\nbecause", "6 8\nthe other way round"]
    judged = load_task(
        "llava-bench", replace(options, judge=OpenAIJudge(ChatEndpoint(url, "some-model", key="secret")))
    )
    assert evaluate(judged, Parrot("A circle.")).value("relative score") == pytest.approx(100 * 5 / 8)
    assert requests[0]["key"] == "Bearer secret"
    assert "A red circle on white." in requests[0]["messages"][0]["content"]
    with pytest.raises(Unavailable, match="no chat completion"):
        evaluate(judged, Parrot("A circle."))


def test_a_judge_that_gives_no_marks():
    assert parse_marks("Scores:\n7, 9.5\nBecause") == (7.0, 9.5)
    with pytest.raises(InvalidInput, match="no two marks"):
        parse_marks("Both are fine.")
