"""Where figures go: printed, and kept in benchmarks/results/ with the machine, the versions and the date they were taken on."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine(*packages: str) -> str:
    """Processor, cores, Python and the packages that matter, in one line."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "",
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    versions = ", ".join(f"{p} {version(p)}" for p in packages)
    return f"{model or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}, commit {commit}"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def write(theme: str, title: str, *parts: str, packages: Sequence[str] = (), keep: bool = True) -> Path:
    """Print a report and keep it as `results/THEME-DATE.md`; with `keep` false, as one of a quick run, only print it."""
    path = RESULTS / f"{theme}-{date.today().isoformat()}.md"
    text = "\n\n".join([f"# {title}", f"{date.today().isoformat()}. {machine(*packages)}.", *parts]) + "\n"
    print(text)
    if keep:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        print(f"written to {path}")
    return path


def seconds(work: Callable[[], Any], times: int) -> list[float]:
    """What each of so many runs of `work` took, after one that does not count."""
    work()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return found
