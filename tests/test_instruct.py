"""Instruction data is true of its pictures, and its stores answer for it."""

from __future__ import annotations

import argparse
import csv
import importlib
import io
import json
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from captioned import COLOURS, SHAPES
from pictures import picture
from tagstore.client import connect

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)  # where `python scripts/instruct.py` finds its parts
        names = ("instruct", "instruct_pictures", "instruct_questions")
        return {name: importlib.import_module(name) for name in names}


def jpeg(colour: str, shape: str, shift: int) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture(colour, shape, shift=shift))).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def built(tmp_path_factory, scripts) -> Path:
    """Data of 36 photographs and 36 products, in the formats of the real data."""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("out")
    (data / "flickr8k").mkdir()
    (data / "fashion" / "images").mkdir(parents=True)
    rows = []
    with tarfile.open(data / "flickr8k" / "train-000.tar", "w") as tar:
        for i in range(36):
            colour, shape = COLOURS[i % 6], SHAPES[i // 6 % 3]
            image = jpeg(colour, shape, i // 18)
            captions = [f"A {colour} {shape} is on the table .", f"Two dogs look at a {shape} ."]
            record = json.dumps({"captions": captions}).encode()
            for suffix, content in (("jpg", image), ("json", record)):
                member = tarfile.TarInfo(f"photo-{i:02d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            (data / "fashion" / "images" / f"{i:02d}.jpg").write_bytes(jpeg(colour, shape, 2 + i // 18))
            title = f"{shape.capitalize()} House Men {colour.capitalize()} Shirt"
            facts = {"gender": "Men", "subCategory": "Topwear", "baseColour": colour.capitalize()}
            rows.append({"image": f"images/{i:02d}.jpg", "title": title, "split": "train"} | facts)
    with (data / "fashion" / "items.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    options = argparse.Namespace(
        data=data, out=out, domain="fashion", photographs=0, plain=0, vectors=None, seed=0
    )
    scripts["instruct"].build(options, np.random.default_rng(0))
    return out


def test_every_answer_with_a_name_can_be_read_among_the_tags(built: Path):
    records = [json.loads(line) for line in (built / "data.jsonl").read_text().splitlines()]
    named = [r for r in records if r["id"].startswith("invented-0-") and not r["id"].endswith("-none")]
    assert named
    with connect(f"file://{built}/stores/invented-0") as source:
        vocabulary = [tag.text for tag in source.vocabulary()]
    for record in named:
        answers = [turn["value"] for turn in record["conversations"][1::2]]
        assert all(
            answer in ("Yes", "No") or any(name in answer for name in vocabulary) for answer in answers
        )
    assert all(Path(record["image"]).exists() for record in records if "image" in record)
    assert {record["store"] for record in records} >= {"flickr8k", "fashion", "invented-0", ""}


def test_what_is_said_of_a_photograph_is_true(built: Path, scripts):
    records = [json.loads(line) for line in (built / "data.jsonl").read_text().splitlines()]
    photographs = [r for r in records if r["id"].startswith("photo-")]
    assert len(photographs) == 3 * len({r["image"] for r in photographs}) > 30
    seen = set()
    for record in photographs:
        number = int(record["id"].split("-")[1])
        colour, shape = COLOURS[number % 6], SHAPES[number // 6 % 3]
        turns = record["conversations"]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            asked, said = question["value"].removeprefix("<image>\n"), answer["value"]
            if asked.startswith(("Is there", "Are there")):
                there = any(word in asked for word in (shape, "table", "dog"))
                assert said.startswith("Yes") == there, (record["id"], asked, said)
                seen.add(there)
            elif asked.startswith("How many dogs"):
                assert "two" in said.lower()
            elif asked.startswith("What colour"):
                assert colour in said.lower()
    assert seen == {True, False}


def test_words_of_titles_and_captions(scripts):
    of = scripts["instruct_pictures"]
    assert of.brand_of("United Colors of Benetton Men Solid White Shirt") == "United Colors of Benetton"
    assert of.brand_of("Titan Watch") == "Titan"
    assert of.tidy("a dog runs . ") == "A dog runs."
    names = {of.invented_name(np.random.default_rng(i)) for i in range(50)}
    assert len(names) == 50


def test_the_mix_finds_the_signal_that_tells(scripts):
    signals, rng = scripts["instruct"].Signals(), np.random.default_rng(0)
    for _ in range(200):
        rows = rng.random((6, 3))
        signals.rows.append(rows)
        signals.true.append(rows[:, 1] == rows[:, 1].max())
    relevance, similarity, votes = signals.fit()
    assert similarity > 5 * max(abs(relevance), abs(votes))
