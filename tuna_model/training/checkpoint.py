"""Checkpoints of a training run: the trained weights only, and all that is needed to resume exactly. No
pickle.

    RUN/step-000100/tuna.json              format, step, recipe, store with version and fingerprint, sha256 of
    files RUN/step-000100/trained.safetensors    the trained weights, by their names in the model
    RUN/step-000100/ema.safetensors        their moving average, if there is one
    RUN/step-000100/optimizer.safetensors  the optimizer's state: PARAMETER/exp_avg ...

A directory gets its name by one rename when all of it is on disk. The position in the data and the random
numbers are functions of (seed, step), so only the step is stored. Without the optimizer the directory is
still a model: `load_run`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tagstore.errors import Damaged, FingerprintMismatch, InvalidInput, NotFound
from tuna_model.training.recipe import Recipe

FORMAT = 1
_RECORD = "tuna.json"


@dataclass(frozen=True, slots=True)
class StorePin:
    """The store whose tags a model was trained with."""

    url: str = ""
    store: str = ""
    """Empty: no tags. Of a run with several stores all of them, as "a@1+b@2"."""
    version: int = 0
    """0 for several stores."""
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Content of `tuna.json`."""

    step: int
    """Optimizer steps done; the number of the next one."""
    recipe: Recipe
    store: StorePin
    encoder: str
    """Digest of the encoder's fingerprint."""
    files: Mapping[str, str] = field(default_factory=dict)
    """sha256 of each file beside it."""
    scaler: Mapping[str, Any] = field(default_factory=dict)
    """State of the loss scaler, with fp16."""
    data: str = ""
    """Digest of the samples (`processing.data.digest`); empty if an earlier version of this program wrote
    it."""


def save(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    trained: Mapping[str, Tensor],
    ema: Mapping[str, Tensor] | None = None,
    optimizer: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint, whole or not at all, also through a power cut. Tensors are unsharded and on the
    CPU."""
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
    (part / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for path in (*part.iterdir(), part):
        _sync(path)
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)
    _sync(folder.parent)


def read(folder: Path) -> Checkpoint:
    """Read `tuna.json` and check the files beside it.

    Raises:
        NotFound: there is no checkpoint.
        Damaged: a file is missing or was changed.
        InvalidInput: another version of this program wrote it.
    """
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFound(f"there is no checkpoint in {folder}: it has no {_RECORD}") from error
    except json.JSONDecodeError as error:
        raise Damaged(f"{folder / _RECORD} is no JSON: {error}") from error
    if record.get("format") != FORMAT:
        raise InvalidInput(
            f"{folder} has format {record.get('format')}, and this program reads {FORMAT}: "
            "use the one that wrote it"
        )
    for name, digest in record["files"].items():
        path = folder / name
        if not path.exists():
            if name != "optimizer.safetensors":  # a model that is passed on needs no optimizer
                raise Damaged(f"{path} is missing")
        elif _sha256(path) != digest:
            raise Damaged(f"{path} was changed: its sha256 differs. Take an earlier checkpoint")
    recipe, store = Recipe.of(record["recipe"], str(folder / _RECORD)), StorePin(**record["store"])
    return Checkpoint(
        record["step"], recipe, store, record["encoder"], record["files"], record["scaler"],
        record.get("data", ""),
    )  # fmt: skip


def tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Load the tensors of one file: `trained`, `ema` or `optimizer`. Raises `NotFound`, `Damaged`."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        raise NotFound(f"{folder} has no {path.name}")
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise Damaged(f"{path} cannot be read: {error}") from error


def latest(run: Path) -> Path | None:
    """The newest checkpoint of a run, None if there is none."""
    checkpoints = _checkpoints(run)
    return checkpoints[-1] if checkpoints else None


def find(folder: Path) -> Path:
    """The checkpoint itself, or the newest one if this is a run's directory."""
    return folder if (folder / _RECORD).exists() else latest(folder) or folder


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and half-written ones of a run that was killed."""
    for folder in (*_checkpoints(run)[:-keep], *run.glob(".step-*")):
        shutil.rmtree(folder)


def name_of(step: int) -> str:
    """Name of a checkpoint's directory within its run."""
    return f"step-{step:06d}"


def check_store(pinned: StorePin, now: StorePin, *, allow: bool, where: Path) -> None:
    """Refuse to resume with tags of another store: the weights have learnt how far to trust the first one's.

    Raises:
        FingerprintMismatch: store, version or encoder differ, and `allow` is False.
    """
    if replace(pinned, url="") != replace(now, url="") and not allow:
        raise FingerprintMismatch(
            f"{where} was trained with {_describe(pinned)}, and {now.url} answers as {_describe(now)}: "
            f"ask for the same one ({pinned.url.partition('@')[0]}@{pinned.version}), "
            "or say --any-store if you mean it"
        )


def trained_tensors(model: nn.Module, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Copy the trained parameters, or the `values` of their names, unsharded to the CPU.

    Where they are sharded, every process must call this.
    """
    return {
        name: _unsharded(parameter.detach() if values is None else values[name]).cpu().clone()
        for name, parameter in trained_parameters(model)
    }


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copy the optimizer's state, by PARAMETER/KEY, unsharded to the CPU."""
    return {
        f"{name}/{key}": _unsharded(torch.as_tensor(value)).cpu().clone()
        for name, parameter in trained_parameters(model)
        for key, value in optimizer.state[parameter].items()
    }


def put_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Load the state of `optimizer_tensors`, sharded as the parameters are. Raises `InvalidInput`."""
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for path, value in state.items():
        name, _, key = path.rpartition("/")
        by_parameter.setdefault(name, {})[key] = value
    for name, parameter in trained_parameters(model):
        if name not in by_parameter:
            raise InvalidInput(
                f"the checkpoint has no optimizer state of '{name}': the recipe trains more than before"
            )
        values = by_parameter[name]
        optimizer.state[parameter] = {key: _like(value, parameter) for key, value in values.items()}


def put_trained(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Load weights by name. Raises `InvalidInput` for a name or shape that the model does not have."""
    parameters = dict(_parameters(model))
    with torch.no_grad():
        for name, value in values.items():
            parameter = parameters.get(name)
            if parameter is None or parameter.shape != value.shape:
                shape = "no such weight" if parameter is None else f"shape {list(parameter.shape)}"
                raise InvalidInput(
                    f"the checkpoint has '{name}' of shape {list(value.shape)}, the model has {shape}: "
                    "it is another model's"
                )
            parameter.copy_(_like(value, parameter))


def put_average(average: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Load a saved moving average, sharded as the running one is."""
    for name, value in average.items():
        value.copy_(_like(values[name], value))


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that are trained, by their names in the model, without a wrapper's prefix."""
    return [(name, parameter) for name, parameter in _parameters(model) if parameter.requires_grad]


def _parameters(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        yield name.removeprefix("module.").replace("_orig_mod.", ""), parameter


def _unsharded(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """Copy to the parameter's device, sharded as it is. Scalars (counts of steps) stay on the CPU, where
    optimizers keep them."""
    if value.ndim == 0:
        return value.clone()
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        sharded = cast(DTensor, parameter)
        return distribute_tensor(value.to(sharded.device), sharded.device_mesh, sharded.placements)
    return value.to(parameter.device).clone()


def _checkpoints(run: Path) -> Sequence[Path]:
    return sorted(
        (path for path in run.glob("step-*") if (path / _RECORD).exists()),
        key=lambda path: int(path.name.partition("-")[2]),
    )


def _describe(pin: StorePin) -> str:
    if not pin.store:
        return "no tags"
    return f"store '{pin.store}' version {pin.version} (encoder {pin.fingerprint})"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
