"""Tags read from pictures: how many pictures get one, and how many tags are right, by threshold.

    python -m benchmarks.mining.pictures --data PATH

PATH holds flickr8k/, coco_mini/ and grocery/. Of photographs, a tag is right that a caption or an
annotation of the same photograph confirms: by its name, the last word of it, or its kind (a beagle is a
dog). What nobody mentions counts as wrong, so the share is a lower bound. Of groceries, the class of the
product decides, and only products that ImageNet has count. Also: what the tags cost, beside an embedding of
the same pictures.
"""

from __future__ import annotations

import json
import random
import re
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks import report
from benchmarks.mining import gold_labels
from tagstore.encoding.encoder import Encoder, load_encoder
from tagstore.encoding.images import decode
from tagstore.mining.nouns import singular
from tagstore.mining.pictures import ImageNetTagger, Labels

THRESHOLDS = (0.15, 0.3, 0.5, 0.7, 0.9)
GROUPS = {"dog": ((151, 269),), "cat": ((281, 286),), "bird": ((7, 25), (80, 101), (127, 147))}
"""Places of breeds and species in ImageNet's list of classes."""

Picture = tuple[bytes, frozenset[str]]
"""An encoded image, and the words that are right for it."""


def words_of(texts: list[str]) -> frozenset[str]:
    """The words of captions and categories, singular."""
    return frozenset(singular(word) for text in texts for word in re.findall(r"[a-z-]+", text.lower()))


def coco(data: Path) -> Iterator[Picture]:
    for row in gold_labels.lines(data / "coco_mini" / "captions.jsonl"):
        categories = [thing["category"] for thing in row.get("objects") or []]
        yield (data / "coco_mini" / row["image"]).read_bytes(), words_of([*row["captions"], *categories])


def flickr(data: Path) -> Iterator[Picture]:
    for shard in sorted((data / "flickr8k").glob("test-*.tar")):
        with tarfile.open(shard) as tar:
            images: dict[str, bytes] = {}
            for member in tar:
                file = tar.extractfile(member)
                stem, suffix = member.name.rsplit(".", 1)
                if file and suffix == "jpg":
                    images[stem] = file.read()
                elif file and suffix == "json":
                    yield images[stem], words_of(json.load(file)["captions"])


def groceries(data: Path) -> Iterator[Picture]:
    known = {singular(name) for name in ImageNetTagger().names}
    for row in gold_labels.table(data / "grocery" / "items.csv"):
        names = {singular(row[column].lower().replace("-", " ")) for column in ("name", "coarse")}
        if names & known:
            yield (data / "grocery" / row["image"]).read_bytes(), frozenset(names & known)


def is_right(name: str, number: int, words: frozenset[str]) -> bool:
    """Whether a class is confirmed by the words of a picture."""
    said = {name, singular(name), singular(name.split()[-1])}
    kinds = {kind for kind, places in GROUPS.items() if any(first <= number < last for first, last in places)}
    phrase = all(singular(word) in words for word in name.split())
    return phrase or not words.isdisjoint(said | kinds)


def measured(pictures: list[Picture], encoder: Encoder) -> list[list[object]]:
    """A row for each threshold: share of pictures with a tag, share of tags that are right."""
    tagger = ImageNetTagger()
    numbers = {name: number for number, name in enumerate(tagger.names)}
    labels: list[Labels] = []
    for start in range(0, len(pictures), 64):
        batch = np.stack([encoder.prepare(decode(image)) for image, _ in pictures[start : start + 64]])
        labels += tagger.read_pooled(encoder.encode_pooled(batch)[0])
    rows: list[list[object]] = []
    for threshold in THRESHOLDS:
        kept = [[name for name, p in seen if p > threshold] for seen in labels]
        tags = [(name, words) for names, (_, words) in zip(kept, pictures, strict=True) for name in names]
        right = sum(is_right(name, numbers[name], words) for name, words in tags)
        with_tag = sum(map(bool, kept)) / len(pictures)
        rows.append([f"{threshold:g}", f"{with_tag:.1%}", f"{right / max(1, len(tags)):.1%} of {len(tags)}"])
    return rows


def cost(pictures: list[Picture], encoder: Encoder, rounds: int = 5) -> str:
    """Milliseconds a picture: vectors alone, and vectors with tags."""
    tagger = ImageNetTagger()
    batch = np.stack([encoder.prepare(decode(image)) for image, _ in pictures[:128]])
    runs: dict[str, Callable[[], object]] = {
        "vectors": lambda: encoder.encode_images(batch),
        "vectors and tags": lambda: tagger.read_pooled(encoder.encode_pooled(batch)[0]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    rows = [[name, f"{1000 * min(spent) / len(batch):.2f}"] for name, spent in seconds.items()]
    return report.table(["what", f"ms a picture (best of {rounds})"], rows)


def main() -> None:
    parser = report.arguments_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--pictures", type=int, default=1000, help="pictures of a set at most")
    arguments = parser.parse_args()
    encoder = load_encoder("mini", device="cpu")
    header = ["pictures of", "threshold", "with a tag", "tags that are right"]
    rows: list[list[object]] = []
    for name, read in (("flickr8k test", flickr), ("coco_mini", coco), ("grocery", groceries)):
        pictures = list(read(arguments.data))
        if len(pictures) > arguments.pictures:
            pictures = random.Random(0).sample(pictures, arguments.pictures)
        classes = len({words for _, words in pictures})
        label = f"grocery, {classes} names" if read is groceries else name
        rows += [[f"{label} ({len(pictures):,})", *row] for row in measured(pictures, encoder)]
    parts = [
        "## Tags read from pictures\n\n" + report.table(header, rows),
        "## Cost\n\n" + cost(pictures, encoder),
    ]
    report.write("mining-pictures", "Tags read from pictures", *parts, packages=("torch", "timm", "numpy"))


if __name__ == "__main__":
    main()
