"""Triton's compiler, which needs no GPU, compiles every kernel without spills.

For sm_90 in every run, for sm_80 and sm_100 with `pytest -m matrix`. The whole table (every dtype, head size
and flag) is `python -m benchmarks.kernels.ahead_of_time`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "kernels" / "ahead_of_time.py"


@pytest.mark.parametrize(
    "arch", [90, pytest.param(80, marks=pytest.mark.matrix), pytest.param(100, marks=pytest.mark.matrix)]
)
def test_variants_compile_without_spills(arch: int, tmp_path: Path):
    # a process of its own: kernels of this one may be interpreted
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(SCRIPT), "--quick", "--arch", str(arch), "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(f"sm_{arch} ")]
    attention = {"forward", "maps", "backward", "dbias"}
    others = {"weights", "weights_backward", "gather", "scatter"}
    assert {line.split()[1] for line in rows} == attention | others
    # half-precision attention runs on the tensor cores
    assert all(
        re.search(r"H?MMA x", line)
        for line in rows
        if line.split()[1] in ("forward", "backward") and "bf16" in line
    )
