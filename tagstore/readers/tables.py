"""Tables as text: CSV, TSV and JSON Lines, also gzipped, always UTF-8.

A bad row is rejected, the rest goes on.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from tagstore.errors import InvalidInput
from tagstore.readers.image_files import MAX_IMAGE_BYTES
from tagstore.readers.records import Options, choose_columns, row_to_pair
from tagstore.readers.values import rejected
from tagstore.types import Pair, Rejected

_WINDOW = 100
"""Records at the beginning of a JSON Lines file whose fields are taken for those of all."""
_WINDOW_CHARACTERS = 8_000_000
"""Characters after which the window ends, if its records are large."""
_UNREADABLE = (OSError, EOFError, zlib.error)
_ENCODING = "not UTF-8: say --encoding latin-1 for example, or convert the file"


def read_csv(file: Path, options: Options) -> Iterator[Pair | Rejected]:
    """A table whose first line names the columns; fields may be quoted and hold line breaks."""
    csv.field_size_limit(2 * options.max_image_bytes)  # a field may hold an image in base64
    # strict, for otherwise a quote left open in the last column swallows the rows after it as one long
    # caption
    delimiter = options.layout.delimiter or _delimiter(file, options.layout.encoding)
    return _read_rows(file, options, lambda lines: csv.reader(lines, delimiter=delimiter, strict=True))


def read_tsv(file: Path, options: Options) -> Iterator[Pair | Rejected]:
    """As CSV with tabs, but a line is a row.

    Captions that begin with a quotation mark are common in such files, quoted line breaks are not.
    """
    return _read_rows(
        file,
        options,
        lambda lines: ([_unquoted(field) for field in line.rstrip("\r\n").split("\t")] for line in lines),
    )


def read_jsonl(file: Path, options: Options) -> Iterator[Pair | Rejected]:
    """An object a line. The image is a path relative to the file, or base64."""
    with open_text(file, newline="\n", encoding=options.layout.encoding) as text:
        lines = Lines(text, options.max_image_bytes)
        records = json_objects(file, lines)
        window: list[tuple[int, dict[str, Any] | Rejected]] = []
        for numbered in records:
            window.append(numbered)
            if len(window) == _WINDOW or lines.characters > _WINDOW_CHARACTERS:
                break
        names = dict.fromkeys(name for _, record in window if isinstance(record, dict) for name in record)
        if not names:
            reasons = (record.reason for _, record in window if isinstance(record, Rejected))
            raise InvalidInput(f"{file}: {next(reasons, lines.trouble) or 'empty'}")
        chosen = choose_columns(options, names, str(file))
        for number, record in chain(window, records):
            if isinstance(record, Rejected):
                yield record
            else:
                yield row_to_pair(record, chosen, file, number, options)
        if lines.trouble:
            yield _rejected(file, lines.number + 1, lines.trouble)


def json_objects(file: Path, lines: Lines) -> Iterator[tuple[int, dict[str, Any] | Rejected]]:
    """The objects of a JSON Lines file with the numbers of their lines, from 1; blank lines are skipped."""
    for line in lines:
        number = lines.number
        if number == 1 and line.lstrip().startswith("["):
            raise InvalidInput(
                f"{file}: a JSON array, not JSON Lines (one object a line): convert it, "
                "with jq -c '.[]' for example"
            )
        if not line.strip():
            continue
        if _not_utf8(line):
            yield number, _rejected(file, number, _ENCODING)
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, _rejected(file, number, f"not JSON: {error}")
            continue
        if isinstance(value, dict):
            yield number, value
        else:
            reason = f"not a JSON object: it is of type {type(value).__name__}"
            yield number, _rejected(file, number, reason)


class Lines:
    """The lines of a text, none longer than an image in base64.

    Where the text cannot be read on, iteration stops and `trouble` says why.
    """

    def __init__(self, text: IO[str], max_image_bytes: int = MAX_IMAGE_BYTES) -> None:
        self._text = text
        self._limit = max_image_bytes * 4 // 3 + 2**20
        self.number = 0
        """Lines read so far."""
        self.characters = 0
        """Characters read so far."""
        self.trouble = ""

    def __iter__(self) -> Iterator[str]:
        while True:
            try:
                line = self._text.readline(self._limit)
            except _UNREADABLE as error:
                self.trouble = (
                    f"damaged or cut off: what came before line {self.number + 1} is used ({error})"
                )
                return
            if len(line) == self._limit:
                self.trouble = (
                    f"larger than the limit: line {self.number + 1} has more than {self._limit:,} "
                    "characters, what came before is used"
                )
                return
            if not line:
                return
            self.number += 1
            self.characters += len(line)
            yield line


def _delimiter(file: Path, encoding: str) -> str:
    """What stands most often in the first line of a CSV; a comma if nothing of the kind does."""
    with open_text(file, encoding=encoding) as text:
        try:
            line = text.readline(1 << 16)
        except _UNREADABLE:
            return ","
    return max(",;\t|", key=line.count)


def open_text(file: Path, *, newline: str = "", encoding: str = "") -> IO[str]:
    """Open a text file, gzipped if its name says so.

    Args:
        newline: what ends a line: "\\n" for JSON Lines, "" also for a carriage return.

    Raises `InvalidInput` if it cannot be read or is not UTF-8.
    """
    opener: Any = gzip.open if file.name.endswith(".gz") else open
    try:
        with opener(file, "rb") as raw:
            head = raw.read(4)
    except _UNREADABLE as error:
        raise InvalidInput(f"{file}: cannot be read ({error})") from None
    if not encoding and head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        raise InvalidInput(
            f"{file}: UTF-16 or UTF-32, and UTF-8 is expected: convert it, "
            "with iconv -f utf-16 -t utf-8 for example, or say --encoding utf-16"
        )
    try:
        codecs.lookup(encoding or "utf-8")
    except LookupError:
        raise InvalidInput(f"no encoding '{encoding}': utf-8, latin-1, cp1252, utf-16 are some") from None
    # Bytes that are no UTF-8 become lone surrogates, so that the row they stand in is rejected and not the
    # file.
    return cast(
        "IO[str]",
        opener(file, "rt", encoding=encoding or "utf-8-sig", errors="surrogateescape", newline=newline),
    )


def _read_rows(
    file: Path, options: Options, parse: Callable[[Lines], Iterator[list[str]]]
) -> Iterator[Pair | Rejected]:
    with open_text(file, encoding=options.layout.encoding) as text:
        lines = Lines(text, options.max_image_bytes)
        rows = parse(lines)
        header = _header(file, lines, rows)
        chosen = choose_columns(options, header, f"{file} (its first line names the columns)")
        while True:
            number = lines.number + 1
            try:
                row = next(rows)
            except StopIteration:
                break
            except csv.Error as error:
                where = f"lines {number} to {lines.number}"
                reason = f"not CSV: {error} in {where}, is a quote left open or not doubled?"
                yield _rejected(file, number, reason)
                continue
            if not any(row):
                continue
            if any(map(_not_utf8, row)):
                yield _rejected(file, number, _ENCODING)
            elif len(row) != len(header):
                reason = f"wrong number of fields: the row has {len(row)}, the first line names {len(header)}"
                yield _rejected(file, number, reason)
            else:
                yield row_to_pair(dict(zip(header, row, strict=True)), chosen, file, number, options)
        if lines.trouble:
            yield _rejected(file, lines.number + 1, lines.trouble)


def _header(file: Path, lines: Lines, rows: Iterator[list[str]]) -> list[str]:
    """The names of the columns, from the first line."""
    try:
        header = [name.strip() for name in next(rows, [])]
    except csv.Error as error:
        raise InvalidInput(f"{file}: not a table ({error})") from None
    if not any(header) or lines.trouble:
        raise InvalidInput(
            f"{file}: {lines.trouble or 'empty, not even a line with the names of the columns'}"
        )
    if len(set(header)) < len(header):
        raise InvalidInput(f"{file}: two columns have the same name ({', '.join(header)}): rename one")
    return header


def _unquoted(field: str) -> str:
    """The field without the quotation marks that pandas and spreadsheets put around it as a whole."""
    return field[1:-1].replace('""', '"') if re.fullmatch(r'"([^"]|"")*"', field) else field


def _not_utf8(text: str) -> bool:
    return not text.isascii() and re.search("[\udc80-\udcff]", text) is not None


def _rejected(file: Path, number: int, reason: str) -> Rejected:
    return rejected(f"{file.name}:{number}", reason, f"{file}:{number}")
