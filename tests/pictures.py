"""Pictures that tests draw for themselves, and an encoder that takes no time to look at them."""

from __future__ import annotations

import io
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tagstore.encoding.encoder import Encoder
from tagstore.types import Fingerprint

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle")


def picture(colour: str, shape: str, *, size: int = 96, shift: int = 0) -> bytes:
    """A PNG of one coloured shape on white."""
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    box = (16 + shift, 16, size - 16 + shift, size - 16)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) // 2, box[1])], fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_shapes(folder: Path) -> Path:
    """A folder source: 18 pictures with a caption each."""
    folder.mkdir(parents=True)
    for colour in COLOURS:
        for shape in SHAPES:
            (folder / f"{colour}-{shape}.png").write_bytes(picture(colour, shape))
            (folder / f"{colour}-{shape}.txt").write_text(f"A {colour} {shape} on a white table in Paris.\n")
    return folder


def ingest_shapes(folder: Path, encoder: Encoder) -> Path:
    """Make a root in a folder, with the pictures of shapes as version 1 of the store "shapes"."""
    from tagstore.ingestion import ingest

    source = write_shapes(folder / "source")
    ingest(str(source), root=folder / "root", store="shapes", encoder=encoder)
    return folder / "root"


class ToyEncoder(Encoder):
    """Eight numbers of a picture's colours; a text's vector follows from its hash."""

    def __init__(self, weights: str = "00") -> None:
        self.fingerprint = Fingerprint("toy", weights, {"size": [8, 8]}, False, True, 8)
        self.dimension, self.image_size, self.device, self.precision = 8, (8, 8), "cpu", "fp32"

    def prepare(self, image):
        return np.asarray(image)[::12, ::12]

    def encode_images(self, images):
        flat = np.stack(list(images)).reshape(len(images), -1)[:, 88:96].astype(np.float32) + 1
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    def encode_texts(self, texts):
        digests = [
            np.frombuffer(sha256(text.encode()).digest()[:8], np.uint8).astype(np.float32) + 1
            for text in texts
        ]
        return np.stack([digest / np.linalg.norm(digest) for digest in digests])


def write_table(folder: Path) -> Path:
    """200 rows over 18 pictures; one is no picture, one repeats a key."""
    folder.mkdir()
    (folder / "broken.png").write_bytes(b"no picture")
    rows = ["key,image,caption"]
    for i in range(200):
        colour, shape = COLOURS[i % 6], SHAPES[i // 6 % 3]
        (folder / f"{colour}-{shape}.png").write_bytes(picture(colour, shape))
        key, name = (20 if i == 150 else i), ("broken" if i == 70 else f"{colour}-{shape}")
        rows.append(f"{key},{name}.png,A {colour} {shape} number {i}.")
    (folder / "items.csv").write_text("\n".join(rows))
    return folder / "items.csv"
