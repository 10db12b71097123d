"""Block sizes of the attention kernels: fixed defaults, and a small search with results kept on disk.

The search runs at the first call of a new shape class on a GPU. The defaults are used instead when
`TUNA_AUTOTUNE=0`, under the interpreter, while a CUDA graph is captured, and after
`torch.use_deterministic_algorithms(True)`: block sizes decide the order of sums, so a search may change the
last bits from machine to machine. (Any one choice gives the same bits every run.) Results are JSON, a
file per device, in `$TUNA_CACHE_DIR` or `~/.cache/tuna_kernels`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

from ..backend import interpreting, log


@dataclass(frozen=True, slots=True)
class Config:
    """Rows and patches of a tile, warps of a program, stages of its load pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def forward_default(dim: int, dtype: torch.dtype, rows: int, bias: bool = False) -> Config:
    """Return a config that spills no registers (`benchmarks/kernels/ahead_of_time.py`).

    `rows` counts the queries of an average image for one key/value head.
    """
    if dtype == torch.float32:
        # exact float32 products run without tensor cores and hold both operands in registers
        return Config(16, 32, 8 if dim > 128 else 4, 2)
    block_m = 16 if rows <= 8 else 32 if rows <= 24 else 64
    if dim > 128:
        return Config(min(block_m, 32), 64, 8, 2)
    if dim > 64 or bias:
        return Config(block_m, 64, 8 if block_m > 16 else 4, 2)
    return Config(block_m, 64, 4, 3)


def forward_candidates(dim: int, dtype: torch.dtype, rows: int, bias: bool = False) -> list[Config]:
    if dtype == torch.float32:
        return [Config(16, n, 8, 2) for n in (32, 64)]
    largest = 32 if dim > 128 else 64
    block_ms = [m for m in (16, 32, 64) if m <= largest and (m <= 32 or rows > 8)]
    warps = (4, 8) if dim > 64 or bias else (2, 4)
    configs = [
        Config(m, 64, w, s) for m in block_ms for w in warps for s in (2, 3) if not (m == 64 and w == 2)
    ]
    return configs if dim > 128 else configs + [Config(m, 128, 8 if dim > 64 else 4, 2) for m in block_ms]


def backward_default(dim: int, dtype: torch.dtype, rows: int, bias: bool = False) -> Config:
    if dtype == torch.float32:
        return Config(16, 32, 8, 1) if dim <= 64 else Config(16, 16, 8, 1)
    if dim > 128:
        return Config(16 if bias else 32, 32, 8, 1)
    if dim > 64:
        return Config(32 if bias else 64, 32, 8, 2)
    # 64 rows: 40 tags, the usual cap, take the one-pass branch
    return Config(64, 32, 8 if bias else 4, 2)


def backward_candidates(dim: int, dtype: torch.dtype, rows: int, bias: bool = False) -> list[Config]:
    if dtype == torch.float32:
        return []
    if dim > 128:
        return [Config(m, n, 8, s) for m in (16, 32) for n in (16, 32) for s in (1, 2)]
    warps = (4, 8) if dim <= 64 else (8,)
    block_ms = (16, 32) if rows <= 4 else (32, 64)
    return [Config(m, n, w, s) for m in block_ms for n in (32, 64) for w in warps for s in (1, 2, 3)]


def bias_default(dim: int, dtype: torch.dtype) -> Config:
    if dtype == torch.float32:
        return Config(16, 16, 8 if dim > 128 else 4, 1)
    return Config(16, 64, 8, 1) if dim > 128 else Config(32, 64, 8, 2)


def tuning_key(
    op: str, dtype: torch.dtype, dim: int, group: int, rows: int, patches: int, bias: bool, mask: bool
) -> str:
    """Return what decides the best blocks: rows and patches up to powers of two, and not the batch."""
    name, rows, patches = str(dtype).removeprefix("torch."), *map(triton.next_power_of_2, (rows, patches))
    return f"{op} {name} D{dim} G{group} rows{rows} P{patches} bias{bias:d} mask{mask:d}"


_known: dict[tuple[str, str], Config] = {}
_loaded: set[str] = set()


def searching(device: torch.device) -> bool:
    """Return whether a search may run now on `device`."""
    return (
        device.type == "cuda"
        and not interpreting()
        and os.environ.get("TUNA_AUTOTUNE", "1") != "0"
        and not torch.are_deterministic_algorithms_enabled()
    )


def pick(
    key: str,
    device: torch.device,
    default: Config,
    candidates: Sequence[Config],
    launch: Callable[[Config], None],
) -> Config:
    """Return the best config of `key` on `device`, measured if unknown; `default` where no search may run."""
    if not searching(device):
        return default
    name = _device_key(device)
    if name not in _loaded:
        _known.update({(name, known): config for known, config in _load(_cache_file(name)).items()})
        _loaded.add(name)
    if (name, key) in _known:
        return _known[name, key]
    if torch.cuda.is_current_stream_capturing():
        return default
    # the kernels overwrite their outputs, so running them again changes nothing
    times = {config: _time(config, launch) for config in dict.fromkeys([default, *candidates])}
    best = min(times, key=lambda config: times[config])
    log.info(
        "tuned '%s' on %s: %s, %.1f us (default %.1f us)",
        key,
        name,
        best,
        1e3 * times[best],
        1e3 * times[default],
    )
    _known[name, key] = best
    _save(_cache_file(name), key, best)
    return best


def _time(config: Config, launch: Callable[[Config], None]) -> float:
    """Return the median milliseconds of a launch; infinity for a config that does not fit the device."""
    try:
        return float(triton.testing.do_bench(lambda: launch(config), warmup=5, rep=20, return_mode="median"))
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def _device_key(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
    return f"{name}-triton{triton.__version__}"


def _cache_file(device: str) -> Path:
    root = os.environ.get("TUNA_CACHE_DIR") or Path.home() / ".cache" / "tuna_kernels"
    return Path(root) / f"tag_attention-{device}.json"


def _load(path: Path) -> dict[str, Config]:
    """Return the configs in the file; none if it is missing, or if it cannot be read, which is logged."""
    try:
        return {key: Config(**value) for key, value in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("tuning results in %s cannot be read (%s): measuring again", path, error)
        return {}


def _save(path: Path, key: str, config: Config) -> None:
    """Add a result by an atomic replacement: of processes that tune at the same time, the last one wins."""
    results = {name: asdict(value) for name, value in _load(path).items()} | {key: asdict(config)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(results, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError as error:
        log.warning("tuning results cannot be kept in %s (%s): the next process measures again", path, error)
