"""What a training run leaves on disk: only what was trained, and everything needed to go on as if nothing had happened. No pickle.

    RUN/step-000100/tuna.json              format, step, recipe, base model, store with version and fingerprint, sha256 of the files
    RUN/step-000100/trained.safetensors    the trained weights, by their names in the model
    RUN/step-000100/ema.safetensors        their moving average, if there is one
    RUN/step-000100/optimizer.safetensors  the optimizer's state: PARAMETER/exp_avg ...

A directory appears under its name by one rename when all of it is on disk. The position in the data and the random numbers are functions
of (seed, step), so the step is all there is to say of them. Without the optimizer the same directory is a model: `load_run`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tagstore.errors import Damaged, FingerprintMismatch, InvalidInput, NotFound
from tuna_model.training.recipe import Recipe

FORMAT = 1
_NAME = "tuna.json"


@dataclass(frozen=True, slots=True)
class StorePin:
    """Which tags a model has learnt with."""

    url: str = ""
    store: str = ""
    """Empty: no tags."""
    version: int = 0
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What `tuna.json` says."""

    step: int
    """Optimizer steps done: the next one's number."""
    recipe: Recipe
    store: StorePin
    encoder: str
    """Digest of the encoder's fingerprint."""
    files: Mapping[str, str] = field(default_factory=dict)
    """sha256 of each file beside it."""
    scaler: Mapping[str, Any] = field(default_factory=dict)
    """State of the loss scaler, with fp16."""


def save(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    trained: Mapping[str, Tensor],
    ema: Mapping[str, Tensor] | None = None,
    optimizer: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint so that it is there whole or not at all, also after a power cut. Tensors are on the CPU and whole."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    files = {}
    for name, tensors in (("trained", trained), ("ema", ema), ("optimizer", optimizer)):
        if tensors is not None:
            path = part / f"{name}.safetensors"
            save_file({key: value.contiguous() for key, value in tensors.items()}, path)
            files[path.name] = _sha256(path)
    record = {"format": FORMAT, **asdict(checkpoint), "recipe": checkpoint.recipe.to_dict(), "files": files}
    (part / _NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for path in (*part.iterdir(), part):
        _sync(path)
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)
    _sync(folder.parent)


def read(folder: Path) -> Checkpoint:
    """What a checkpoint says of itself.

    Raises:
        NotFound: there is none.
        Damaged: a file that is not what was written.
        InvalidInput: of a later format.
    """
    try:
        record = json.loads((folder / _NAME).read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFound(f"there is no checkpoint in {folder}: it has no {_NAME}") from error
    except json.JSONDecodeError as error:
        raise Damaged(f"{folder / _NAME} is no JSON: {error}") from error
    if record.get("format") != FORMAT:
        raise InvalidInput(
            f"{folder} is of format {record.get('format')}, this is made for {FORMAT}: use the version that wrote it"
        )
    for name, digest in record["files"].items():
        if (
            not (folder / name).exists() and name != "optimizer.safetensors"
        ):  # a model that is passed on needs no optimizer
            raise Damaged(f"{folder / name} is missing")
        if (folder / name).exists() and _sha256(folder / name) != digest:
            raise Damaged(
                f"{folder / name} is not what was written: its sha256 differs. Take an earlier checkpoint"
            )
    recipe = Recipe.of(record["recipe"], str(folder / _NAME))
    return Checkpoint(
        record["step"],
        recipe,
        StorePin(**record["store"]),
        record["encoder"],
        record["files"],
        record["scaler"],
    )


def tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one of its files: `trained`, `ema`, `optimizer`. Raises `NotFound`, `Damaged`."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        raise NotFound(f"{folder} has no {path.name}")
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise Damaged(f"{path} cannot be read: {error}") from error


def latest(run: Path) -> Path | None:
    """The newest checkpoint of a run, None if there is none."""
    found = _steps(run)
    return found[-1] if found else None


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what a run that was killed had half written."""
    for folder in _steps(run)[:-keep]:
        shutil.rmtree(folder)
    for left in run.glob(".step-*"):
        shutil.rmtree(left)


def name_of(step: int) -> str:
    """The directory of a checkpoint within its run."""
    return f"step-{step:06d}"


def check_store(pinned: StorePin, now: StorePin, *, allow: bool, where: Path) -> None:
    """Refuse to go on with tags of another store than before: what the weights have learnt to trust is gone.

    Raises:
        FingerprintMismatch: another store, version or encoder, and not `allow`.
    """
    old, new = (pinned.store, pinned.version, pinned.fingerprint), (now.store, now.version, now.fingerprint)
    if old != new and not allow:
        raise FingerprintMismatch(
            f"{where} was trained with {_named(pinned)}, and {now.url} answers as {_named(now)}: ask for the same one "
            f"({pinned.url.partition('@')[0]}@{pinned.version}), or say --any-store if you mean it"
        )


def trained_tensors(model: nn.Module, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Parameters that learn, whole and on the CPU (every process must call this where they are sharded); or `values` of those names."""
    found = {}
    for name, parameter in learning(model):
        value = parameter.detach() if values is None else values[name]
        found[name] = _whole(value).cpu().clone()
    return found


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter, whole and on the CPU."""
    found = {}
    for name, parameter in learning(model):
        for key, value in optimizer.state[parameter].items():
            found[f"{name}/{key}"] = _whole(torch.as_tensor(value)).cpu().clone()
    return found


def put_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Give the optimizer the state of `optimizer_tensors`, cut into shards as its parameters are. Raises `InvalidInput`."""
    for name, parameter in learning(model):
        mine = {
            key.rpartition("/")[2]: value for key, value in state.items() if key.rpartition("/")[0] == name
        }
        if not mine:
            raise InvalidInput(
                f"the checkpoint has no optimizer state of '{name}': the recipe trains something that it did not train before"
            )
        optimizer.state[parameter] = {key: _like(value, parameter) for key, value in mine.items()}


def put_trained(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put weights where their names say. Raises `InvalidInput` for a name or shape that the model does not have."""
    there = dict(_parameters(model))
    with torch.no_grad():
        for name, value in values.items():
            if name not in there or there[name].shape != value.shape:
                shape = "no such weight" if name not in there else f"shape {list(there[name].shape)}"
                raise InvalidInput(
                    f"the checkpoint has '{name}' of shape {list(value.shape)}, the model has {shape}: it is another model's"
                )
            there[name].copy_(_like(value, there[name]))


def put_average(average: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Put a saved moving average back, cut into shards as the running one is."""
    for name, value in average.items():
        value.copy_(_like(values[name], value))


def learning(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that learn, by name, without the prefix that a wrapper puts before."""
    return [(name, parameter) for name, parameter in _parameters(model) if parameter.requires_grad]


def _parameters(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        yield name.removeprefix("module.").replace("_orig_mod.", ""), parameter


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """On the parameter's device, and in its shards if it is cut into some. Counts of steps (scalars) stay where optimizers keep them."""
    if value.ndim == 0:
        return value.clone()
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        sharded = cast(DTensor, parameter)
        return distribute_tensor(value.to(sharded.device), sharded.device_mesh, sharded.placements)
    return value.to(parameter.device).clone()


def _steps(run: Path) -> Sequence[Path]:
    return sorted(
        (path for path in run.glob("step-*") if (path / _NAME).exists()),
        key=lambda path: int(path.name.partition("-")[2]),
    )


def _named(pin: StorePin) -> str:
    return (
        f"store '{pin.store}' version {pin.version} (encoder {pin.fingerprint})" if pin.store else "no tags"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
