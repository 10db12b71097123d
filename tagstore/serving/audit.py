"""A log of writes and refusals as JSON lines: caller, address, method, store and outcome."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tagstore.errors import WriteFailed


class Audit:
    """Appends to a file, one line per write, so that workers can share it. A path of None keeps no log."""

    def __init__(self, path: str | Path | None) -> None:
        try:
            self._file = (
                os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600) if path else -1
            )
        except OSError as error:
            raise WriteFailed(f"the audit log {path} cannot be written: {error.strerror}") from error

    def write(self, **event: Any) -> None:
        """Add an event with its time and process. Raises `WriteFailed`: an action must not go unrecorded."""
        if self._file < 0:
            return
        event = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "process": os.getpid(),
            **event,
        }
        try:
            os.write(self._file, (json.dumps(event, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            raise WriteFailed(f"the audit log cannot be written: {error.strerror}") from error

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
