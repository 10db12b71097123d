"""Gold labels joined with the captions of the data sets, and the score of a parser on them."""

from __future__ import annotations

import csv
import gzip
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from tagstore.mining.nouns import singular

GOLD = Path(__file__).parent / "gold"
KINDS = ("object", "attribute", "entity")
PLURALS = ("objects", "attributes", "entities")
PARTS = ("develop", "sealed", "fresh", "kinds", "kinds set aside")
"""The parts of the gold; the last two are the halves of `kinds.jsonl`, see `is_set_aside`."""


@dataclass(frozen=True)
class Label:
    """A caption and its wanted tags: for each kind a list of tuples of alternative, folded texts."""

    data: str
    """The data set, or the kind of caption."""
    caption: str
    wanted: dict[str, list[tuple[str, ...]]]
    optional: frozenset[str]


def fold(text: str) -> str:
    """What the score compares: lower case, no possessive mark, last word singular."""
    text = " ".join(text.casefold().replace("'s ", " ").replace("s' ", "s ").split())
    return " ".join([*text.split()[:-1], singular(text.split()[-1])]) if text else ""


def captions(data: Path, wanted: set[str]) -> dict[tuple[str, str], list[str]]:
    """Captions of the data sets by (data set, id), only of the sets in `wanted`."""
    found: dict[tuple[str, str], list[str]] = {}
    if "flickr8k" in wanted:
        for shard in sorted((data / "flickr8k").glob("train-*.tar")):
            with tarfile.open(shard) as tar:
                for member in tar:
                    if member.name.endswith(".json"):
                        body = tar.extractfile(member)
                        assert body is not None
                        found["flickr8k", member.name[:-5]] = json.load(body)["captions"]
    for name, key in (("coco_val2017", "coco_id"), ("flickr30k", "flickr_id"), ("fashion_titles", "id")):
        if name in wanted:
            for row in lines(data / "captions" / f"{name}.jsonl.gz"):
                found[name, str(row[key])] = row["captions"] if "captions" in row else [row["title"]]
    return found


def lines(path: Path) -> Iterator[dict]:
    """Rows of a (gzipped) JSON lines file."""
    with (
        gzip.open(path, "rt", encoding="utf-8")
        if path.suffix == ".gz"
        else path.open(encoding="utf-8") as file
    ):
        yield from map(json.loads, file)


def table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def is_set_aside(row: dict) -> bool:
    """Whether a row of `kinds.jsonl` is of the half that is only scored: its hash has an odd first digit."""
    return int(row["sha256"][0], 16) % 2 == 1


def rows_of(part: str) -> list[dict]:
    """The rows of a part of the gold."""
    rows = list(lines(GOLD / f"{part.removesuffix(' set aside')}.jsonl"))
    return [row for row in rows if is_set_aside(row) == (part != "kinds")] if "kinds" in part else rows


def load(part: str, data: Path) -> list[Label]:
    """The labels of a part, one of `PARTS`. Ends the program if a caption is not the labelled one.

    A row holds its caption (`text`), or names its place in a data set.
    """
    rows = rows_of(part)
    sources = captions(data, {row["data"] for row in rows if "data" in row})
    labels = []
    for row in rows:
        caption = row["text"] if "text" in row else sources[row["data"], row["id"]][row["caption"]]
        digest = sha256(caption.encode()).hexdigest()[:16]
        if digest != row["sha256"]:
            raise SystemExit(f"{part}: caption {row} is not the labelled one")
        wanted = {
            kind: [tuple(map(fold, label.split("|"))) for label in row[plural]]
            for kind, plural in zip(KINDS, PLURALS, strict=True)
        }
        labels.append(
            Label(row.get("kind") or row["data"], caption, wanted, frozenset(map(fold, row["optional"])))
        )
    return labels


def errors(label: Label, tags: Iterable[tuple[str, str]]) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Counts of (kind, "tp" | "fp" | "fn") for the `(kind, text)` tags of a caption, and the errors."""
    counts: Counter[tuple[str, str]] = Counter()
    wrong = []
    said = {kind: dict.fromkeys(fold(text) for k, text in tags if k == kind) for kind in KINDS}
    for kind in KINDS:
        right: set[str] = set()
        for alternatives in label.wanted[kind]:
            hit = any(a in said[kind] for a in alternatives)
            right.update(alternatives)
            counts[kind, "tp" if hit else "fn"] += 1
            if not hit:
                wrong.append(f"-{kind[0]}:{alternatives[0]}")
        for text in said[kind]:
            if text not in right and text not in label.optional:
                counts[kind, "fp"] += 1
                wrong.append(f"+{kind[0]}:{text}")
    return counts, wrong


def asked(counts: Counter[tuple[str, str]], kind: str) -> bool:
    """Whether there is anything to score: labels or tags of a kind."""
    return any(counts[kind, what] for what in ("tp", "fp", "fn"))


def prf(counts: Counter[tuple[str, str]], kind: str) -> tuple[float, float, float]:
    """Precision, recall and F1 of a kind."""
    tp, fp, fn = (counts[kind, what] for what in ("tp", "fp", "fn"))
    precision, recall = tp / max(1, tp + fp), tp / max(1, tp + fn)
    return precision, recall, 2 * precision * recall / max(1e-9, precision + recall)
