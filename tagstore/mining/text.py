"""Captions from the web made fit for a parser; each character keeps its offset in the original."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from html import unescape

# A caption without any of these is plain words, and cleaning it is skipped.
_UNCLEAN = re.compile(
    r"[^\x20-\x7e]|[&#@_<>|\\*~`]|  |^ | $|://|www\.|\.[jpgtwb]\w{2,3}\b|\d(?:mm|s)\b|\b[fF]/"
)
_BOILERPLATE_WORDS = frozenset(
    {
        "stock", "royalty", "copyright", "credit", "courtesy", "photo", "photos", "photograph", "photographs",
        "photographed", "picture", "pictures", "pic", "pics", "image", "images", "shot", "shots", "taken",
        "view", "views", "close", "close-up", "closeup", "snapshot", "snapshots", "photography",
        "illustration", "illustrations", "drawing", "drawings", "painting", "paintings", "portrait",
        "portraits", "getty", "shutterstock", "istock", "istockphoto", "alamy", "dreamstime", "adobe", "iso",
        "canon", "nikon", "(c)", "royalty-free", "stock-photo", "rights-managed",
    }
)  # fmt: skip
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_ASCII_EQUIVALENTS = {
    "‘": "'",
    "’": "'",
    "‛": "'",
    "“": '"',
    "”": '"',
    "„": '"',
    "–": "-",
    "—": " - ",
    "‐": "-",
    "‑": "-",
    "…": "...",
}

_PICTURE = (
    r"(?:pictures?|pics?|photos?|photographs?|photography|images?|snapshots?|shots?|views?|close[- ]?ups?|"
    r"portraits?|illustrations?|"
    r"drawings?|paintings?)"
)
_KIND_OF = (
    r"(?:black[- ]and[- ]white|b&w|colou?r(?:ed|ful)?|sepia|close[- ]?up|up[- ]close|aerial|overhead|"
    r"blurry|blurred|beautiful|great|nice|"
    r"good|pretty|cute|old|vintage|antique|digital|wide|panoramic|side|front|rear|top|low|high|angle|night|candid|professional|dark|"
    r"small|large|big|interesting|strange|artistic|partial|full|clear|detailed|single|couple|set|"
    r"series|of|group|an?|time[- ]lapse|stock)"
)
_BOILERPLATE = re.compile(
    "|".join(
        (
            r"<[^<>]{0,200}>",  # markup
            r"(?:https?://|www\.)\S+",
            r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,64}(?:\.[\w-]{1,64}){1,4}",  # addresses
            r"(?<!\w)[@#][\w-]+",  # handles and hashtags
            r"(?<!\S)\S{1,120}\.(?:jpe?g|png|gif|tiff?|webp|bmp)\b",
            r"\b(?:IMG|DSC[NF]?|DCIM|PICT|P\d)_?\d{3,}\b",
            r"\b(?:royalty[- ]free|rights[- ]managed|hd|free)?[ -]*stock (?:footage|vectors?|"
            + _PICTURE
            + r")\b",
            r"\broyalty[- ]free(?: " + _PICTURE + r")?",
            r"\b(?:getty images|shutterstock|istock(?:photo)?|alamy|dreamstime|adobe stock)\b",
            r"(?:\(c\)|©|\bcopyright\b)[^.,;|]{0,60}",
            r"\b(?:photo|image|picture|photograph)s? (?:by|credit|courtesy)\b:?[^.;|]{0,60}",
            r"\b(?:shot|taken|photographed) (?:with|on|using) (?:an? |my )?"
            r"(?:canon|nikon|sony|fuji\w*|leica|olympus|pentax|panasonic|iphone)[^.,;|]{0,30}",
            r"\b(?:canon|nikon) (?:eos |powershot |coolpix )?[a-z]*\d\w*(?: mark [iv]+)?",
            r"\bISO[ -]?\d+\b|\bf/\d+(?:\.\d+)?|\b\d+(?:\.\d+)?mm\b|\b1/\d+ ?s(?:ec)?\b",
        )
    ),
    re.IGNORECASE,
)
_LEAD = re.compile(
    r"\s*(?:(?:this|here|it|there)\s?(?:is|'s|are)\s+)?(?:(?:an?|the|this|some|two|several)\s+)?(?:"
    + _KIND_OF
    + r"\s+){0,3}?"
    + _PICTURE
    + r"\s+(?:of|showing|depicting|with)\s+",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Clean:
    """A cleaned caption; character i stood at `starts[i]` to `ends[i]` of the original (None: unchanged)."""

    text: str
    starts: tuple[int, ...] | None = None
    ends: tuple[int, ...] | None = None

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The offsets of `text[start:end]` in the original."""
        if self.starts is None or self.ends is None:
            return start, end
        return (self.starts[start], self.ends[end - 1]) if start < end else (0, 0)


def clean(caption: str, max_chars: int) -> Clean:
    """Strip a caption's first `max_chars` characters of markup, links, hashtags and photo boilerplate.

    HTML entities are resolved, Unicode compatibility forms folded (NFKC), control characters and emoji
    dropped, runs of spaces reduced to one, and a caption in capitals is written in lower case.
    """
    caption = caption[:max_chars]
    if not _UNCLEAN.search(caption) and _BOILERPLATE_WORDS.isdisjoint(
        caption.lower().replace(":", " ").split()
    ):
        return Clean(_lower_if_all_capitals(caption))
    chars, starts, ends = _characters(caption)
    text = "".join(chars)
    text = _BOILERPLATE.sub(lambda match: " " * len(match.group()), text)
    if lead := _LEAD.match(text):
        text = " " * lead.end() + text[lead.end() :]
    keep = [i for i, c in enumerate(text) if c != " " or (i > 0 and text[i - 1] != " ")]
    if keep and text[keep[-1]] == " ":
        keep.pop()
    if keep and text[keep[0]] == " ":
        keep.pop(0)
    text = "".join(text[i] for i in keep)
    return Clean(_lower_if_all_capitals(text), tuple(starts[i] for i in keep), tuple(ends[i] for i in keep))


def _characters(caption: str) -> tuple[list[str], list[int], list[int]]:
    """The characters that are kept, each with its start and end in the original."""
    chars: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    start = 0
    while start < len(caption):
        match = _ENTITY.match(caption, start) if caption[start] == "&" else None
        end = match.end() if match else start + 1
        raw = unescape(caption[start:end]) if match else caption[start]
        for c in raw:
            for plain in _printable(c):
                chars.append(plain)
                starts.append(start)
                ends.append(end)
        start = end
    return chars, starts, ends


def _printable(c: str) -> str:
    """The printable text for a character: itself, its plain equivalent, a space, or nothing."""
    if "\x20" <= c <= "\x7e":
        return c
    if c in _ASCII_EQUIVALENTS:
        return _ASCII_EQUIVALENTS[c]
    folded = unicodedata.normalize("NFKC", c)
    category = unicodedata.category(folded[0]) if folded else "Cn"
    if category in ("Cf", "Mn", "Me") and c != "\u00ad":
        # zero-width marks vanish; a combining accent that NFKC could not join is kept with its letter
        return folded if category == "Mn" else ""
    if category[0] in "CZ" or category in ("So", "Sk") or category == "Cs":
        return " "
    return folded


def _lower_if_all_capitals(text: str) -> str:
    if (
        text.isupper()
        and text.count(" ") >= 3
        and sum(map(str.isalpha, text)) > 12
        and len(text.lower()) == len(text)
    ):
        return text.lower()
    return text
