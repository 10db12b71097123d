"""Training runs learn, resume after kill -9 without a trace, and do in two processes what they do in one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from captioned import write_llava
from pictures import picture
from tagstore.errors import Damaged, FingerprintMismatch, InvalidInput, NotFound, Unavailable
from tuna_model import presets
from tuna_model.inference.pipeline import Pipeline
from tuna_model.modeling.lora import add_updates
from tuna_model.presets.trained import read_trained
from tuna_model.training import checkpoint
from tuna_model.training.journal import LogLine
from tuna_model.training.recipe import Recipe
from tuna_model.training.runs import export, load_run
from tuna_model.training.train import Diverged, train

WORKER = Path(__file__).with_name("training.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with 200 pictures as LLaVA JSON; features of them come to lie in it."""
    folder = tmp_path_factory.mktemp("training")
    write_llava(folder / "data", 200)
    return folder


def recipe_of(place: Path, out: str, **values) -> Recipe:
    counts = {"steps": 6, "batch_size": 8, "micro_batch": 2, "warmup": 2, "save_every": 2}
    rates = {"connector": 3e-3, "tag_encoder": 3e-3, "weight_tuner": 3e-3, "language_model": 1e-3}
    paths = {"path": str(place / "data" / "data.json"), "features": str(place / "features")}
    data = {**paths, "limit": 40, "template": "plain"}
    base = {"model": "tiny", "out": str(place / out), **counts, "rates": rates, "data": data}
    return Recipe.of({**base, **values})


def everything(place: Path, root: Path, out: str, **values) -> Recipe:
    """Return a recipe with all that has state or draws numbers: tag noise, LoRA dropout, EMA, temperature."""
    noise = {"drop": 0.2, "wrong": 0.2, "none": 0.1, "shuffle": 0.2, "pool": 16}
    tags = {"store": f"file://{root}/shapes", "noise": noise}
    model = {"lora": {"rank": 2, "dropout": 0.2}, "model_config": {"learn_temperature": True}}
    return recipe_of(place, out, ema=0.9, **model, tags=tags, **values)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def same(one: Path, two: Path) -> bool:
    """Whether two checkpoints are equal bit for bit."""
    names = ("trained", "ema", "optimizer")
    pairs = [(checkpoint.tensors(one, name), checkpoint.tensors(two, name)) for name in names]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


@pytest.fixture(scope="module")
def whole(place: Path, shapes_root: Path) -> Path:
    """The last checkpoint of a run that nothing interrupted."""
    return train(everything(place, shapes_root, "whole", keep=3))


@pytest.mark.slow
def test_tiny_learns_200_answers_by_heart(place: Path):
    values = Recipe.read("tiny-overfit").to_dict()
    paths = {"path": str(place / "data" / "data.json"), "features": str(place / "features-200")}
    data = {**paths, "template": "plain"}
    recipe = Recipe.of({**values, "out": str(place / "overfit"), "save_every": 1000, "data": data})
    train(recipe)
    assert sum(losses(place / "overfit")[-10:]) / 10 < 0.1


def test_a_run_that_goes_on_equals_one_that_was_not_interrupted(place: Path, shapes_root: Path, whole: Path):
    recipe = everything(place, shapes_root, "resumed", keep=3)
    shutil.copytree(whole.parent / "step-000002", place / "resumed" / "step-000002")
    assert same(train(recipe), whole)
    assert losses(place / "resumed") == losses(whole.parent)[2:]


@pytest.mark.slow
def test_kill_9_and_go_on(place: Path, shapes_root: Path, whole: Path):
    recipe = everything(place, shapes_root, "killed", keep=3)
    (place / "killed.json").write_text(json.dumps(recipe.to_dict()))
    process = subprocess.run([sys.executable, str(WORKER), str(place / "killed.json"), "5"], check=False)
    assert process.returncode == -signal.SIGKILL
    assert checkpoint.latest(place / "killed") == place / "killed" / "step-000004"
    assert same(train(recipe), whole)
    assert losses(place / "killed") == losses(whole.parent)


@pytest.fixture(scope="module")
def single(place: Path) -> Path:
    """The last checkpoint of a run in one process."""
    return train(recipe_of(place, "one", ema=0.9))


def test_micro_batches_learn_what_a_whole_batch_does(place: Path, single: Path):
    train(recipe_of(place, "large", micro_batch=0))
    assert losses(place / "large") == pytest.approx(losses(single.parent), rel=1e-5)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(place: Path, single: Path):
    (place / "two.json").write_text(json.dumps(recipe_of(place, "two", ema=0.9, keep=3).to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(WORKER), str(place / "two.json"), "ddp", "fsdp2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
    for mode in ("ddp", "fsdp2"):
        out = place / f"two-{mode}"
        assert losses(out) == pytest.approx(losses(single.parent), rel=1e-5)
        for name in ("trained", "ema", "optimizer"):
            mine, theirs = checkpoint.tensors(single, name), checkpoint.tensors(out / single.name, name)
            assert mine.keys() == theirs.keys()
            assert all(torch.allclose(mine[key], theirs[key], rtol=1e-3, atol=1e-5) for key in mine)
    # a checkpoint holds whole tensors: a run that two processes began goes on in one
    shutil.copytree(place / "two-fsdp2" / "step-000004", place / "fewer" / "step-000004")
    train(recipe_of(place, "fewer", ema=0.9))
    assert losses(place / "fewer") == pytest.approx(losses(single.parent)[4:], rel=1e-5)


def test_what_a_checkpoint_says(place: Path, shapes_root: Path, whole: Path):
    state = checkpoint.read(whole)
    assert (state.step, state.store.store, state.store.version) == (6, "shapes", 1)
    assert state.store.fingerprint == state.encoder
    names = set(checkpoint.tensors(whole, "trained"))
    assert any("lora_A" in name for name in names)
    assert "weight_tuner.log_temperature" in names
    assert not any(name.endswith("base_layer.weight") for name in names)
    assert not list(whole.parent.glob("**/*.pt")) + list(whole.parent.glob("**/*.bin"))
    assert json.loads((whole.parent / "log.jsonl").read_text().splitlines()[-1])["tags"] > 0


def test_a_checkpoint_that_was_changed_or_is_missing(whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path / "bad")
    data = bytearray((tmp_path / "bad" / "trained.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "bad" / "trained.safetensors").write_bytes(data)
    with pytest.raises(Damaged, match="its sha256 differs"):
        checkpoint.read(tmp_path / "bad")
    with pytest.raises(NotFound, match="there is no checkpoint"):
        checkpoint.read(tmp_path)


def test_another_version_of_the_store_is_refused_unless_told(
    place: Path, shapes_root: Path, whole: Path, tmp_path: Path, mini
):
    from tagstore.ingestion import ingest

    root = tmp_path / "root"
    shutil.copytree(shapes_root, root)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "pink.png").write_bytes(picture("pink", "circle"))
    (tmp_path / "more" / "pink.txt").write_text("A pink circle.\n")
    ingest(str(tmp_path / "more"), root=root, store="shapes", encoder=mini)
    recipe = everything(place, root, "newer", steps=3, warmup=2)
    shutil.copytree(whole.parent / "step-000002", place / "newer" / "step-000002")
    changed = json.loads((place / "newer" / "step-000002" / "tuna.json").read_text())
    changed["recipe"]["steps"] = 3
    (place / "newer" / "step-000002" / "tuna.json").write_text(json.dumps(changed))
    message = r"was trained with store 'shapes' version 1 .* answers as store 'shapes' version 2"
    with pytest.raises(FingerprintMismatch, match=message):
        train(recipe)
    values = recipe.to_dict()
    values["tags"]["any_store"] = True
    train(Recipe.of(values))
    assert checkpoint.read(place / "newer" / "step-000003").store.version == 2


def test_another_recipe_is_refused(place: Path, shapes_root: Path, whole: Path):
    shutil.copytree(whole, place / "other" / whole.name)
    with pytest.raises(InvalidInput, match=r"another recipe \(batch_size 8 -> 4\)"):
        train(everything(place, shapes_root, "other", batch_size=4))


def test_a_run_does_not_begin_without_its_store(place: Path):
    with pytest.raises(Unavailable, match="does not begin without its store"):
        train(recipe_of(place, "storeless", tags={"store": "grpc://127.0.0.1:1/none?retries=0"}))


def test_what_half_a_save_left_is_swept(place: Path, whole: Path):
    out = place / "swept"
    for step in (1, 2, 3):
        shutil.copytree(whole, out / checkpoint.name_of(step))
    (out / ".step-000004.123").mkdir()
    checkpoint.prune(out, 2)
    assert sorted(path.name for path in out.iterdir()) == ["step-000002", "step-000003"]


def test_stores_are_mixed_as_the_samples_say(place: Path, shapes_root: Path, tmp_path: Path):
    """Each sample's field `store` stands in the URL; a sample without one is refused, an empty one gets no
    tags."""
    records = json.loads((place / "data" / "data.json").read_text())[:16]
    stores = ["shapes", "other", "", "shapes"]
    shutil.copytree(shapes_root / "shapes", tmp_path / "root" / "shapes")
    shutil.copytree(shapes_root / "shapes", tmp_path / "root" / "other")
    data = place / "data" / "mixed.json"
    data.write_text(json.dumps([r | {"store": stores[i % 4]} for i, r in enumerate(records)]))
    fields = {"path": str(data), "template": "plain"}
    tags = {"store": f"file://{tmp_path}/root/{{store}}"}
    recipe = recipe_of(place, "mixed", steps=2, batch_size=8, tags=tags, data=fields)
    last = train(recipe)
    assert checkpoint.read(last).store.store == "other@1+shapes@1"
    lines = [json.loads(line) for line in (place / "mixed" / "log.jsonl").read_text().splitlines()]
    assert all(line["tags"] > 0 for line in lines)
    assert load_run(last)[0].config.store == ""  # it is for any store
    data.write_text(json.dumps(records))
    with pytest.raises(InvalidInput, match="no field 'store'"):
        train(recipe_of(place, "unsaid", tags=tags, data=fields))


def test_low_rank_updates_travel_in_the_small_file(place: Path, tmp_path: Path):
    rates = {"connector": 3e-2, "language_model": 3e-2}
    last = train(
        recipe_of(
            place, "updates", steps=3, rates=rates, lora={"rank": 2, "targets": ["q_proj", "down_proj"]}
        )
    )
    tuna = Pipeline.load(str(last.parent), dtype=torch.bfloat16)  # a run is loaded as presets are
    assert tuna.model.dtype == torch.bfloat16
    with pytest.raises(InvalidInput, match="is a training run, which sets max_tags itself"):
        Pipeline.load(str(last.parent), max_tags=3)
    merged, file = load_run(last)[0], export(last, tmp_path / "t.safetensors")
    learnt = read_trained(file)
    fresh = presets.load("tiny")[0]
    before = fresh.language_model.model.layers[0].mlp.down_proj.weight.clone()
    add_updates(fresh, learnt.updates, learnt.scale)
    layers = [model.language_model.model.layers[0] for model in (fresh, merged)]
    assert not torch.allclose(layers[0].mlp.down_proj.weight, before, atol=1e-3)
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        ours, theirs = (layer.get_submodule(name).weight for layer in layers)
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)  # the file is float16
    updates = {name: tensor for name, tensor in learnt.updates.items() if not name.endswith("lora_B")}
    with pytest.raises(Damaged, match=r"q_proj|down_proj"):
        add_updates(fresh, updates, learnt.scale)


def test_a_run_whose_loss_is_not_finite_ends_and_keeps_what_it_had(place: Path):
    rates = {"connector": 1e30, "tag_encoder": 1e30, "language_model": 1e30}
    recipe = recipe_of(place, "diverged", rates=rates, steps=20, save_every=1, warmup=1, clip=0.0)
    with pytest.raises(Diverged, match="lower the rates"):
        train(recipe)
    last = checkpoint.latest(place / "diverged")
    assert last is not None
    assert checkpoint.read(last).step < 20


def test_a_step_whose_gradient_is_not_finite_is_not_taken_and_the_run_goes_on(place: Path, monkeypatch):
    real, norms = Accelerator.clip_grad_norm_, iter((1, float("nan"), 1, 1))

    def clip(self: Accelerator, parameters: Any, most: float) -> torch.Tensor:
        spoil = next(norms)
        for parameter in (parameters := list(parameters)):
            if parameter.grad is not None:
                parameter.grad *= spoil
        return real(self, parameters, most)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clip)
    lines: list[LogLine] = []
    last = train(recipe_of(place, "one-bad-step", steps=4, log_every=1), progress=lines.append)
    assert [line.skipped for line in lines] == [0, 1, 1, 1]
    assert all(torch.isfinite(p).all() for p in load_run(last)[0].parameters())
