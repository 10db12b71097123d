"""The figures of mini's card: do texts find images, and do pictures of an unseen domain find similar ones?

    python -m benchmarks.model.encoder_mini --data DIR [--split test] [--weights FILE]

DIR holds flickr8k/, grocery/, fashion/ and coco_mini/. Everything goes through the encoder as the store uses
it. Beside mini's vectors are the raw features of its image tower from the same forward pass, which show what
a head loses.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks import report
from tagstore.encoding import mini
from tagstore.encoding.encoder import Encoder, load_encoder
from tagstore.encoding.images import decode
from tagstore.readers import read
from tagstore.types import Pair

AT = (1, 5, 10)


def main() -> None:
    parser = report.arguments_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--split", choices=("val", "test"), default="test", help="val for every choice, test once"
    )
    parser.add_argument(
        "--weights", type=Path, default=mini.WEIGHTS, help="another mini.safetensors, to compare"
    )
    options = parser.parse_args()
    mini.WEIGHTS = options.weights
    start = time.perf_counter()
    encoder = load_encoder("mini", device="cpu")
    loaded = time.perf_counter() - start

    rows = [recall_row(encoder, f"Flickr8k {options.split}", *flickr8k(options.data, options.split))]
    rows.append(recall_row(encoder, "COCO (239 photographs)", *coco(options.data)))
    recall = report.table(
        ["photographs", "n", *(f"t2i R@{k}" for k in AT), *(f"i2t R@{k}" for k in AT)], rows
    )
    nearest = report.table(
        ["photographs", "named by nearest", "n", "mini %", "raw tower %"],
        [
            row
            for name, labels in (("grocery", ("name", "coarse")), ("fashion", ("brand", "subCategory")))
            for row in nearest_rows(encoder, options.data / name, labels, options.split)
        ],
    )
    megabytes = options.weights.stat().st_size / 1e6
    size = f"{options.weights.name}: {megabytes:.2f} MB; loaded in {loaded:.1f} s; {encoder.fingerprint}."
    packages = ("torch", "open-clip-torch", "timm", "transformers")
    report.write(
        f"encoder-mini-{options.split}",
        "What the encoder mini reaches",
        size,
        recall,
        nearest,
        packages=packages,
    )


def flickr8k(data: Path, split: str) -> tuple[list[bytes], list[tuple[str, ...]]]:
    pairs = [pair for pair in read(str(data / "flickr8k" / f"{split}-*.tar")) if isinstance(pair, Pair)]
    return [pair.image for pair in pairs], [pair.captions for pair in pairs]


def coco(data: Path) -> tuple[list[bytes], list[tuple[str, ...]]]:
    rows = [json.loads(line) for line in (data / "coco_mini" / "captions.jsonl").read_text().splitlines()]
    return [(data / "coco_mini" / row["image"]).read_bytes() for row in rows], [
        tuple(row["captions"]) for row in rows
    ]


def recall_row(
    encoder: Encoder, name: str, images: list[bytes], captions: list[tuple[str, ...]]
) -> list[object]:
    vectors, _ = embed(encoder, images)
    texts = encoder.encode_texts([caption for row in captions for caption in row])
    own = np.repeat(np.arange(len(images)), [len(row) for row in captions])
    scores = vectors @ texts.T  # [images, texts]
    # images that rank above the text's own
    of_text = (scores > scores[own, np.arange(len(own))]).sum(axis=0)
    of_image = np.array([(scores[i] > scores[i, own == i].max()).sum() for i in range(len(images))])
    return [name, len(images), *(percent(places < k) for places in (of_text, of_image) for k in AT)]


def nearest_rows(
    encoder: Encoder, folder: Path, labels: tuple[str, ...], split: str
) -> Iterator[list[object]]:
    with (folder / "items.csv").open(newline="") as file:
        items = [row for row in csv.DictReader(file) if row["split"] in ("train", split)]
    for row in items:
        row["brand"] = row.get("title", "").partition(" ")[0]
    vectors, raw = embed(encoder, [(folder / row["image"]).read_bytes() for row in items])
    asked = np.array([row["split"] == split for row in items])
    found = {kind: nearest(space, asked) for kind, space in (("mini", vectors), ("raw", raw))}
    for label in labels:
        names = np.array([row[label] for row in items])
        right = {kind: names[~asked][place] == names[asked] for kind, place in found.items()}
        yield [folder.name, label, int(asked.sum()), percent(right["mini"]), percent(right["raw"])]


def nearest(space: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """For each asked row the place of its nearest among the others, by cosine."""
    unit = space / np.linalg.norm(space, axis=1, keepdims=True)
    return (unit[asked] @ unit[~asked].T).argmax(axis=1)


def embed(encoder: Encoder, images: list[bytes], batch: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors `[N, D]`, and the tower's pooled features before the head `[N, C]`."""
    vectors, raw = [], []
    waiting = iter(images)
    with ThreadPoolExecutor() as pool:
        while part := list(islice(waiting, batch)):
            grid, found = encoder.encode_grid(
                np.stack(list(pool.map(lambda image: encoder.prepare(decode(image)), part)))
            )
            vectors.append(found)
            raw.append(grid.mean(axis=1))
    return np.concatenate(vectors), np.concatenate(raw)


def percent(right: np.ndarray) -> str:
    return f"{100 * right.mean():.1f}"


if __name__ == "__main__":
    main()
