"""The log of a training run: RUN/log.jsonl, and TensorBoard's files if the recipe wants them."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tagstore.errors import MissingExtra
from tuna_model.training.recipe import Recipe


@dataclass(frozen=True, slots=True)
class LogLine:
    """Figures of one step; a line of RUN/log.jsonl."""

    step: int
    """Steps done."""
    epoch: float
    loss: float
    """Mean over the step's labels, over all processes."""
    rates: Mapping[str, float]
    gradient_norm: float
    """Before clipping."""
    skipped: int
    """Steps so far that were not taken, because loss or gradient was not finite."""
    samples_a_second: float
    tokens: int
    """Labels in this step."""
    tags: float
    """Tags per image, in this process."""
    retrieval_ms: float
    """Milliseconds that the store took for this process's share; they overlap with learning."""
    waited_ms: float
    """Milliseconds that learning waited for the batch."""
    degraded: int
    """Images so far that got no tags because the store did not answer, in this process."""
    memory_mb: float
    """Peak memory: of the GPU if there is one, else of the process."""


class Journal:
    """Writes a line for each logged step. Drops lines after step `first`: a resumed run writes them again."""

    def __init__(self, out: Path, first: int, recipe: Recipe) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._path = out / "log.jsonl"
        lines = [line for line in _lines(self._path) if line["step"] <= first] if first else []
        self._path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        self._file = self._path.open("a", encoding="utf-8")
        self._board: Any = None
        if recipe.tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ModuleNotFoundError as error:
                raise MissingExtra(
                    "tensorboard = true needs tensorboardX: pip install 'tagstore[eval]'"
                ) from error
            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=first)

    def write(self, line: LogLine) -> None:
        """Add a line."""
        values = asdict(line)
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in flat(values).items():
                self._board.add_scalar(name, value, line.step)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        for line in path.read_text(encoding="utf-8").split("\n"):
            with contextlib.suppress(json.JSONDecodeError):  # a line that a kill cut off
                yield json.loads(line)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with dotted keys."""
    merged: dict[str, Any] = {}
    for key, value in values.items():
        merged |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return merged


def peak_memory(device: torch.device) -> float:
    """Peak memory in megabytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6
