"""Reports: printed, and kept in `benchmarks/results/` with machine, versions and date."""

from __future__ import annotations

import argparse
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


def arguments_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose `--help` shows a module's docstring as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def machine(*packages: str) -> str:
    """Processor, cores, Python, versions of packages and commit, in one line."""
    processors = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in processors if line.startswith("model name")), "")
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=RESULTS, capture_output=True, text=True, check=False).stdout.strip()
    versions = [f"{package} {version(package)}" for package in packages]
    python = f"Python {platform.python_version()}"
    machine = [model or platform.machine(), f"{os.cpu_count()} cores"]
    return ", ".join([*machine, python, *versions, f"commit {commit}"])


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def write(
    theme: str,
    title: str,
    *parts: str,
    packages: Sequence[str] = (),
    keep: bool = True,
    path: Path | None = None,
) -> Path:
    """Print a report and, unless `keep` is false, write it to a path, by default `results/THEME-DATE.md`."""
    path = path or RESULTS / f"{theme}-{date.today().isoformat()}.md"
    text = "\n\n".join([f"# {title}", f"{date.today().isoformat()}. {machine(*packages)}.", *parts]) + "\n"
    print(text)
    if keep:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        print(f"written to {path}")
    return path


def seconds(work: Callable[[], Any], times: int) -> list[float]:
    """Seconds of each of `times` runs of `work`, after a run that does not count."""
    work()
    durations = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        durations.append(time.perf_counter() - start)
    return durations
