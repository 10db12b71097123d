"""Processes of a benchmark: commands and servers of `tagstore`, and the CPU and memory they use."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
"""A second, in /proc/PID/stat."""


def tagstore(command: str, *arguments: object) -> list[str]:
    """The command line of `tagstore COMMAND`, words of the command separated by blanks."""
    return [sys.executable, "-m", "tagstore.cli", *command.split(), *map(str, arguments)]


def start_server(root: Path, *options: str, **popen: Any) -> subprocess.Popen[str]:
    """Start `tagstore serve`. It prints its address as its first line when it is ready."""
    command = tagstore("serve --address 127.0.0.1:0 --device cpu --root", root, *options)
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **popen)


@contextmanager
def running_server(root: Path, *options: str, **popen: Any) -> Iterator[tuple[str, int]]:
    """Run `tagstore serve`; gives its address and process id."""
    process = start_server(root, *options, **popen)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            code = process.wait()
            raise RuntimeError(f"`tagstore serve {' '.join(options)}` ended with {code} before it was ready")
        yield address, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def process_tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    lists = [(task / "children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    children = [int(child) for line in lists for child in line.split()]
    return [pid, *(descendant for child in children for descendant in process_tree(child))]


def cpu_seconds(*pids: int) -> float:
    """User and system seconds of processes and their descendants."""
    ticks = 0
    for pid in (descendant for root in pids for descendant in process_tree(root)):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / CLOCK_TICKS


def memory_mib(pid: int | str = "self") -> tuple[float, float]:
    """Resident MiB of a process: private memory, and pages of files that it maps."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    return kib["RssAnon"] / 1024, (kib["RssFile"] + kib["RssShmem"]) / 1024


def private_mib(pid: int) -> float:
    """Private MiB of a process and its descendants."""
    return sum(memory_mib(descendant)[0] for descendant in process_tree(pid))


def drop_from_page_cache(root: Path) -> None:
    """Ask the kernel to forget the pages of all files under a folder. Pages that a process maps stay."""
    for path in root.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
