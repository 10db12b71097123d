"""Foreign text made plain: no control characters, none that hide or reorder others; and the bounds of tags.

For tags when they are mined, and for every text that a model or a terminal is given.
"""

from __future__ import annotations

import re

MAX_TAG_CHARS = 200
"""Characters of a tag, at most. The paper's tags have two words; longer ones are sentences, or attacks."""
MAX_ENTRY_TAGS = 1000
"""Tags of one entry, at most."""

_MISSING_TEXTS = frozenset({
    "nan", "none", "null", "nil", "n/a", "n.a.", "na", "#n/a", "<na>", "undefined", "-", "--", "---", "?",
    "no caption", "no description", "no alt text", "(null)", "(none)", "[null]",
})  # fmt: skip
"""What exports of tables write where there is nothing."""

_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
_UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f"  # control characters; a tab and a line's end stay
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks, embeddings and isolates of writing direction
    "\xad\u180e\u200b\u2060-\u2065\u206a-\u206f\ufeff\ufff9-\ufffb"  # of no width
    "\ud800-\udfff"  # halves of characters
    "\U000e0000-\U000e0fff]"  # copies of ASCII that nobody sees
)


def plain_text(text: str) -> str:
    """Remove control characters, and those that are not seen or change the direction of others.

    Lines and tabs stay, and so do the joiners of Persian words and of emoji.
    """
    if text.isascii() and text.isprintable():
        return text
    return _UNSEEN.sub("", _LINE_ENDS.sub("\n", text))


def one_line(text: str) -> str:
    """Make plain text of one line: runs of white space are one space."""
    return " ".join(plain_text(text).split())


def is_missing(caption: str) -> bool:
    """Whether a caption is what an export writes for none: "nan", "N/A", "null", "-"."""
    return len(caption) < 16 and caption.strip().casefold() in _MISSING_TEXTS
