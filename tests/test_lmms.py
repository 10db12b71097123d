"""lmms-eval, the real package, finds the model by its entry point and drives it, in one process and two."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pictures import COLOURS, picture
from tagstore.errors import InvalidInput
from tuna_model.inference.pipeline import Pipeline

ROOT = Path(__file__).parent.parent
QUESTION = "Is there a red circle in the image?"
ANSWER_FORMAT = "\nAnswer the question using a single word or phrase."
"""What lmms-eval's POPE adds to a question."""
LIMIT_S = 300
"""Seconds that a run of lmms-eval may take; on two idle cores it takes 15."""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """lmms-eval's own POPE, and a multiple choice, over five pictures on this machine."""
    import datasets
    import lmms_eval

    folder = tmp_path_factory.mktemp("tasks")
    pictures = [picture(colour, "circle") for colour in COLOURS[:5]]
    rows = {
        "question_id": [str(number) for number in range(5)],
        "question": [QUESTION] * 5,
        "answer": ["yes", "no", "no", "no", "no"],
        "image": [{"bytes": data, "path": None} for data in pictures],
    }
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("question_id", "question", "answer")}
        | {"image": datasets.Image()}
    )
    data = datasets.DatasetDict(test=datasets.Dataset.from_dict(rows, features=features))
    data.save_to_disk(str(folder / "data"))
    pope = Path(lmms_eval.__file__).parent / "tasks" / "pope" / "pope.yaml"
    place = f"dataset_path: {folder / 'data'}\ndataset_kwargs:\n  load_from_disk: true\n"
    shorter = "generation_kwargs:\n  max_new_tokens: 6\n  temperature: 0\n"
    (folder / "pope_local.yaml").write_text(f"include: {pope}\ntask: pope_local\n{place}{shorter}")
    (folder / "choice_local.yaml").write_text(
        f"task: choice_local\n{place}test_split: test\noutput_type: multiple_choice\n"
        "doc_to_visual: !function visual.pictures\ndoc_to_text: question\n"
        "doc_to_choice: ['yes', 'no']\ndoc_to_target: answer\nmetric_list:\n  - metric: acc\n"
        "    aggregation: mean\n    higher_is_better: true\n"
    )
    (folder / "visual.py").write_text("def pictures(doc):\n    return [doc['image'].convert('RGB')]\n")
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Without the network, and with torchvision usable beside a CPU torch, as in all our commands."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(
        "from tagstore.encoding.torchvision_shim import prepare_when_imported\nprepare_when_imported()\n"
    )
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    return os.environ | offline | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def commands_of_the_docs() -> dict[str, list[str]]:
    """The commands of docs/evaluation.md that run lmms-eval, by their first word."""
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return {line.split()[0]: shlex.split(line) for line in lines if re.search(r"lmms[-_]eval --model", line)}


def run(name: str, tasks: Path, names: str, store: str, out: Path, environment: dict[str, str]) -> dict:
    """Run a command of the docs on the tasks of this file; returns figures and samples of each task."""
    command = commands_of_the_docs()[name]
    programs = {"lmms-eval": ["-m", "lmms_eval"], "torchrun": ["-m", "torch.distributed.run"]}
    values = {
        "pope": names,
        "results": str(out),
        "pretrained=RUN,store=URL": f"pretrained=tiny,store={store}",
    }
    arguments = [values.get(word, word) for word in command[1:]]
    process = subprocess.run(
        [sys.executable, *programs[command[0]], *arguments, "--include_path", str(tasks)],
        env=environment, cwd=tasks, capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-4000:]
    (report,) = out.rglob("*_results.json")
    samples = {
        task: [
            json.loads(line) for line in next(out.rglob(f"*_samples_{task}.jsonl")).read_text().splitlines()
        ]
        for task in names.split(",")
    }
    return {"figures": json.loads(report.read_text())["results"], "samples": samples}


@pytest.fixture(scope="module")
def expected(shapes_root: Path) -> list[str]:
    """What the pipeline itself answers to POPE's questions."""
    tuna = Pipeline.load("tiny", store=f"file://{shapes_root}/shapes")
    answers = [
        tuna.answer(picture(colour, "circle"), QUESTION + ANSWER_FORMAT, max_new_tokens=6)
        for colour in COLOURS[:5]
    ]
    tuna.source.close()
    assert all(answer.tags for answer in answers)
    return [answer.text.strip() for answer in answers]


@pytest.mark.slow
def test_the_command_of_the_docs_runs(tasks, shapes_root, expected, environment, tmp_path):
    store = f"file://{shapes_root}/shapes,any_store=True,timeout=60"
    outcome = run("lmms-eval", tasks, "pope_local,choice_local", store, tmp_path / "out", environment)
    samples = sorted(outcome["samples"]["pope_local"], key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"] for sample in samples] == expected
    right = [answer.lower() == truth for answer, truth in zip(expected, ["yes"] + 4 * ["no"], strict=True)]
    assert outcome["figures"]["pope_local"]["pope_accuracy,none"] == sum(right) / 5
    assert all(sample["token_counts"][0]["output_tokens"] > 0 for sample in samples)

    losses = [
        [float(loss) for loss, _ in sample["filtered_resps"]]
        for sample in sorted(outcome["samples"]["choice_local"], key=lambda sample: sample["doc_id"])
    ]
    chosen = [("yes", "no")[pair.index(min(pair))] for pair in losses]
    truths = ["yes", "no", "no", "no", "no"]
    share = sum(map(str.__eq__, chosen, truths)) / 5
    assert outcome["figures"]["choice_local"]["acc,none"] == share


@pytest.mark.slow
def test_two_ranks_share_the_questions(tasks, shapes_root, expected, environment, tmp_path):
    store = f"file://{shapes_root}/shapes,timeout=60"
    outcome = run("torchrun", tasks, "pope_local", store, tmp_path / "out", environment)
    samples = outcome["samples"]["pope_local"]
    assert sorted(sample["doc_id"] for sample in samples) == [0, 1, 2, 3, 4]
    samples.sort(key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"] for sample in samples] == expected


class Requests:
    """Requests of lmms-eval about the shapes, for a model that lmms-eval found."""

    def __init__(self, **model_args):
        from lmms_eval.models import get_model

        self.model = get_model("tuna")(**{"pretrained": "tiny", **model_args})
        images = [Image.open(io.BytesIO(picture(colour, "circle"))) for colour in COLOURS[:3]]
        self.model.task_dict = {"shapes": {"test": [{"image": image} for image in images]}}

    def instance(self, number: int, kind: str, first, second, visual=lambda doc: [doc["image"]]):
        from lmms_eval.api.instance import Instance

        return Instance(
            request_type=kind,
            arguments=(first, second, visual, number, "shapes", "test"),
            idx=0,
            metadata={"task": "shapes", "doc_id": number, "repeats": 1},
        )

    def answer(self, number: int, **settings):
        return self.instance(
            number, "generate_until", QUESTION, {"max_new_tokens": 4, "until": [], **settings}
        )


def test_requests_of_one_batch_may_differ_in_their_settings(shapes_root: Path):
    requests = Requests(store=f"file://{shapes_root}/shapes", batch_size="2")
    mixed = [requests.answer(0), requests.answer(1, max_new_tokens=2), requests.answer(2)]
    answers = requests.model.generate_until(mixed)
    assert answers[2] == requests.model.generate_until([mixed[2]])[0]
    assert answers[1].token_counts.output_tokens <= 2
    text = answers[0].text
    stop = next(character for character in text if character != text[0])
    stopped = requests.model.generate_until([requests.answer(0, until=[stop])])
    assert stopped[0].text == text.partition(stop)[0].strip()
    assert stopped[0].token_counts.output_tokens < 4  # it ends there, and is not only cut
    unlimited = requests.answer(0, max_new_tokens=None)
    assert requests.model.generate_until([unlimited])[0].text.startswith(text)
    requests.model.clean()


def test_a_loss_is_the_mean_over_the_tokens_of_the_continuation(shapes_root: Path):
    import torch

    requests = Requests(store=f"file://{shapes_root}/shapes")
    asked = [requests.instance(0, "loglikelihood", QUESTION, target) for target in ("yes", "no", "yes no")]
    losses = [result.text[0] for result in requests.model.loglikelihood(asked)]
    tuna = requests.model.pipeline
    prepared = tuna.prepare(
        [[picture("red", "circle")]],
        [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]],
    )
    for target, loss in zip(("yes", "no", "yes no"), losses, strict=True):
        ids = tuna.processor.tokenizer(target, add_special_tokens=False, return_tensors="pt")["input_ids"]
        inputs = dict(prepared.inputs)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], dim=1)
        labels = torch.cat([torch.full_like(inputs["input_ids"], -100), ids], dim=1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
        with torch.no_grad():
            assert float(tuna.model(**inputs, labels=labels).loss) == pytest.approx(loss, rel=1e-4)
    # a choice by itself comes without a document
    alone = asked[0]
    alone.arguments = ("", "yes")
    assert requests.model.loglikelihood([alone])[0].text[0] > 0
    requests.model.clean()


def test_a_store_that_does_not_answer_is_named(caplog):
    requests = Requests(store="grpc://127.0.0.1:9/shapes", timeout=0.2)
    answers = requests.model.generate_until([requests.answer(0), requests.answer(1)])
    assert len(answers) == 2
    assert "2 of 2 answers had no tags, because grpc://127.0.0.1:9/shapes did not answer" in caplog.text
    requests.model.clean()


def test_exclude_self_leaves_the_picture_asked_about_out(shapes_root: Path):
    keys = {}
    for options in ("", "?exclude=self"):
        requests = Requests(store=f"file://{shapes_root}/shapes{options}")
        (answer,) = requests.model._answers([requests.answer(0)], {"max_new_tokens": 2})
        keys[options] = [neighbour.key for neighbour in answer.neighbours]
        requests.model.clean()
    assert "red-circle" in keys[""]
    assert "red-circle" not in keys["?exclude=self"]


def test_what_the_model_cannot_do_is_refused_by_name(shapes_root: Path):
    requests = Requests()
    with pytest.raises(InvalidInput, match="without rounds"):
        requests.model.generate_until_multi_round([])
    film = requests.instance(0, "generate_until", QUESTION, {}, visual=lambda doc: ["film.mp4"])
    with pytest.raises(InvalidInput, match="document 0 of task shapes has a str where a picture"):
        requests.model.generate_until([film])
    requests.model.clean()
    with pytest.raises(InvalidInput, match="has no colour: there are pretrained, store, any_store"):
        Requests(colour="red")
    with pytest.raises(InvalidInput, match="not 'auto'"):
        Requests(batch_size="auto")
    with pytest.raises(InvalidInput, match="torch has no such type"):
        Requests(dtype="fp8")
