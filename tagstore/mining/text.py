"""Captions from the web made fit for a parser; each character keeps its offset in the original."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from html import unescape

# A caption without any of these is plain words, and cleaning it is skipped.
_UNCLEAN = re.compile(
    r"[^ -%'-;=?A-\[\]-^a-{}]|[#*]|  |^ | $|://|www\.|\.[jpgtwb]\w{2,3}\b|\d(?:mm|[spkK]\b|\d\d)|[fF]/|-\d+$"
)
_PICTURE_WORDS = frozenset({
    "photo", "photos", "photograph", "photographs", "picture", "pictures", "pic", "pics", "image", "images",
    "shot", "shots", "view", "views", "close", "close-up", "closeup", "snapshot", "snapshots", "photography",
    "illustration", "illustrations", "drawing", "drawings", "painting", "paintings", "portrait", "portraits",
    "thumbnail", "thumbnails", "screenshot", "screenshots", "graphic", "graphics", "icon", "icons", "vector",
    "vectors", "clipart", "rendering",
})  # fmt: skip
"""A caption may begin with one of these and "of"."""
_BOILERPLATE_WORDS = frozenset({
    "stock", "royalty", "copyright", "credit", "courtesy", "photographed", "taken", "captured", "getty",
    "shutterstock", "istock", "istockphoto", "alamy", "dreamstime", "adobe", "iso", "canon", "nikon", "sony",
    "fuji", "fujifilm", "leica", "olympus", "pentax", "panasonic", "lumix", "dji", "iphone", "(c)",
    "royalty-free", "stock-photo", "rights-managed", "wallpaper", "wallpapers", "desktop", "hd", "unsplash",
    "pexels", "pixabay", "freepik", "depositphotos", "click", "read", "untitled", "placeholder", "copy",
    "img", "dsc", "dscf", "dscn", "mvi", "featured", "download", "preview", "backgrounds",
})  # fmt: skip
"""A caption with one of these may hold boilerplate anywhere."""
_PAGE_PHRASES = frozenset({
    "open in new window", "opens in a new window", "open in new tab", "opens in a new tab", "back to top",
    "skip to content", "next slide", "previous slide", "load more", "show more", "learn more", "add to cart",
    "buy now", "sign up", "log in", "play video", "close menu", "open menu", "main menu", "loading", "logo",
    "banner", "avatar", "profile picture", "alt text", "caption", "default", "no image",
    "image", "photo", "picture", "hero image", "header image", "cover image", "banner image", "main image",
    "background image", "default image", "cover photo", "profile photo", "no image available",
})  # fmt: skip
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_ENCODED_TWICE = re.compile(r"(?:amp;)*((?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});)")
"""What follows "&amp;" where an entity was encoded again."""
MAX_WORD_CHARS = 45
"""Letters of a word; no English one has more, and a longer one is left out."""
_LONG_WORD = re.compile(rf"\w{{{MAX_WORD_CHARS + 1},}}")
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
    r"portraits?|illustrations?|drawings?|paintings?|"
    r"screenshots?|thumbnails?|clip ?arts?|vector graphics?|graphics?|icons?|renderings?)"
)
_KIND_OF = (
    r"(?:black[- ]and[- ]white|b&w|colou?r(?:ed|ful)?|sepia|close[- ]?up|up[- ]close|aerial|overhead|"
    r"blurry|blurred|beautiful|great|nice|"
    r"good|pretty|cute|old|vintage|antique|digital|wide|panoramic|side|front|rear|top|low|high|angle|night|candid|professional|dark|"
    r"small|large|big|interesting|strange|artistic|partial|full|clear|detailed|single|couple|set|"
    r"series|of|group|an?|time[- ]lapse|stock)"
)
_CAMERAS = (
    r"(?:canon|nikon|sony|fuji(?:film)?|leica|olympus|pentax|panasonic|lumix|dji|iphone|samsung galaxy|"
    r"google pixel|gopro)"
)
_AGENCIES = (
    r"(?:getty ?images?|shutterstock|i ?stock(?: ?photos?)?|alamy|dreamstime|adobe ?stock|unsplash|pexels|"
    r"pixabay|freepik|depositphotos|123rf|flickr)"
)
_BOILERPLATE = re.compile(
    "|".join(
        (
            r"<[^<>]{0,200}>",  # markup
            r"(?:https?://|www\.)\S+",
            r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,64}(?:\.[\w-]{1,64}){1,4}",  # addresses
            r"(?<!\w)[@#][\w-]+",  # handles and hashtags
            r"(?<!\S)\S{1,120}\.(?:jpe?g|png|gif|tiff?|webp|bmp|svg|heic|avif)\b",
            # names that cameras, phones and pages give their files
            r"\b_?(?:IMG|DSC[NF]?|_?MG|DCIM|C?IMG|PICT|MVI|GOPR|GP|SAM|PXL|VID|MOV|DJI|KIMG|HPIM|SANY|P\d)"
            r"[ _-]?\d{3,}(?:[ _-]\d+)*\b",
            r"\b(?:WP|IMG|VID|PXL|Screenshot|Screen Shot)[ _-]\d[\d_-]{6,}\d(?: at [\d.:]+(?: [AP]M)?)?"
            r"(?:_\w{1,6})*(?: of\b)?",
            r"\b(?:19|20)\d{6}[_-]\d{4,9}\b",
            r"\b(?:image|photo|picture|pic|untitled)[ _-]?\d{2,}\b",
            r"\b[a-z]+[-_](?:image|photo|picture)[-_]\d+\b",
            r"\b(?:(?:free|hd|[48]k|download|preview|desktop|mobile|phone|iphone|android|pc|beautiful|best|"
            r"ultra) )+(?:wallpapers?|backgrounds?)\b(?: of\b)?|^wallpapers?\b(?: of\b|:)",
            # sizes and qualities of the file
            r"\b\d{3,5} ?[x×] ?\d{3,5}(?: ?(?:px|pixels?))?\b|\b\d{2,5} ?(?:px|pixels?)\b",
            r"\b(?:240|360|480|720|1080|1440|2160)[pi]\b",
            r"\b[48]k(?= (?:wallpapers?|ultra|uhd|hd|video|stock)\b)",
            r"\b(?:full|ultra|qhd|fhd|uhd|hdtv|,| )*\b(?:hdtv|fhd|uhd|qhd|hd)\b(?! ?ready)",
            r"\b(?:royalty[- ]free|rights[- ]managed|hd|free)?[ -]*stock (?:footage|vectors?|"
            + _PICTURE
            + r")\b",
            r"\broyalty[- ]free(?: " + _PICTURE + r")?",
            r"\b(?:(?:on|via|from|at) )?" + _AGENCIES + r"\b",
            r"(?:\(c\)|©|\bcopyright\b)[^.,;|]{0,60}",
            r"\((?:photos?|images?|pictures?|credits?|source|via):? [^()]{0,60}\)",
            r"\b(?:photo|image|picture|photograph|illustration)s? (?:by|credit|courtesy)\b:?[^.:;|]{0,60}",
            r"\b(?:shot|taken|photographed|captured) (?:with|on|using|by) (?:an? |my |the )?"
            + _CAMERAS
            + r"[^.,:;|]{0,30}",
            r"\b(?:canon|nikon) (?:eos |powershot |coolpix )?[a-z]*\d\w*(?: mark [iv]+)?",
            r"\b(?:sony (?:alpha|a\d|dsc|ilce)|fuji(?:film)? (?:x-|finepix)|leica [mqs]\d|"
            r"olympus (?:om-?d|e-m)|pentax k|(?:panasonic )?lumix|dji (?:mavic|phantom|mini|air))[\w-]*"
            r"(?: [a-z]*\d\w*)*(?: [ivx]+\b)?(?: pro\b)?(?: drone(?: shot(?: of)?)?)?",
            r"\bISO[ -]?\d+\b|\bf/\d+(?:\.\d+)?|\b\d+(?:\.\d+)?mm\b|\b1/\d+ ?s(?:ec)?\b",
            # what a page says around its pictures
            r"\bclick (?:here )?(?:to|for) \w+(?: the| this)?(?: larger)? (?:image|picture|photo|view)s?\b",
            r"\bclick here\b|\bread more(?: about\b[^.;|]{0,60})?|\bcopy ?space\b|"
            r"^(?:featured image|placeholder(?: image)?|untitled)$",
        )
    ),
    re.IGNORECASE,
)
_DANGLING = " |:;,-/"
"""What may stand between a caption and the boilerplate at either end."""
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

    HTML entities are resolved, twice if they were encoded twice, Unicode compatibility forms folded (NFKC),
    control characters, emoji and words of more than `MAX_WORD_CHARS` dropped, runs of spaces reduced to one,
    and a caption in capitals is written in lower case.
    """
    caption = caption[:max_chars]
    lower = caption.lower()
    if lower.rstrip(".") in _PAGE_PHRASES:
        return Clean("")
    words = lower.replace(":", " ").replace("(", " ").replace(",", " ").split()
    plain = (
        _BOILERPLATE_WORDS.isdisjoint(words)
        and not _UNCLEAN.search(caption)
        and not _LONG_WORD.search(caption)
    )
    if plain and _PICTURE_WORDS.isdisjoint(words):
        return Clean(_lower_if_all_capitals(caption))
    chars, starts, ends = _characters(caption)
    text = whole = "".join(chars)
    if not plain or "by" in words or "(" in caption:
        text = _LONG_WORD.sub(_blank, _BOILERPLATE.sub(_blank, whole))
    if lead := _LEAD.match(text):
        text = " " * lead.end() + text[lead.end() :]
    if text != whole:  # what is left of the boilerplate's place in the sentence
        kept = text.rstrip(_DANGLING)
        kept = " " * (len(kept) - len(kept.lstrip(_DANGLING))) + kept.lstrip(_DANGLING)
        text = kept + " " * (len(text) - len(kept))
    keep = [i for i, c in enumerate(text) if c != " " or (i > 0 and text[i - 1] != " ")]
    if keep and text[keep[-1]] == " ":
        keep.pop()
    if keep and text[keep[0]] == " ":
        keep.pop(0)
    text = "".join(text[i] for i in keep)
    return Clean(_lower_if_all_capitals(text), tuple(starts[i] for i in keep), tuple(ends[i] for i in keep))


def _blank(match: re.Match[str]) -> str:
    return " " * len(match.group())


def _characters(caption: str) -> tuple[list[str], list[int], list[int]]:
    """The characters that are kept, each with its start and end in the original."""
    if caption.isascii() and caption.isprintable() and "&" not in caption:
        places = list(range(len(caption) + 1))
        return list(caption), places[:-1], places[1:]
    chars: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    start = 0
    while start < len(caption):
        match = _ENTITY.match(caption, start) if caption[start] == "&" else None
        end = match.end() if match else start + 1
        raw = unescape(caption[start:end]) if match else caption[start]
        if raw == "&" and match and (again := _ENCODED_TWICE.match(caption, end)):
            raw, end = unescape(f"&{again.group(1)}"), again.end()
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
