"""A log of writes and refusals, JSON Lines: who, from where, what, to which store, and what came of it."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tagstore.errors import WriteFailed


class Audit:
    """Appends to a file, one whole line a write, so that several workers can share it; None to keep no log."""

    def __init__(self, path: str | Path | None) -> None:
        try:
            self._file = (
                os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600) if path else -1
            )
        except OSError as error:
            raise WriteFailed(f"the audit log {path} cannot be written: {error.strerror}") from error

    def write(self, **event: Any) -> None:
        """Add an event; its time and process are added here. Raises `WriteFailed`: what cannot be recorded should not be done."""
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
