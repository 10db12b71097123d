"""Pictures that tests draw for themselves."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageDraw

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
