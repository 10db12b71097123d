"""A store's vocabulary: stop list, synonyms, minimum count, idf, and the difference of two versions.

All of it works on tags and counts alone, so a change makes a new version of a store without embedding
anything again.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from importlib.resources import files
from math import log
from pathlib import Path

from tagstore.errors import InvalidInput, NotFound
from tagstore.mining.merging import MergedTag
from tagstore.types import KINDS, Kind

_SCRIPTS = {
    "CJK": "Hani", "HIRAGANA": "Jpan", "KATAKANA": "Jpan", "HANGUL": "Kore", "CYRILLIC": "Cyrl",
    "ARABIC": "Arab", "GREEK": "Grek", "HEBREW": "Hebr", "DEVANAGARI": "Deva", "THAI": "Thai",
    "BENGALI": "Beng", "TAMIL": "Taml", "ARMENIAN": "Armn", "GEORGIAN": "Geor",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Record:
    """A tag of a vocabulary and how many entries carry it."""

    text: str
    kind: Kind
    count: int


@dataclass(frozen=True)
class Rules:
    """Which tags a store leaves out, and how it names the others. Equal `digest`s mean equal treatment."""

    stop: frozenset[tuple[str, str]] = frozenset()
    """`(kind, canonical)`; kind "" is every kind."""
    synonyms: Mapping[str, str] = field(default_factory=dict)
    """Canonical form to preferred form."""
    minimum: int = 1
    """Entries that must carry a tag for it to be kept."""

    @property
    def digest(self) -> str:
        """12 hex digits of a sha256 over all fields."""
        lines = [
            f"minimum {self.minimum}",
            *(f"stop {k}:{t}" for k, t in sorted(self.stop)),
            *(f"{a}\t{b}" for a, b in sorted(self.synonyms.items())),
        ]
        return sha256("\n".join(lines).encode()).hexdigest()[:12]

    @cached_property
    def _longest(self) -> int:
        return max((len(variant.split()) for variant in self.synonyms), default=0)

    def stopped(self, kind: str, canonical: str) -> bool:
        """Whether the stop list holds a tag."""
        return ("", canonical) in self.stop or (kind, canonical) in self.stop

    def preferred(self, kind: str, canonical: str) -> str:
        """The canonical form under which a store keeps a tag; synonyms are replaced within phrases too."""
        if kind not in ("object", "attribute", "relation"):
            return self.synonyms.get(canonical, canonical)
        words, out, i = canonical.split(), [], 0
        while i < len(words):
            for n in range(min(self._longest, len(words) - i), 0, -1):
                name = self.synonyms.get(" ".join(words[i : i + n]))
                if name is not None:
                    out.append(name)
                    i += n
                    break
            else:
                out.append(words[i])
                i += 1
        return " ".join(out)

    def apply(self, tags: Iterable[MergedTag]) -> tuple[MergedTag, ...]:
        """Apply synonyms and stop list to the tags of an entry, and merge those that become equal.

        The minimum count is not applied here: see `rare`.
        """
        kept: dict[tuple[str, str], MergedTag] = {}
        for tag in tags:
            canonical = self.preferred(tag.kind, tag.canonical)
            if self.stopped(tag.kind, tag.canonical) or self.stopped(tag.kind, canonical):
                continue
            text = tag.text if canonical == tag.canonical else canonical
            same = kept.get((tag.kind, canonical))
            if same is None:
                kept[tag.kind, canonical] = MergedTag(
                    text, tag.kind, canonical, tag.score, tag.count, tag.provenance
                )
            else:
                surface = text if tag.count > same.count else same.text
                score, count = max(tag.score, same.score), tag.count + same.count
                kept[tag.kind, canonical] = MergedTag(
                    surface, tag.kind, canonical, score, count, same.provenance + tag.provenance
                )
        return tuple(kept.values())


def load_rules(
    stoplist: str | Path | None = None, synonyms: str | Path | None = None, minimum: int = 1
) -> Rules:
    """Rules from a stop list and a synonym file; None takes the shipped one, "" none at all.

    Raises `NotFound` for a missing file, `InvalidInput` (with file and line) for one that cannot be read.
    """
    if minimum < 1:
        raise InvalidInput(f"the minimum count is {minimum}: give at least 1")
    stop = _stoplist(*_lines(stoplist, "stoplist.txt"))
    return Rules(stop, _synonyms(*_lines(synonyms, "synonyms.tsv")), minimum)


def rare(records: Iterable[Record], rules: Rules) -> frozenset[tuple[str, str]]:
    """`(kind, text)` of the tags that fewer entries carry than the rules ask for."""
    return frozenset((record.kind, record.text) for record in records if record.count < rules.minimum)


def idf(count: int, entries: int) -> float:
    """Inverse document frequency, smoothed: ln((1 + entries) / (1 + count)) + 1; at least 1."""
    if not 0 <= count <= entries:
        raise InvalidInput(f"{count} of {entries} entries cannot carry a tag")
    return log((1 + entries) / (1 + count)) + 1


def language(text: str) -> str:
    """The BCP 47 tag of a text's script: "en" for Latin, "und-Cyrl" and the like, "zxx" without letters."""
    scripts: Counter[str] = Counter()
    for c in text:
        if c.isalpha():
            name = unicodedata.name(c, "").split(" ", 1)[0].split("-", 1)[0]
            scripts[
                "Latn" if name in ("LATIN", "FULLWIDTH") or c.isascii() else _SCRIPTS.get(name, "Zyyy")
            ] += 1
    if not scripts:
        return "zxx"
    script = scripts.most_common(1)[0][0]
    return "en" if script == "Latn" else f"und-{script}"


@dataclass(frozen=True, slots=True)
class Summary:
    """The size of a vocabulary, with its most and least frequent tags."""

    unique: int
    total: int
    """Counts summed."""
    kinds: Mapping[Kind, tuple[int, int]]
    """Of each kind: unique tags, counts summed."""
    once: int
    """Tags that a single entry carries."""
    head: tuple[Record, ...]
    """The most frequent, first the most frequent."""
    tail: tuple[Record, ...]
    """The least frequent, first the least frequent."""


def summarise(records: Iterable[Record], n: int = 20) -> Summary:
    """Head, tail and kinds of a vocabulary; ties in order of the alphabet."""
    ordered = sorted(records, key=lambda r: (-r.count, r.text, r.kind))
    kinds: dict[Kind, tuple[int, int]] = {}
    for kind in KINDS:
        counts = [r.count for r in ordered if r.kind == kind]
        if counts:
            kinds[kind] = len(counts), sum(counts)
    tail = sorted(ordered, key=lambda r: (r.count, r.text, r.kind))[:n]
    once = sum(r.count == 1 for r in ordered)
    return Summary(len(ordered), sum(r.count for r in ordered), kinds, once, tuple(ordered[:n]), tuple(tail))


@dataclass(frozen=True, slots=True)
class Difference:
    """What changed from one version's vocabulary to another's."""

    new: tuple[Record, ...]
    """With their counts in the later version, most frequent first."""
    vanished: tuple[Record, ...]
    """With their counts in the earlier version, most frequent first."""
    changed: tuple[tuple[Record, int], ...]
    """Tags of both with another count: the later record and by how much it changed, largest change first."""


def compare(before: Iterable[Record], after: Iterable[Record]) -> Difference:
    """New, vanished and changed tags between two vocabularies; a tag is its kind and text."""
    old = {(r.kind, r.text): r for r in before}
    now = {(r.kind, r.text): r for r in after}
    changed = [
        (r, r.count - old[key].count) for key, r in now.items() if key in old and r.count != old[key].count
    ]
    return Difference(
        new=_by_count(r for key, r in now.items() if key not in old),
        vanished=_by_count(r for key, r in old.items() if key not in now),
        changed=tuple(sorted(changed, key=lambda c: (-abs(c[1]), c[0].text, c[0].kind))),
    )


def _by_count(records: Iterable[Record]) -> tuple[Record, ...]:
    return tuple(sorted(records, key=lambda r: (-r.count, r.text, r.kind)))


def _lines(path: str | Path | None, shipped: str) -> tuple[str, list[tuple[int, str]]]:
    """The file's name for messages, and its lines with their numbers, without comments and empty ones."""
    if path == "":
        return "", []
    try:
        text = (files("tagstore.mining").joinpath("data", shipped) if path is None else Path(path)).read_text(
            encoding="utf-8"
        )
    except FileNotFoundError as error:
        raise NotFound(f"no file '{path}'") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not UTF-8 text (byte {error.start})") from error
    lines = ((number, line.split("#", 1)[0].rstrip()) for number, line in enumerate(text.splitlines(), 1))
    return str(path or shipped), [(number, line) for number, line in lines if line.strip()]


def _stoplist(name: str, lines: Sequence[tuple[int, str]]) -> frozenset[tuple[str, str]]:
    stop = set()
    for number, line in lines:
        kind, colon, text = (part.strip() for part in line.casefold().partition(":"))
        if colon and kind not in KINDS:
            raise InvalidInput(
                f"{name}, line {number}: '{kind}' is no kind of tag; there are {', '.join(KINDS)}"
            )
        stop.add((kind, text) if colon else ("", kind))
    return frozenset(stop)


def _synonyms(name: str, lines: Sequence[tuple[int, str]]) -> dict[str, str]:
    preferred: dict[str, str] = {}
    for number, line in lines:
        parts = [" ".join(part.casefold().split()) for part in line.split("\t")]
        if len(parts) != 2 or not all(parts):
            raise InvalidInput(
                f"{name}, line {number}: expected a variant, one TAB and the preferred form, got {line!r}"
            )
        if preferred.setdefault(parts[0], parts[1]) != parts[1]:
            raise InvalidInput(
                f"{name}, line {number}: '{parts[0]}' already stands for '{preferred[parts[0]]}'"
            )
    resolved = {}
    for variant in preferred:
        end, path = variant, [variant]
        while (following := preferred.get(end)) is not None and following != end:
            if following in path:
                raise InvalidInput(f"{name}: synonyms run in a circle: {' -> '.join([*path, following])}")
            path.append(end := following)
        if end != variant:
            resolved[variant] = end
    return resolved
