"""Which tag of the neighbours is true? Orders of tags in a store as ingested, and after `tagstore ground`.

    python -m benchmarks.store.grounding --data ../shared/data --root /tmp/grounding

DATA holds grocery/ and fashion/ (items.csv with image, split and labels) and flickr8k/ (WebDataset). Split
train becomes a store of each label; the pictures of the other split ask for their neighbours' tags.
For catalogues the figure is the share of pictures whose first tag is their label, for flickr8k the average
precision of the neighbours' tags, where those mined from the picture's own captions are true. The stores are
kept under ROOT and used again. Intervals are 95 %, by bootstrap over pictures.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import arguments_parser, table, write
from tagstore.client import connect
from tagstore.encoding.encoder import load_encoder
from tagstore.encoding.images import decode
from tagstore.ingestion import ingest
from tagstore.mining import load_miner, merge
from tagstore.readers import read
from tagstore.storage.store import Store, store_names
from tagstore.types import Pair, Retrieval, RetrievedTag
from tagstore.upkeep.reprocessing import ground
from tuna_model.evaluation.bootstrap import metric

CATALOGUES = (
    ("grocery", "name"),
    ("fashion", "brand"),
    ("fashion", "baseColour"),
    ("fashion", "subCategory"),
)
"""Folders of --data, and the label that is each store's only tag; a brand is a title's first word."""
ORDERS: dict[str, Callable[[RetrievedTag], tuple[float, ...]]] = {
    "votes": lambda tag: (tag.votes, tag.similarity),
    "similarity": lambda tag: (tag.similarity, tag.votes),
    "relevance": lambda tag: (tag.relevance,),
}
Score = Callable[[Sequence[str], set[str]], float]
"""Of the tags of one picture, best first, and those that are true."""


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--root", type=Path, required=True, help="where stores and vectors are kept")
    parser.add_argument("--split", default="test", help="whose pictures ask")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--keep", action="store_true", help="write the report to benchmarks/results")
    options = parser.parse_args()
    rows = []
    for folder, label in CATALOGUES:
        vectors, truth = catalogue(options.data.resolve() / folder, label, options.root, options.split)
        rows += measure(options.root, f"{folder}-{label.lower()}", vectors, truth, options.k, first_is_true)
    vectors, truth = captions(options.data.resolve() / "flickr8k", options.root, options.split)
    rows += measure(options.root, "flickr8k", vectors, truth, options.k, average_precision)
    write(
        "grounding",
        f"Which tag is true: {options.split} pictures, k = {options.k}",
        "Catalogues: pictures whose first tag is the label. flickr8k: average precision of all tags.",
        table(["store", "pictures", "tags", "true tag among them", *ORDERS, "relevance, grounded"], rows),
        packages=("torch", "faiss-cpu"),
        keep=options.keep,
    )  # fmt: skip


def measure(
    root: Path, store: str, vectors: np.ndarray, truth: list[set[str]], k: int, score: Score
) -> list[list[str]]:
    """A row of the table, from the version before the store was grounded and the one after."""
    if not Store(root, store).snapshot().version.tag_embeddings:
        ground(root, store)
    newest = Store(root, store).snapshot().version
    cells, among = [], 0.0
    for version, orders in ((newest.number - 1, tuple(ORDERS)), (newest.number, ("relevance",))):
        answers = ask(f"file://{root.resolve()}/{store}@{version}", vectors, k)
        asked = list(zip(answers, truth, strict=True))
        among = float(np.mean([any(tag.tag.casefold() in own for tag in answer) for answer, own in asked]))
        for order in orders:
            values = [
                score([tag.tag.casefold() for tag in sorted(a.tags, key=ORDERS[order], reverse=True)], own)
                for a, own in asked
            ]
            cells.append(with_interval(values))
    return [[store, str(len(truth)), str(newest.unique_tags), f"{among:.3f}", *cells]]


def ask(url: str, vectors: np.ndarray, k: int) -> list[Retrieval]:
    with connect(url) as source:
        fingerprint = source.info().fingerprint
        pieces = [vectors[start : start + 256] for start in range(0, len(vectors), 256)]
        return [a for piece in pieces for a in source.retrieve(vectors=piece, fingerprint=fingerprint, k=k)]


def first_is_true(tags: Sequence[str], own: set[str]) -> float:
    return float(bool(tags) and tags[0] in own)


def average_precision(tags: Sequence[str], own: set[str]) -> float:
    true = np.array([tag in own for tag in tags], bool)
    if not true.any():
        return 0.0
    precision = np.cumsum(true) / np.arange(1, len(true) + 1)
    return float(precision[true].mean())


def with_interval(values: Sequence[float]) -> str:
    of_pictures = np.asarray(values)
    m = metric("", lambda rows: float(of_pictures[rows].mean()), range(len(values)))
    return f"{m.value:.3f} ({m.low:.3f} to {m.high:.3f})"


def catalogue(data: Path, label: str, root: Path, split: str) -> tuple[np.ndarray, list[set[str]]]:
    """Make the store of a catalogue's label if it is not there; the vectors and labels of a split."""
    with (data / "items.csv").open(newline="") as file:
        rows = [row | {"brand": row.get("title", "").split(" ")[0]} for row in csv.DictReader(file)]
    store = f"{data.name}-{label.lower()}"
    if store not in _names(root):
        root.mkdir(parents=True, exist_ok=True)
        lines = root / f"{store}.jsonl"
        with lines.open("w") as file:
            for row in rows:
                if row["split"] == "train":
                    record = {"image": str(data / row["image"]), "captions": [row[label]], label: row[label]}
                    file.write(json.dumps(record) + "\n")
        miner = load_miner("metadata", columns=label)
        ingest(str(lines), root=root, store=store, encoder="mini", miner=miner, allow_outside=True)
    asked = [row for row in rows if row["split"] == split]
    vectors = embedded(root / f"{data.name}-{split}.npy", [data / row["image"] for row in asked])
    return vectors, [{row[label].casefold()} for row in asked]


def captions(data: Path, root: Path, split: str) -> tuple[np.ndarray, list[set[str]]]:
    """Make the store of captioned photographs if it is not there; the vectors and mined tags of a split."""
    if "flickr8k" not in _names(root):
        ingest(str(data / "train-*.tar"), root=root, store="flickr8k", encoder="mini")
    pairs = [pair for pair in read(str(data / f"{split}-*.tar")) if isinstance(pair, Pair)]
    mined = load_miner("rules").mine(pairs)
    truth = [{tag.text.casefold() for tag in merge(tags)} for tags in mined]
    return embedded(root / f"flickr8k-{split}.npy", [pair.image for pair in pairs]), truth


def embedded(path: Path, images: Sequence[Any]) -> np.ndarray:
    """The unit vectors of pictures, `[N, D]`, kept in a file."""
    if not path.exists():
        encoder, rows = load_encoder("mini"), []
        for start in range(0, len(images), 64):
            batch = [i.read_bytes() if isinstance(i, Path) else i for i in images[start : start + 64]]
            rows.append(encoder.encode_images([decode(image) for image in batch]))
        np.save(path, np.concatenate(rows))
    return np.load(path)


def _names(root: Path) -> list[str]:
    return store_names(root) if root.exists() else []


if __name__ == "__main__":
    main()
