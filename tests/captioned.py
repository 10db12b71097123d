"""Data sets of pictures that tests draw for themselves, as a training run reads them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from pictures import COLOURS, SHAPES, picture


def write_llava(folder: Path, count: int = 18) -> Path:
    """Write `count` questions about different pictures in LLaVA's format; return the JSON file."""
    (folder / "images").mkdir(parents=True)
    records = []
    for i in range(count):
        colour, shape, shift = COLOURS[i % 6], SHAPES[i // 6 % 3], i // 18 - 6
        name = f"images/{i}.png"
        (folder / name).write_bytes(picture(colour, shape, shift=shift))
        question = {"from": "human", "value": "<image>\nWhat is it?"}
        turns = [question, {"from": "gpt", "value": f"A {colour} {shape}."}]
        records.append({"id": str(i), "image": name, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def write_shard(path: Path, count: int = 18) -> Path:
    """A WebDataset shard of captioned pictures; the last third is of split "test"."""
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            colour, shape = COLOURS[i % 6], SHAPES[i // 6 % 3]
            captions = [f"A {colour} {shape}.", f"One {shape} in {colour}."]
            record = {"captions": captions, "split": "test" if i >= count * 2 // 3 else "train"}
            members = {"png": picture(colour, shape), "txt": captions[0].encode()}
            for suffix, data in (members | {"json": json.dumps(record).encode()}).items():
                member = tarfile.TarInfo(f"{colour}-{shape}-{i}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path
