"""Every field of a recipe makes a difference: to what a run learns, or to what it writes."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from threading import Semaphore
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from pictures import write_shapes
from tagstore.errors import InvalidInput
from tagstore.readers.samples import read_samples
from tuna_model.training import checkpoint
from tuna_model.training.loader import Loader
from tuna_model.training.recipe import Recipe
from tuna_model.training.train import train

CAPTIONS = {"tags.content": "captions"}
LORA = {"lora.rank": 2, "rates.language_model": 1e-2}
CHANGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"seed": 1}),
    ({}, {"steps": 4}),
    ({}, {"batch_size": 2}),
    ({}, {"rates.connector": 1e-2}),
    ({}, {"warmup": 2}),
    ({}, {"floor": 0.5}),
    ({}, {"weight_decay": 0.5}),
    ({}, {"betas": [0.5, 0.9]}),
    ({}, {"clip": 1e-3}),
    ({}, {"ema": 0.5}),
    ({}, {"precision": "bf16"}),
    ({}, {"model_config.connector_act": "relu"}),
    ({}, {"data.path": "other.json"}),
    ({"data.features": ""}, {"data.images": "other"}),
    ({}, {"data.split": "train", "data.features": ""}),
    ({}, {"data.limit": 6, "data.features": ""}),
    ({}, {"data.prompt": "What?"}),
    ({}, {"data.first_caption": True}),
    ({}, {"data.template": "plain"}),
    ({"tags.store": "null://"}, {"data.max_length": 100}),
    ({}, {"data.group": 0}),
    ({}, {"tags.store": "null://"}),
    ({}, CAPTIONS),
    (CAPTIONS, {"tags.captions": "other.json"}),
    ({}, {"tags.leak_guard": False}),
    ({}, {"tags.leak_bits": 64}),
    ({}, {"tags.noise.drop": 0.5}),
    ({}, {"tags.noise.wrong": 0.5}),
    ({}, {"tags.noise.none": 0.5}),
    ({}, {"tags.noise.shuffle": 1.0}),
    ({"tags.noise.wrong": 0.5}, {"tags.noise.pool": 2}),
    (LORA, {"lora.rank": 4}),
    (LORA, {"lora.alpha": 2}),
    (LORA, {"lora.dropout": 0.5}),
    (LORA, {"lora.targets": ["o_proj"]}),
]
"""Settings of two runs: (both, the second one alone). They must learn something else."""
ELSEWHERE = {
    "model": "test_a_run_is_a_model_and_so_is_its_export",
    "out": "test_a_run_writes_what_it_is_told_to",
    "log_every": "test_a_run_writes_what_it_is_told_to",
    "save_every": "test_a_run_writes_what_it_is_told_to",
    "keep": "test_a_run_writes_what_it_is_told_to",
    "tensorboard": "test_a_run_is_a_model_and_so_is_its_export",
    "ahead": "test_batches_are_made_ahead",
    "stage": "test_a_run_of_another_stage_is_refused",
    "micro_batch": "test_micro_batches_learn_what_a_whole_batch_does",
    "gradient_checkpointing": "test_gradient_checkpointing_learns_the_same",
    "data.allow_outside": "test_a_recipe_may_allow_images_outside_of_the_folder",
    "data.features": "test_cached_features_are_the_live_ones_in_float16",
    "tags.any_store": "test_another_version_of_the_store_is_refused_unless_told",
}
"""Fields that must not change what is learnt, with the tests that show what they do."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The pictures of the store "shapes" as two data sets: other.json has other captions."""
    folder = write_shapes(tmp_path_factory.mktemp("options") / "shapes")
    names = sorted(path.stem for path in folder.glob("*.png"))[:10]
    for file, words in (("data.json", "in colour"), ("other.json", "on paper")):
        records = [
            {
                "id": name,
                "image": f"{name}.png",
                "captions": [f"A {name}.", f"One {name} {words}{'!' * i}"],
                "split": "train" if i % 5 else "test",
            }
            for i, name in enumerate(names)
        ]
        (folder / file).write_text(json.dumps(records))
    (folder / "other").mkdir()
    for name, other in zip(names, names[::-1], strict=True):
        (folder / "other" / f"{name}.png").write_bytes((folder / f"{other}.png").read_bytes())
    return folder


def recipe_of(place: Path, root: Path, settings: dict[str, Any]) -> Recipe:
    base = {
        "out": str(place / "runs" / str(abs(hash(json.dumps(settings))))),
        "steps": 3,
        "batch_size": 4,
        "warmup": 1,
        "ema": 0.9,
        "data.path": "data.json",
        "data.features": "features",
        "tags.store": f"file://{root}/shapes",
        "tags.noise.pool": 16,
    }
    values = base | settings
    for name in ("data.path", "data.images", "data.features", "tags.captions"):
        if values.get(name):
            values[name] = str(place / values[name])
    return Recipe().with_values(
        [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()]
    )


@pytest.fixture(scope="module")
def learn(place: Path, shapes_root: Path):
    """Train with settings, once for equal ones: losses, and sha256 of the last checkpoint's files."""
    done: dict[str, tuple[list[float], dict[str, str]]] = {}

    def run(settings: dict[str, Any]) -> tuple[list[float], dict[str, str]]:
        key = json.dumps(settings)
        if key not in done:
            AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the first run's precision
            recipe = recipe_of(place, shapes_root, settings)
            last = train(recipe)
            lines = (last.parent / "log.jsonl").read_text().splitlines()
            done[key] = [json.loads(line)["loss"] for line in lines], dict(checkpoint.read(last).files)
        return done[key]

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.parametrize(("both", "change"), CHANGES, ids=[",".join(change) for _, change in CHANGES])
def test_a_field_changes_what_is_learnt(learn, both: dict[str, Any], change: dict[str, Any]):
    assert learn(both)[1] != learn(both | change)[1]


def test_gradient_checkpointing_learns_the_same(learn):
    assert learn({"gradient_checkpointing": True})[0] == pytest.approx(learn({})[0], rel=1e-5)


def test_a_run_writes_what_it_is_told_to(place: Path, shapes_root: Path):
    settings = {"steps": 5, "log_every": 2, "save_every": 2, "keep": 2, "tags.store": "null://"}
    last = train(recipe_of(place, shapes_root, settings))
    assert sorted(path.name for path in last.parent.glob("step-*")) == ["step-000004", "step-000005"]
    lines = (last.parent / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 5]


def test_a_recipe_may_allow_images_outside_of_the_folder(place: Path, shapes_root: Path):
    (place / "inside").mkdir()
    records = json.loads((place / "data.json").read_text())
    moved = [{**record, "image": f"../{record['image']}"} for record in records]
    (place / "inside" / "moved.json").write_text(json.dumps(moved))
    settings = {
        "steps": 1,
        "tags.store": "null://",
        "data.path": "inside/moved.json",
        "out": str(place / "moved"),
    }
    with pytest.raises(InvalidInput, match=r"data\.allow_outside"):
        train(recipe_of(place, shapes_root, settings))
    assert train(recipe_of(place, shapes_root, {**settings, "data.allow_outside": True})).exists()


def test_a_run_of_another_stage_is_refused(place: Path, shapes_root: Path):
    settings = {"steps": 1, "tags.store": "null://", "out": str(place / "staged")}
    train(recipe_of(place, shapes_root, settings))
    with pytest.raises(InvalidInput, match=r"another recipe \(stage 'align' -> 'finetune'\)"):
        train(recipe_of(place, shapes_root, {**settings, "stage": "finetune"}))


def test_batches_are_made_ahead(place: Path, monkeypatch):
    samples: Any = read_samples(place / "data.json")
    unused: Any = None
    loader = Loader(Recipe(steps=9, batch_size=2, ahead=3), samples, unused, None, unused, rank=0, world=1)
    numbers, finished = [], Semaphore(0)

    def make(number: int) -> int:
        numbers.append(number)
        finished.release()
        return number

    monkeypatch.setattr(loader, "make", make)
    steps = loader.from_step(0)
    assert next(steps) == 0
    assert all(finished.acquire(timeout=30) for _ in range(4))
    steps.close()
    assert numbers == [0, 1, 2, 3]


def names_of(recipe: Any, prefix: str = "") -> set[str]:
    names = set()
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        names |= names_of(value, f"{prefix}{field.name}.") if is_dataclass(value) else {prefix + field.name}
    return names


def test_every_field_is_tried():
    changed = {name for _, change in CHANGES for name in change}
    tried = {
        name.partition(".")[0] if name.startswith(("rates", "model_config")) else name for name in changed
    }
    assert names_of(Recipe()) == tried | ELSEWHERE.keys()
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_t*.py"))
    assert all(f"def {test}(" in tests for test in ELSEWHERE.values())
