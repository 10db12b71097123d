"""JSON lists and JSON Lines, a record at a time. A file that cannot be read to its end is an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tagstore.errors import InvalidInput, MissingExtra, NotFound
from tagstore.readers.tables import Lines, json_objects, open_text
from tagstore.types import Rejected

_JSON_BUFFER = 1 << 16
"""Bytes of a JSON list that are parsed at a time."""


def read_list(path: Path) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON list, numbered from 0, without holding all of them."""
    try:
        import ijson  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtra("reading a JSON list needs ijson: pip install 'tagstore[server]'") from error
    try:
        with path.open("rb") as file:
            start = file.read(1 << 16)
            body = start.removeprefix(b"\xef\xbb\xbf")
            if not body.lstrip().startswith(b"["):
                raise InvalidInput(
                    f"{path} is no JSON list: LLaVA's format is a list of records, [{{...}}, ...], "
                    "or .jsonl with a record a line"
                )
            file.seek(len(start) - len(body))
            yield from enumerate(ijson.items(file, "item", use_float=True, buf_size=_JSON_BUFFER))
    except OSError as error:
        raise NotFound(f"cannot read {path}: {error.strerror}") from error
    except ijson.JSONError as error:
        problem = " ".join(str(error).split())
        cut_off = "EOF" in problem or "incomplete" in problem.lower()
        raise InvalidInput(
            f"{path} ends before its list does" if cut_off else f"{path} is no JSON: {problem}"
        ) from error


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file with the numbers of their lines, from 1.

    Raises `NotFound` if there is no such file, `InvalidInput` for a line that is no JSON object.
    """
    if not path.exists():
        raise NotFound(f"cannot read {path}: no such file")
    with open_text(path, newline="\n") as text:
        lines = Lines(text)
        for number, record in json_objects(path, lines):
            if isinstance(record, Rejected):
                raise InvalidInput(f"{path}, line {number}: {record.reason}")
            yield number, record
        if lines.trouble:
            raise InvalidInput(f"{path}, line {lines.number + 1}: {lines.trouble.partition(':')[0]}")
