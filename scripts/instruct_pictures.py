"""The pictures that `instruct.py` asks about, and their stores: photographs with captions, and catalogues.

A catalogue of products also gives others: the same pictures under invented names, cut into other classes.
"""

from __future__ import annotations

import csv
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha1
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagstore.client import connect
from tagstore.encoding.encoder import Encoder
from tagstore.ingestion import ingest
from tagstore.mining import load_miner
from tagstore.storage.store import Store
from tagstore.types import Entry, Identity, Retrieval

K = 5
"""Neighbours of a picture, as the recipe has them."""
COLOURS = frozenset({
    "black", "white", "red", "blue", "green", "yellow", "brown", "orange", "pink", "purple", "grey",
    "gray", "tan", "blond", "golden",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture with what is known about it."""

    path: Path
    facts: dict[str, str] = field(default_factory=dict)
    """Columns of a catalogue: name, brand, colour, kind."""
    labels: dict[str, str] = field(default_factory=dict)
    """What stands before a column's value in its tag: brand in "brand: Arrow"; columns without are bare."""
    group: tuple[str, ...] = ()
    """Other columns that set products apart."""
    captions: tuple[str, ...] = ()

    @property
    def tags(self) -> dict[str, str]:
        """The tag of each column."""
        labels = self.labels
        return {name: f"{labels[name]}: {v}" if name in labels else v for name, v in self.facts.items()}


class Remembering(Encoder):
    """An encoder that computes the vector of an image once, however many stores hold it."""

    def __init__(self, encoder: Encoder, file: Path) -> None:
        self.__dict__.update(encoder.__dict__)
        self._file = file
        self._vectors: dict[str, NDArray[np.float32]] = {}
        if file.exists():
            with np.load(file) as known:
                self._vectors = dict(zip(known["digests"].tolist(), known["vectors"], strict=True))

    def encode_images(self, images: Any) -> NDArray[np.float32]:
        """As `Encoder.encode_images`."""
        prepared = images if isinstance(images, np.ndarray) else np.stack([self.prepare(i) for i in images])
        digests = [sha1(image.tobytes()).hexdigest() for image in prepared]
        new = [i for i, digest in enumerate(digests) if digest not in self._vectors]
        if new:
            for i, vector in zip(new, super().encode_images(prepared[new]), strict=True):
                self._vectors[digests[i]] = vector
        return np.stack([self._vectors[digest] for digest in digests])

    def save(self) -> None:
        """Keep the vectors for the next run."""
        digests = np.array(list(self._vectors))
        np.savez(self._file, digests=digests, vectors=np.stack(list(self._vectors.values())))


# pictures


def photographs(data: Path, out: Path, split: str = "train") -> list[Picture]:
    """Unpack the photographs of Flickr8k with their captions."""
    folder = out / "photographs"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for shard in sorted((data / "flickr8k").glob(f"{split}-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar.getmembers():
                stem, _, suffix = member.name.rpartition(".")
                if suffix == "json":
                    record = json.load(tar.extractfile(member))  # type: ignore[arg-type]
                    captions = tuple(tidy(caption) for caption in record["captions"])
                    pictures.append(Picture(folder.resolve() / f"{stem}.jpg", captions=captions))
                elif suffix == "jpg" and not (folder / member.name).exists():
                    tar.extract(member, folder, filter="data")
    return sorted(pictures, key=lambda picture: picture.path)


def catalogue(data: Path, domain: str, split: str = "train") -> list[Picture]:
    """Products of a domain, with the columns name, or brand, colour and kind."""
    folder = (data / domain).resolve()
    with (folder / "items.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    if domain == "grocery":
        return [Picture(folder / row["image"], {"name": row["name"]}) for row in rows]
    pictures = []
    for row in rows:
        brand = brand_of(row["title"])
        facts = {"brand": brand, "colour": row["baseColour"], "kind": row["subCategory"]}
        labels = {name: name for name in facts}
        pictures.append(Picture(folder / row["image"], facts, labels, group=(row["gender"],)))
    return pictures


def brand_of(title: str) -> str:
    """The words of a fashion title before the gender ("United Colors of Benetton Men ..."), or its first."""
    words = re.split(
        r"\s+(?:Men|Women|Unisex|Boys|Girls|Kids|Mens|Womens|Men's|Women's)\b", title, maxsplit=1
    )
    brand = words[0] if len(words) == 2 else title.split()[0]
    return brand if len(brand.split()) <= 4 else brand.split()[0]


def tidy(caption: str) -> str:
    """A caption as a sentence: "A dog runs ." to "A dog runs."."""
    text = re.sub(r"\s+([.,;!?])", r"\1", caption.strip())
    text = re.sub(r"\s*\"\s*", " ", text).strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def halves(pictures: Sequence[Picture]) -> tuple[list[Picture], list[Picture]]:
    """Cut pictures in two by a digest of their names, whatever catalogue they are in: those that a store is
    made of, and those that are asked about."""
    first = [sha1(picture.path.name.encode()).digest()[0] < 128 for picture in pictures]
    taught = [picture for picture, is_first in zip(pictures, first, strict=True) if is_first]
    return taught, [picture for picture, is_first in zip(pictures, first, strict=True) if not is_first]


# stores


def make_store(pictures: Sequence[Picture], name: str, out: Path, encoder: Remembering) -> None:
    """Ingest pictures: catalogues give the tags of their columns, photographs what their captions name."""
    root = out / "stores"
    if (root / name / "CURRENT").exists() and Store(root, name).snapshot().version.number:
        return
    table = out / f"{name}.jsonl"
    with table.open("w") as file:
        for picture in pictures:
            captions = list(picture.captions) or [" ".join(picture.facts.values())]
            record = {"image": str(picture.path), "captions": captions, "tags": list(picture.tags.values())}
            file.write(json.dumps(record) + "\n")
    miner = load_miner("metadata", columns="tags") if pictures[0].facts else load_miner("rules")
    report = ingest(str(table), root=root, store=name, encoder=encoder, miner=miner, allow_outside=True)
    encoder.save()
    print(f"{name}: {report.entries} pictures, {report.unique_tags} tags", flush=True)


SYLLABLES = (
    "bra", "cal", "dor", "el", "fen", "gri", "hal", "ist", "jor", "kel", "lum", "mar", "nov", "ost",
    "pri", "quen", "ral", "sal", "tor", "ulm", "ver", "wen", "xan", "yor", "zel", "bel", "ko", "ri",
    "ta", "no", "va", "mi", "do", "la", "shi", "ren", "tho", "ka", "pe", "lu", "sa", "ne", "dri", "fo",
    "gle",
)  # fmt: skip
COMMON = (
    "Red", "Blue", "Green", "Golden", "Silver", "Dark", "Light", "Wild", "Fresh", "Classic", "Royal",
    "Summer", "Winter", "North", "Stone", "River", "Morning", "Double", "Natural", "Smooth", "Soft",
    "Baby", "Sweet", "Original", "Organic", "Fine", "Long", "Round", "Garden", "Field", "Sea", "Sun",
    "Moon", "Star",
)  # fmt: skip
ITEMS = (
    "Lamp", "Basket", "Blend", "Cloth", "Powder", "Oil", "Cup", "Berry", "Leaf", "Seed", "Wheel",
    "Mask", "Cream", "Bag", "Sheet", "Juice", "Root", "Fruit", "Bean", "Loaf", "Box", "Ring", "Drink",
    "Syrup", "Butter", "Thread", "Tool", "Pot", "Cake", "Paste", "Shell", "Bell",
)  # fmt: skip


def invented_word(rng: np.random.Generator) -> str:
    return "".join(rng.choice(SYLLABLES, int(rng.integers(2, 4)))).capitalize()


def invented_name(rng: np.random.Generator) -> str:
    """A name that no model knows, of one to four words, some of them ordinary ones."""
    common, item = str(rng.choice(COMMON)), str(rng.choice(ITEMS))
    word, other = invented_word(rng), invented_word(rng)
    forms = (
        word, f"{word} {other}", f"{common} {word}", f"{word} {item}", f"{word} {common} {item}",
        f"{common} {item}", f"{word} {item} {common}", f"{common} {word} {item}", word,
    )  # fmt: skip
    name = forms[int(rng.integers(len(forms)))]
    return name.lower() if rng.random() < 0.3 else name


def invented_family(rng: np.random.Generator) -> list[str]:
    """Names of three to five words that have most of them in common, in random order: a model that answers
    with one of them has to read it to its end."""
    makers = [invented_word(rng) for _ in range(6)]
    adjectives, items = rng.choice(COMMON, 5, replace=False), rng.choice(ITEMS, 5, replace=False)
    names = [
        f"{maker} {' '.join(words)} {item}"
        for maker in makers
        for words in [(a,) for a in adjectives] + [(a, b) for a in adjectives for b in adjectives if a != b]
        for item in items
    ]
    return [str(name) for name in rng.permutation(names)]


def clusters(vectors: NDArray[np.float32], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """k-means of unit vectors: the class of each row."""
    import faiss

    count = min(count, max(1, len(vectors) // 8))
    kmeans = faiss.Kmeans(
        vectors.shape[1], count, niter=10, seed=int(rng.integers(1 << 30)), spherical=True,
        min_points_per_centroid=1,
    )  # fmt: skip
    kmeans.train(np.ascontiguousarray(vectors))
    return np.asarray(kmeans.index.search(np.ascontiguousarray(vectors), 1)[1][:, 0], np.int64)


LABELS = {
    "name": ("name", "product", "item", "title"),
    "brand": ("brand", "maker", "make", "manufacturer"),
    "colour": ("colour", "color", "shade"),
    "kind": ("kind", "type", "category", "product type"),
}
"""What invented catalogues write before a value, so that a tag says what it is."""


SCHEMES = ("family", "name", "brand", "family", "name", "brand", "name", "family")
"""How the invented catalogues name their products."""


def renamed(
    pictures: Sequence[Picture], classes: Sequence[object], scheme: str, rng: np.random.Generator
) -> list[Picture]:
    """The pictures as a catalogue of invented products, one for each class.

    Args:
        scheme: `name`; `family` (names that have words in common); or `brand` (brand, colour and kind beside
            the name, each with what it is before it).
    """
    family = invented_family(rng) if scheme == "family" else []
    names: dict[object, dict[str, str]] = {}
    brands = [invented_name(rng) for _ in range(25)]
    labels = {column: str(rng.choice(words)) for column, words in LABELS.items()} if scheme == "brand" else {}
    for label in sorted(set(classes), key=str):
        facts = {"name": family.pop() if family else invented_name(rng)}
        if scheme == "brand":
            facts |= {
                "brand": str(rng.choice(brands)),
                "colour": str(rng.choice(sorted(COLOURS))).capitalize(),
                "kind": str(rng.choice(ITEMS)),
            }
        names[label] = facts
    return [Picture(p.path, names[label], labels) for p, label in zip(pictures, classes, strict=True)]


def invented(
    out: Path, photos: Sequence[Picture], products: Sequence[Picture], rng: np.random.Generator
) -> dict[str, list[Picture]]:
    """Catalogues of the same pictures under invented names; each cuts them into other classes."""
    known = vectors_of(out, [*photos, *products])
    vectors = np.stack([known[str(picture.path)] for picture in products])
    facts = [picture.facts for picture in products]
    cuts: list[Sequence[object]]
    if "name" in facts[0]:
        cuts = [[f["name"] for f in facts]] * 3
    else:
        cuts = [
            [(f["kind"], f["colour"]) for f in facts], [(f["kind"], f["brand"]) for f in facts],
            [(p.facts["kind"], *p.group, p.facts["colour"]) for p in products],
        ]  # fmt: skip
    cuts += [clusters(vectors, count, rng).tolist() for count in (60, 90, 140)]
    catalogues = {}
    for number, cut in enumerate(cuts):
        catalogues[f"invented-{number}"] = renamed(products, cut, SCHEMES[number], rng)
    drawn = [photos[i] for i in sorted(rng.choice(len(photos), min(len(photos), 3000), replace=False))]
    vectors = np.stack([known[str(picture.path)] for picture in drawn])
    for number, count in enumerate((80, 160), start=len(cuts)):
        labels = clusters(vectors, count, rng).tolist()
        catalogues[f"invented-{number}"] = renamed(drawn, labels, SCHEMES[number], rng)
    return catalogues


# answers of the stores


def retrieved(out: Path, store: str, pictures: Sequence[Picture]) -> Iterator[Retrieval]:
    """The answers of a store to pictures, without themselves and their copies."""
    vectors = vectors_of(out, pictures)
    with connect(f"file://{out / 'stores'}/{store}") as source:
        digest = source.info().fingerprint.digest
        for start in range(0, len(pictures), 256):
            rows = [str(p.path) for p in pictures[start : start + 256]]
            identities = [Identity("", *HASHES[row]) for row in rows]
            yield from source.retrieve(
                vectors=np.stack([vectors[row] for row in rows]), fingerprint=digest, k=K,
                identities=identities, exclude="self", exclude_distance=4,
            )  # fmt: skip


HASHES: dict[str, tuple[bytes, int]] = {}
VECTORS: dict[str, NDArray[np.float32]] = {}


def path_of(out: Path, entry: Entry) -> str:
    """Where an entry's picture lies: its key is the path without ending, within `out` a relative one."""
    return str(out.resolve() / f"{entry.key}.jpg")


def vectors_of(out: Path, pictures: Sequence[Picture]) -> dict[str, NDArray[np.float32]]:
    """Vectors (and hashes) of pictures, which some store holds."""
    if any(str(picture.path) not in VECTORS for picture in pictures):
        for folder in sorted((out / "stores").iterdir()):
            snapshot = Store(out / "stores", folder.name).snapshot()
            entries = list(snapshot.entries())
            rows = snapshot.vectors(snapshot.live())
            for entry, row in zip(entries, rows, strict=True):
                path = path_of(out, entry)
                VECTORS[path], HASHES[path] = (
                    np.asarray(row, np.float32),
                    (entry.sha256, entry.perceptual_hash),
                )
    return VECTORS
