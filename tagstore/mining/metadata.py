"""Tags from the columns of a source: brand, colour, category."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from string import Formatter
from typing import Any

from tagstore.errors import InvalidInput
from tagstore.types import Pair, Tag

MAX_TAG_CHARS = 80
"""Characters of a tag; a longer value is a text and gives no tag."""
COLUMN_SEARCH_PAIRS = 1000
"""Pairs in which a named column must appear at least once, or it is unknown."""

_MISSING_VALUES = frozenset({
    "", "na", "n/a", "nan", "none", "null", "nil", "-", "--", "?", "unknown", "other", "others", "undefined",
    "misc",
})  # fmt: skip


class MetadataMiner:
    """Custom tags from metadata: the values of columns, and templates over several columns.

    `columns`: names, as a list or joined by commas; without, every column whose value is a short text or a
    list of them. `templates`: like `{baseColour} {subCategory}`, one or a list; a template with a missing
    value gives nothing. `separator`: splits a value into several ("red|blue"); none unless given. A column
    that none of the first 1,000 pairs has is refused with `InvalidInput`: it is a typing mistake.
    """

    name = "metadata"
    version = "1"

    def __init__(
        self, *, columns: str | Sequence[str] = (), templates: str | Sequence[str] = (), separator: str = ""
    ) -> None:
        self._columns = _listed(columns)
        self._templates = [templates] if isinstance(templates, str) and templates else list(templates)
        self._separator = separator
        self._fields = {template: _fields(template) for template in self._templates}
        self.settings: Mapping[str, Any] = {
            "columns": self._columns,
            "separator": separator,
            "templates": self._templates,
        }

    def mine(self, pairs: Iterable[Pair]) -> Iterator[tuple[Tag, ...]]:
        """Tags of each pair, with caption -1 and no span; `label` is the column or the template."""
        missing = dict.fromkeys(
            [*self._columns, *(name for names in self._fields.values() for name in names)]
        )
        seen: dict[str, None] = {}
        pairs_read = 0
        for pair in pairs:
            pairs_read += 1
            if missing:
                seen.update(dict.fromkeys(pair.metadata))
                missing = {name: None for name in missing if name not in pair.metadata}
                if missing and pairs_read == COLUMN_SEARCH_PAIRS:
                    raise _unknown(missing, seen)
            yield tuple(self._tags(pair))
        if missing and pairs_read:
            raise _unknown(missing, seen)

    def _tags(self, pair: Pair) -> Iterator[Tag]:
        tags: dict[str, Tag] = {}
        for column in self._columns or ([] if self._templates else pair.metadata):
            value = pair.metadata.get(column)
            if value is True:
                value = column
            elif not self._columns and not _is_text(value):
                continue
            for text in self._values(value):
                tags.setdefault(text.casefold(), _tag(text, column))
        for template, names in self._fields.items():
            values = {name: next(iter(self._values(pair.metadata.get(name))), "") for name in names}
            if all(values.values()):
                text = " ".join(template.format_map(values).split())
                tags.setdefault(text.casefold(), _tag(text, template))
        yield from tags.values()

    def _values(self, value: Any) -> Iterator[str]:
        parts = value if isinstance(value, (list, tuple)) else [value]
        for part in parts:
            if isinstance(part, bool) or not isinstance(part, (str, int, float)):
                continue
            for text in str(part).split(self._separator) if self._separator else [str(part)]:
                text = " ".join(text.split())
                if (
                    text.casefold() not in _MISSING_VALUES
                    and len(text) <= MAX_TAG_CHARS
                    and not text.startswith(("http://", "https://", "www."))
                ):
                    yield text


def _tag(text: str, label: str) -> Tag:
    return Tag(text, "custom", (0, 0), -1, 1.0, text.casefold(), label)


def _is_text(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(_is_text(part) for part in value)
    return (
        isinstance(value, str) and any(c.isalpha() for c in value) and "/" not in value and "\\" not in value
    )


def _listed(columns: str | Sequence[str]) -> list[str]:
    names = columns.split(",") if isinstance(columns, str) else list(columns)
    return [name.strip() for name in names if name.strip()]


def _fields(template: str) -> list[str]:
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise InvalidInput(
            f"template '{template}': {error}. Write columns in braces, like '{{colour}} {{category}}'"
        ) from error
    names = [name for _, name, spec, conversion in parts if name is not None]
    if not names or any(
        not name or set(name) & set(".[") or spec or conversion
        for _, name, spec, conversion in parts
        if name is not None
    ):
        raise InvalidInput(
            f"template '{template}' needs plain column names in braces, like '{{colour}} {{category}}'"
        )
    return names


def _unknown(missing: Iterable[str], seen: Iterable[str]) -> InvalidInput:
    names = ", ".join(f"'{name}'" for name in missing)
    return InvalidInput(
        f"no pair has a column {names}: there are {', '.join(sorted(seen)) or 'no columns at all'}"
    )
