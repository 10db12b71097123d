"""A log of writes and refusals as JSON lines: caller, address, method, store and outcome.

A write is recorded as begun before anything is done, and is refused if that fails.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from tagstore.errors import WriteFailed

log = logging.getLogger(__name__)

MAX_TEXT = 256
"""Characters of a value; callers choose the names of stores, and reasons repeat them."""


class Audit:
    """Appends to a file, one line per write, so that workers can share it. A path of None keeps no log."""

    def __init__(self, path: str | Path | None) -> None:
        try:
            self._file = (
                os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600) if path else -1
            )
        except OSError as error:
            raise WriteFailed(f"the audit log {path} cannot be written: {error.strerror}") from error

    def begun(self, **event: str) -> None:
        """Record that an action begins. Raises `WriteFailed`: an action must not go unrecorded."""
        try:
            self._write("begun", event)
        except OSError as error:
            raise WriteFailed(
                f"the audit log cannot be written ({error.strerror}), so nothing was done: free its disk"
            ) from error

    def end(self, outcome: str, **event: str) -> None:
        """Record an outcome: "done", "failed" or "refused". It stands, so a failure only goes to the log."""
        try:
            self._write(outcome, event)
        except OSError as error:
            log.error("the audit log cannot be written (%s): %s %s", error.strerror, outcome, _cut(event))

    def _write(self, outcome: str, event: Mapping[str, str]) -> None:
        if self._file < 0:
            return
        record = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "process": os.getpid(),
            "event": outcome,
            **_cut(event),
        }
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        if os.write(self._file, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _cut(event: Mapping[str, str]) -> dict[str, str]:
    """Cut the values of an event to a bounded length."""
    return {
        name: value if len(value) <= MAX_TEXT else f"{value[:MAX_TEXT]}... ({len(value)} characters)"
        for name, value in event.items()
    }
