"""Preference pairs as a Parquet file in the layout of TRL's preference data with pictures.

Columns `images`, `prompt`, `chosen`, `rejected` are what TRL's `DPOTrainer` reads; `key`, `true` and `absent`
say which sample a pair is of and which tag was exchanged for which. `datasets` decodes the pictures: the
file's metadata say that they are some.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from tagstore.preferences.swaps import Swap
from tagstore.readers.samples import Turn

_ROW_GROUP_BYTES = 32 << 20
"""Bytes of pictures after which rows are written."""
_ROW_GROUP_ROWS = 1024
"""Rows after which they are written."""

_PART = pa.struct({"type": pa.string(), "text": pa.string()})
_MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.list_(_PART)}))
_TEXT = {"dtype": "string", "_type": "Value"}
_MESSAGE_FEATURE = [{"role": _TEXT, "content": [{"type": _TEXT, "text": _TEXT}]}]
_FEATURES = {
    "images": [{"_type": "Image"}],
    "prompt": _MESSAGE_FEATURE,
    "chosen": _MESSAGE_FEATURE,
    "rejected": _MESSAGE_FEATURE,
    "key": _TEXT,
    "true": _TEXT,
    "absent": _TEXT,
}
"""The columns as `datasets` describes them, in the form that all of its versions read."""
_SCHEMA = pa.schema(
    {
        "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "prompt": _MESSAGES,
        "chosen": _MESSAGES,
        "rejected": _MESSAGES,
        "key": pa.string(),
        "true": pa.string(),
        "absent": pa.string(),
    },
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)


@dataclass(frozen=True, slots=True)
class Row:
    """A preference pair."""

    key: str
    image: bytes
    turns: tuple[Turn, ...]
    """Of the prompt."""
    chosen: str
    swap: Swap


class PreferenceTable:
    """A Parquet file that rows are added to; complete when it is closed."""

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, _SCHEMA)
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def add(self, row: Row) -> None:
        """Add a pair."""
        self._rows.append(
            {
                "images": [{"bytes": row.image, "path": None}],
                "prompt": _prompt(row.turns),
                "chosen": [_message("assistant", row.chosen)],
                "rejected": [_message("assistant", row.swap.text)],
                "key": row.key,
                "true": row.swap.true,
                "absent": row.swap.absent,
            }
        )
        self._bytes += len(row.image)
        if self._bytes > _ROW_GROUP_BYTES or len(self._rows) == _ROW_GROUP_ROWS:
            self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=_SCHEMA))
        self._rows, self._bytes = [], 0


def _prompt(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The messages of a prompt. A picture stands where its sample has it, or else first of all."""
    placed = any(turn.pictures for turn in turns)
    messages = []
    for number, turn in enumerate(turns):
        first_user = turn.role == "user" and all(before.role != "user" for before in turns[:number])
        places = turn.pictures if placed else ((0,) if first_user else ())
        messages.append(_message(turn.role, turn.text, places))
    return messages


def _message(role: str, text: str, pictures: Sequence[int] = ()) -> dict[str, Any]:
    parts: list[dict[str, str | None]] = []
    start = 0
    for offset in pictures:
        if offset > start:
            parts.append({"type": "text", "text": text[start:offset]})
        parts.append({"type": "image", "text": None})
        start = offset
    if start < len(text):
        parts.append({"type": "text", "text": text[start:]})
    return {"role": role, "content": parts}
