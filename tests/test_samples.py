"""One reader of samples: a recorded map holds what training asks for, types are strict, no path leads out."""

from __future__ import annotations

import base64
import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from captioned import write_shard
from pictures import COLOURS, picture
from tagstore.client import connect
from tagstore.client.recording import record
from tagstore.errors import InvalidInput, NotFound
from tagstore.readers import Columns, read
from tagstore.readers.samples import Place, Turn, image_place, read_images, read_lines, read_samples
from tagstore.types import Pair, Rejected
from tuna_model import presets
from tuna_model.evaluation import TaskOptions, load_task
from tuna_model.processing.tags import TagLookup
from tuna_model.training.features import CachedFeatures, LiveFeatures, make_cache
from tuna_model.training.recipe import TagRecipe
from tuna_model.training.tag_feed import TagFeed

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A shape."}]


def write_records(folder: Path, records: Any, name: str = "data.json") -> Path:
    """A data set beside pictures `a.png` to `f.png`, with one more picture outside of the folder."""
    folder.mkdir(exist_ok=True)
    for letter, colour in zip("abcdef", COLOURS, strict=True):
        (folder / f"{letter}.png").write_bytes(picture(colour, "circle", shift=2))
    (folder.parent / "outside.png").write_bytes(picture("red", "square"))
    path = folder / name
    path.write_text(
        "".join(json.dumps(r) + "\n" for r in records) if name.endswith("jsonl") else json.dumps(records)
    )
    return path


# a map holds what training asks for


MIXED = [
    {"id": 1, "image": "a.png", "conversations": TURNS},
    {"id": "two", "images": ["b.png", "c.png"], "conversations": TURNS},
    {"image": ["d.png"], "conversations": TURNS},
    {"image": ["e.png", "a.png"], "conversations": TURNS},
    {"key": "captioned", "image_path": "f.png", "captions": ["a shape", "one shape"]},
    {"id": "text only", "conversations": TURNS},
    {"images": [], "caption": "no image either"},
]


@pytest.mark.parametrize(("name", "leak_guard"), [("data.json", True), ("data.jsonl", False)])
def test_a_recorded_map_holds_every_sample_that_training_asks_for(
    shapes_root: Path, tmp_path: Path, name: str, leak_guard: bool
):
    data = write_records(tmp_path / "data", MIXED, name)
    samples = read_samples(data)
    assert [sample.key for sample in samples[:5]] == ["1", "two", "d", "e", "captioned"]
    keys = [key for sample in samples for key in sample.image_keys]
    assert keys == ["1", "two", "two#2", "d", "e", "e#2", "captioned"]
    assert [item.key for item in read_images(str(data))] == keys
    assert list(read_images(str(data), images=str(tmp_path / "data"))) == list(read_images(str(data)))

    model, processor = presets.load("tiny")
    features = LiveFeatures(model, processor.image_processor, samples)
    make_cache(tmp_path / "features", features, samples, encoder="abc", layer=-1)
    cached = CachedFeatures(tmp_path / "features", samples, encoder="abc", layer=-1)
    rows = [i for i, sample in enumerate(samples) for _ in sample.images]
    recipe = TagRecipe(leak_guard=leak_guard)
    guard = {"exclude": "self", "exclude_distance": recipe.leak_bits} if leak_guard else {}
    options = {"k": 3, **guard}
    with connect(f"file://{shapes_root}/shapes", **options) as source:
        assert record(source, read_images(str(data)), tmp_path / "map", batch=2).refused == 0

    def ask(url: str, images) -> list[tuple[str, ...]]:
        with connect(url) as source:
            lookup = TagLookup(source, k=3)
            fingerprint = model.config.encoder_digest
            feed = TagFeed({"": lookup}, recipe, fingerprint=fingerprint, seed=0)
            tags = [tags.texts for tags in feed(images(range(len(samples))), rows, 0)]
            assert lookup.degraded == 0
            return tags

    recorded = ask(f"replay://{tmp_path / 'map'}", features)
    assert all(recorded)
    assert len(recorded) == len(keys)
    assert recorded == ask(f"replay://{tmp_path / 'map'}", cached)
    assert recorded == ask(f"file://{shapes_root}/shapes", features)


def test_a_shard_is_recorded_under_the_keys_of_training(tmp_path: Path):
    shard = write_shard(tmp_path / "train-000.tar", 6)
    keys = [key for sample in read_samples(shard) for key in sample.image_keys]
    for dataset in (shard, tmp_path, tmp_path / "train-{000..000}.tar"):
        items = list(read_images(str(dataset)))
        assert [item.key for item in items] == keys
        assert all(isinstance(item, Pair) and item.image.startswith(b"\x89PNG") for item in items)


def test_several_images_and_conversations_in_a_shard(tmp_path: Path):
    from test_readers import write_tar

    members: list[tuple[str, bytes | str]] = [
        ("0.jpg", b"first"),
        ("0.png", b"second"),
        ("0.json", json.dumps({"id": "other", "conversations": TURNS, "split": "test"})),
        ("1.jpg", b"third"),
        ("1.txt", "a cat\n\n two cats \n"),
        ("2.jpg", b"an image that nothing is said of"),
    ]
    plain = write_tar(tmp_path / "a.tar", members)
    first, second = read_samples(plain)
    assert [image.read() for image in first.images] == [b"first", b"second"]
    assert (first.key, first.turns) == ("0", (Turn("user", "What is it?"), Turn("assistant", "A shape.")))
    assert second.captions == ("a cat", "two cats")
    expected = [("0", b"first"), ("0#2", b"second"), ("1", b"third"), ("2", members[-1][1])]
    packed = write_tar(tmp_path / "a.tar.gz", members, "w:gz")
    for shard in (plain, packed):
        assert [(item.key, item.image) for item in read_images(str(shard))] == expected
    with pytest.raises(InvalidInput, match=r"a\.tar\.gz!0: the image stands in .* a compressed shard"):
        read_samples(packed)
    plain.write_bytes(plain.read_bytes()[:2000])
    with pytest.raises(InvalidInput, match=r"a\.tar.*damaged or cut off"):
        read_samples(plain)


@pytest.mark.parametrize(("fields", "key"), [({}, "a"), ({"id": 7}, "7"), ({"key": "k", "id": 7}, "k")])
def test_ingest_record_and_training_give_an_image_the_same_key(tmp_path: Path, fields: dict, key: str):
    data = write_records(tmp_path / "data", [{"image": "a.png", "caption": "x", **fields}], "data.jsonl")
    (tmp_path / "data" / "table.csv").write_text("image,caption\na.png,x\n")
    assert [item.key for item in read(str(data))] == [key]
    assert [item.key for item in read_images(str(data))] == [key]
    assert [sample.key for sample in read_samples(data)] == [key]
    assert list(read_images(str(data), format="jsonl")) == list(read(str(data)))
    assert [item.key for item in read_images(str(tmp_path / "data" / "table.csv"))] == ["a"]


def test_an_image_inside_the_record_is_recorded_and_not_trained_on(tmp_path: Path):
    text = base64.b64encode(picture("red", "circle")).decode()
    data = write_records(tmp_path / "data", [{"image": text, "caption": "x"}], "data.jsonl")
    [item] = read_images(str(data))
    assert item == Pair("data:1", picture("red", "circle"), (), origin=f"{data}:1")
    with pytest.raises(InvalidInput, match="line 1: the image stands in the record"):
        read_samples(data)


# strict types


BAD_RECORDS = [
    (None, "a sample is an object, and this is null"),
    ("a.png", "a sample is an object, and this is a text"),
    ({"image": None}, "'image' is null: a text or a list of texts is expected"),
    ({"image": 3}, "'image' is a number"),
    ({"image": {"path": "a.png"}}, "'image' is an object"),
    ({"image": ""}, "'image' is an empty text"),
    ({"image": ["a.png", None]}, "'image' holds null"),
    ({"images": "a.png"}, "'images' is a text: a list of texts is expected"),
    ({"images": ["a.png", " "]}, "'images' holds an empty text"),
    ({"images": ["a.png"], "image": "a.png"}, "both 'image' and 'images'"),
    ({"id": None}, "no key: column 'id' is empty"),
    ({"id": ""}, "no key: column 'id' is empty"),
    ({"id": 1.5}, "the key is not a text or an integer"),
    ({"id": ["1"]}, "the key is not a text or an integer"),
    ({"captions": "a cat"}, "'captions' is a text: a list of texts is expected"),
    ({"captions": None}, "'captions' is null"),
    ({"captions": ["a cat", {}]}, "'captions' holds an object"),
    ({"caption": 3}, "'caption' is a number"),
    ({"caption": ""}, "'caption' is an empty text"),
    ({"conversations": None}, "'conversations' is null: a list of turns is expected"),
    ({"conversations": "hello"}, "'conversations' is a text"),
    ({"conversations": {"from": "gpt", "value": "x"}}, "'conversations' is an object"),
    ({"conversations": ["hello"]}, "'value': text}, and this is a text"),
    ({"conversations": [{"from": None, "value": "x"}]}, "'from': 'human' or 'gpt'"),
    ({"conversations": [{"from": "gpt", "value": None}]}, "the text of a turn is null"),
    ({"conversations": [{"from": "gpt", "value": ""}]}, "the text of a turn is an empty text"),
]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize(("fields", "message"), BAD_RECORDS, ids=str)
def test_a_field_of_a_wrong_type_is_an_error_that_names_file_and_record(
    tmp_path: Path, name: str, fields: Any, message: str
):
    good = {"id": "0", "image": "a.png", "caption": "a cat"}
    bad = fields if not isinstance(fields, dict) else {"id": "1", "caption": "a cat", **fields}
    data = write_records(tmp_path / "data", [good, bad], name)
    place = "record 1" if name == "data.json" else "line 2"
    if not isinstance(fields, dict) and name == "data.jsonl":
        message = "not a JSON object"
    for reader in (lambda: read_samples(data), lambda: list(read_images(str(data)))):
        with pytest.raises(InvalidInput) as error:
            reader()
        assert str(error.value).startswith(f"{data}, {place}: ")
        assert message in str(error.value)
    with pytest.raises(InvalidInput, match=place):
        load_task("captions", TaskOptions(data))


def test_a_split_that_is_no_text_is_an_error_where_a_split_is_asked_for(tmp_path: Path):
    data = write_records(tmp_path / "data", [{"image": "a.png", "caption": "x", "split": ["test"]}])
    assert len(read_samples(data)) == 1
    with pytest.raises(InvalidInput, match="record 0: 'split' is a list"):
        read_samples(data, split="test")


def test_a_data_set_without_images_is_not_recorded_as_an_empty_map(tmp_path: Path):
    data = write_records(tmp_path / "data", [{"id": "1", "conversations": TURNS}])
    for columns in (Columns(), Columns(image="foto")):
        with pytest.raises(InvalidInput, match="no sample in it has an image"):
            list(read_images(str(data), columns=columns))


# one path guard


@pytest.mark.parametrize("name", ["../outside.png", "sub/../../outside.png", "/etc/hostname", "link.png"])
def test_an_image_outside_is_refused_by_ingest_record_train_and_eval_alike(tmp_path: Path, name: str):
    records = [{"id": "good", "image": "a.png", "caption": "x"}, {"id": "bad", "image": name, "caption": "y"}]
    data = write_records(tmp_path / "data", records, "data.jsonl")
    (tmp_path / "data" / "sub").mkdir()
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "outside.png")
    reason = "the image's path leads out of the folder of the images"
    for items in (list(read(str(data))), list(read_images(str(data)))):
        assert [type(item) for item in items] == [Pair, Rejected]
        assert isinstance(items[1], Rejected)
        assert items[1].key == "bad"
        assert items[1].origin == f"{data}:2"
        assert reason in items[1].reason
    if name == "link.png":  # a link is followed when the image is read
        place = read_samples(data)[1].images[0]
        with pytest.raises(InvalidInput, match=rf"{reason}: .*link\.png"):
            place.read()
        with pytest.raises(InvalidInput, match=reason):
            image_place(name, tmp_path / "data", "here").read()
    else:
        with pytest.raises(InvalidInput, match=rf"data\.jsonl, line 2: {reason}.*data\.allow_outside"):
            read_samples(data)
        with pytest.raises(InvalidInput, match=f"here: {reason}"):
            image_place(name, tmp_path / "data", "here")
    allowed = read_samples(data, allow_outside=True)[1].images[0].read()
    if not name.startswith("/"):
        assert allowed == (tmp_path / "outside.png").read_bytes()
    assert [item.image for item in read_images(str(data), allow_outside=True) if isinstance(item, Pair)][
        1
    ] == allowed


def test_an_absolute_path_and_a_link_inside_the_folder_are_read(tmp_path: Path):
    data = write_records(
        tmp_path / "data",
        [{"image": str(tmp_path / "data" / "a.png"), "caption": "x"}, {"image": "in.png", "caption": "y"}],
    )
    (tmp_path / "data" / "in.png").symlink_to("b.png")
    assert [place.images[0].read() for place in read_samples(data)] == [
        (tmp_path / "data" / f"{letter}.png").read_bytes() for letter in "ab"
    ]


# streams


def test_a_json_list_is_read_in_pieces(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("tagstore.readers.json_records._JSON_BUFFER", 7)
    records = [
        {
            "id": 1,
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>\nWhat, is ]this}?"}],
        },
        {"id": "text only", "conversations": []},
        {"id": "3", "image": "missing.png"},
        {"id": "4", "image": "../a.png"},
    ]
    path = write_records(tmp_path / "images", records)
    path = path.rename(tmp_path / "data.json")
    items = list(read_images(str(path), images=str(tmp_path / "images")))
    assert items[0] == Pair("1", picture("red", "circle", shift=2), (), origin=f"{path}#0")
    assert [type(item) for item in items[1:]] == [Rejected, Rejected]
    assert isinstance(items[2], Rejected)
    assert "leads out" in items[2].reason
    lines = tmp_path / "data.jsonl"
    lines.write_text("".join(json.dumps(r) + "\n" for r in records))
    assert [i.key for i in read_images(str(lines), images=str(tmp_path / "images"))] == ["1", "3", "4"]
    for text, message in (
        ('{"id": 1}', "no JSON list"),
        ('[{"id": 1', "ends before"),
        ('[{"image": "a.png"} x]', "is no JSON"),
    ):
        path.write_text(text)
        with pytest.raises(InvalidInput, match=message):
            list(read_images(str(path), images=str(tmp_path / "images")))
    path.write_text('[{"image": "a.png"}]')
    with pytest.raises(InvalidInput, match="record 0: no 'sku': name the field that holds the key"):
        list(read_images(str(path), images=str(tmp_path / "images"), columns=Columns(key="sku")))
    with pytest.raises(NotFound, match="no directory"):
        read_images(str(path), images=str(tmp_path / "nowhere"))


def test_lines_may_be_gzipped_and_begin_with_a_mark(tmp_path: Path):
    data = write_records(tmp_path / "data", MIXED[:-1], "data.jsonl")
    packed = data.with_name("data.jsonl.gz")
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + data.read_bytes()))
    assert read_samples(packed) == read_samples(data)
    marked = write_records(tmp_path / "data", MIXED)
    plain = read_samples(marked)
    marked.write_bytes(b"\xef\xbb\xbf \n" + marked.read_bytes())
    assert read_samples(marked) == plain
    noise = "".join(f'{{"image": "a.png", "caption": "{os.urandom(20).hex()}"}}\n' for _ in range(2000))
    packed.write_bytes(gzip.compress(noise.encode())[:30_000])
    with pytest.raises(InvalidInput, match=r"data\.jsonl\.gz, line \d+: damaged or cut off"):
        list(read_lines(packed))


def test_memory_does_not_grow_with_a_json_list(tmp_path: Path):
    peaks = []
    for count in (1000, 5000):
        records = [{"id": str(i), "image": "a.png", "conversations": TURNS} for i in range(count)]
        data = write_records(tmp_path / "data", records)
        tracemalloc.start()
        assert sum(1 for _ in read_images(str(data))) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.2 + 20_000


def test_images_of_a_shard_are_passed_over_and_read_by_place(tmp_path: Path):
    samples = read_samples(write_shard(tmp_path / "a.tar", 6))
    place = samples[3].images[0]
    with (tmp_path / "a.tar").open("rb") as file:
        file.seek(place.offset)
        assert file.read(place.length) == place.read()
    os.truncate(tmp_path / "a.tar", place.offset + 1)
    with pytest.raises(NotFound, match="ends before byte"):
        place.read()
    with pytest.raises(NotFound, match="cannot read"):
        Place(tmp_path / "gone.png").read()


def test_json_and_shards_are_read_without_torch_and_pyarrow(tmp_path: Path):
    data = write_records(tmp_path / "data", MIXED)
    shard = write_shard(tmp_path / "a.tar", 3)
    program = (
        "import sys\n"
        "from tagstore.readers.samples import read_images, read_samples\n"
        f"assert len(read_samples({str(data)!r})) == 7 and len(read_samples({str(shard)!r})) == 3\n"
        f"assert len(list(read_images({str(data)!r}))) == 7\n"
        "heavy = {'torch', 'pyarrow', 'PIL', 'spacy', 'faiss', 'lmdb', 'grpc'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
