"""Tags from lists of keywords, in the captions or in a column."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tagstore.errors import InvalidInput
from tagstore.plain_text import is_missing
from tagstore.types import Pair, Tag

MAX_TAG_CHARS = 80
"""Characters of a keyword; a longer one gives no tag."""


class KeywordMiner:
    """Custom tags from keywords: "beach, sunset, palm tree".

    `column`: the metadata column with the keywords, a list or a text; without one, the captions are the
    lists. `separator`: the text between two keywords. `max_chars`: characters of a caption that are read.
    """

    name = "keywords"
    version = "1"

    def __init__(self, *, column: str = "", separator: str = ",", max_chars: int = 20_000) -> None:
        if not separator:
            raise InvalidInput(
                "separator is empty: give what stands between two keywords, such as ',' or '|'"
            )
        self._column, self._separator, self._max_chars = column, separator, max_chars
        self.settings: Mapping[str, Any] = {"column": column, "max_chars": max_chars, "separator": separator}

    def mine(self, pairs: Iterable[Pair]) -> Iterator[tuple[Tag, ...]]:
        """One tuple a pair, no look-ahead."""
        for pair in pairs:
            yield tuple(self._of_column(pair) if self._column else self._of_captions(pair))

    def _of_column(self, pair: Pair) -> Iterator[Tag]:
        value = pair.metadata.get(self._column, "")
        parts = value if isinstance(value, (list, tuple)) else str(value).split(self._separator)
        for text in dict.fromkeys(" ".join(str(part).split()).lstrip("#") for part in parts):
            if _is_tag(text):
                yield Tag(text, "custom", (0, 0), -1, 1.0, text.casefold(), self._column)

    def _of_captions(self, pair: Pair) -> Iterator[Tag]:
        for number, caption in enumerate(pair.captions):
            if not isinstance(caption, str) or is_missing(caption):
                continue
            start = 0
            for part in caption[: self._max_chars].split(self._separator):
                text = part.strip().lstrip("#").strip()
                if _is_tag(text):
                    first = start + part.index(text)
                    span = first, first + len(text)
                    yield Tag(text, "custom", span, number, 1.0, " ".join(text.casefold().split()))
                start += len(part) + len(self._separator)


def _is_tag(text: str) -> bool:
    return 0 < len(text) <= MAX_TAG_CHARS and any(c.isalnum() for c in text)
