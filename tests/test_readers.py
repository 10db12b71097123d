"""Every format gives the same pairs; what cannot be used is rejected with its reason and the rest goes on."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import tarfile
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from tagstore.errors import InvalidInput, NotFound
from tagstore.readers import Columns, detect_format, read
from tagstore.readers.sources import _braces
from tagstore.types import Pair, Rejected

JPEG = b"\xff\xd8\xff not decoded here"


def pairs(items: Iterable[Pair | Rejected]) -> list[tuple[str, tuple[str, ...]]]:
    return [(item.key, item.captions) for item in items if isinstance(item, Pair)]


def reasons(items: Iterable[Pair | Rejected]) -> dict[str, str]:
    return {item.key: item.reason for item in items if isinstance(item, Rejected)}


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes | str]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members:
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, caption: str = "a cat", **fields: Any) -> list[tuple[str, bytes | str]]:
    return [
        (f"{key}.jpg", JPEG),
        (f"{key}.txt", caption),
        (f"{key}.json", json.dumps({"key": key, "caption": caption, **fields})),
    ]


# folder
# ------------------------------


def test_folder(tmp_path: Path):
    images = ("b.JPG", "a.png", "in/ner/a.b.webp", ".hidden/c.jpg", ".c.jpg")
    captions = {
        "b.txt": "\ufeffa black cat\r\n\r\n  two cats  \r\na black cat\n",
        "a.txt": "ein süßer Kätzchen 🐈\n猫が二匹",
        "in/ner/a.b.txt": "x" * 10_000,
    }
    write(tmp_path, dict.fromkeys(images, JPEG) | captions)
    assert detect_format(str(tmp_path)) == "folder"
    items = list(read(str(tmp_path)))
    assert pairs(items) == [
        ("a", ("ein süßer Kätzchen 🐈", "猫が二匹")),
        ("b", ("a black cat", "two cats")),
        ("in/ner/a.b", ("x" * 10_000,)),
    ]
    assert not reasons(items)
    assert items[0] == Pair("a", JPEG, ("ein süßer Kätzchen 🐈", "猫が二匹"), {}, str(tmp_path / "a.png"))


def test_folder_rejects_and_goes_on(tmp_path: Path):
    images = ("alone.jpg", "blank.jpg", "latin.jpg", "twice.jpg", "twice.png", "zz.jpg")
    captions = {
        "blank.txt": " \n\t\n",
        "empty.txt": "its image is found to be empty when it is decoded",
        "gone.txt": "no image",
        "latin.txt": "caf\xe9".encode("latin-1"),
        "large.txt": "a large image",
        "twice.txt": "one of them",
        "zz.txt": "the last one",
    }
    write(tmp_path, dict.fromkeys(images, JPEG) | captions | {"empty.jpg": b"", "large.jpg": b"x" * 101})
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "link.txt").write_text("a broken link")
    (tmp_path / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "pipe.txt").write_text("a pipe that nobody writes to")
    items = list(read(str(tmp_path), max_image_bytes=100))
    assert [key for key, _ in pairs(items)] == ["empty", "twice", "zz"]
    rejections = reasons(items)
    for key, reason in {
        "alone": "no caption file: ",
        "blank": "no caption",
        "gone": "no image: ",
        "latin": "not UTF-8: latin.txt has byte 0xe9 at offset 3",
        "large": "larger than the limit: large.jpg has more than 100 bytes",
        "twice": "two images have the same key: ",
        "link": "a file is missing: link.jpg",
        "loop": "leads back",
        "pipe": "not a regular file",
    }.items():
        assert reason in rejections.pop(key)
    assert not rejections


def test_an_unreadable_file(tmp_path: Path):
    text = "a file that answers every read with an error, whoever asks"
    write(tmp_path, {"a.txt": text, "b.jpg": JPEG, "b.txt": "readable"})
    (tmp_path / "a.jpg").symlink_to("/proc/self/mem")
    items = list(read(str(tmp_path)))
    assert pairs(items) == [("b", ("readable",))]
    assert "a file cannot be read: a.jpg (Input/output error)" in reasons(items)["a"]


def test_a_file_name_that_is_no_text(tmp_path: Path):
    write(tmp_path, {"a.jpg": JPEG, "a.txt": "a cat"})
    for suffix in (b".jpg", b".txt"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9" + suffix)).write_bytes(JPEG)
    items = list(read(str(tmp_path)))
    assert pairs(items) == [("a", ("a cat",))]
    (rejection,) = [item for item in items if isinstance(item, Rejected)]
    "".join((rejection.key, rejection.reason, rejection.origin)).encode()


# tables as text
# ------------------------------


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "tsv", "tsv.gz"])
def test_csv_and_tsv(tmp_path: Path, suffix: str):
    text = "\ufeffimage,title,colour\r\nimages/1.jpg,Red shirt,red\r\nimages/2.jpg,Blue hat,blue\r\n"
    data = (text if "csv" in suffix else text.replace(",", "\t")).encode()
    table = {f"items.{suffix}": gzip.compress(data) if "gz" in suffix else data}
    write(tmp_path, {"images/1.jpg": JPEG, "images/2.jpg": JPEG} | table)
    for source in (tmp_path, tmp_path / f"items.{suffix}"):
        items = list(read(str(source)))
        assert pairs(items) == [("images/1", ("Red shirt",)), ("images/2", ("Blue hat",))]
        origin = f"{tmp_path}/items.{suffix}:3"
        assert items[1] == Pair("images/2", JPEG, ("Blue hat",), {"colour": "blue"}, origin)


def test_csv_quoting(tmp_path: Path):
    table = 'image,caption,key\n1.jpg,"two\nlines, a ""word""",x\n\n1.jpg,plain,y\n'
    write(tmp_path, {"1.jpg": JPEG, "t.csv": table})
    first, second = read(str(tmp_path))
    assert isinstance(first, Pair)
    assert first.captions == ('two\nlines, a "word"',)
    assert (first.origin, second.origin) == (f"{tmp_path}/t.csv:2", f"{tmp_path}/t.csv:5")


def test_tsv_keeps_quotation_marks(tmp_path: Path):
    table = (
        'image\tkey\tcaption\n1.jpg\t1\t" the best day " , she said\n'
        '1.jpg\t2\t"as pandas quotes ""this"""\n1.jpg\t3\t"open\n1.jpg\t4\tlast\n'
    )
    write(tmp_path, {"1.jpg": JPEG, "t.tsv": table})
    captions = [captions for _, captions in pairs(read(str(tmp_path)))]
    assert captions == [('" the best day " , she said',), ('as pandas quotes "this"',), ('"open',), ("last",)]


def test_csv_rejects_and_goes_on(tmp_path: Path):
    table = (
        b"image,caption\n"
        b"1.jpg,good\n"
        b"gone.jpg,missing image\n"
        b"1.jpg,\n"
        b"1.jpg,too,many\n"
        b",no image\n"
        b"https://example.org/1.jpg,a url\n"
        b"1.jpg,caf\xe9\n"
        b'1.jpg,"open "quote\n'
        b"../1.jpg,escapes\n"
        b"/etc/passwd,escapes\n"
        b"out.jpg,escapes by a link\n"
        b"sub,a folder\n"
        b"bad\0name.jpg,a name that cannot be\n"
        b"in.jpg,a link that stays inside\n"
        b"1.jpg,last\n"
    )
    write(tmp_path, {"1.jpg": JPEG, "t/1.jpg": JPEG, "t/t.csv": table, "t/sub/x": ""})
    (tmp_path / "t/out.jpg").symlink_to(tmp_path / "1.jpg")
    (tmp_path / "t/in.jpg").symlink_to("1.jpg")
    items = list(read(str(tmp_path / "t")))
    assert [captions for _, captions in pairs(items)] == [("good",), ("a link that stays inside",), ("last",)]
    rejected = [item for item in items if isinstance(item, Rejected)]
    expected = [
        "a file is missing: gone.jpg",
        "no caption",
        "wrong number of fields: the row has 3, the first line names 2",
        "no image",
        "URL: https://example.org/1.jpg, download",
        *("not UTF-8", "quote", *["leads out of"] * 3, "not a regular file", "null"),
    ]
    assert [int(item.origin.rpartition(":")[2]) for item in rejected] == list(range(3, 15))
    for item, part in zip(rejected, expected, strict=True):
        assert part in item.reason
    allowed = pairs(read(str(tmp_path / "t"), allow_outside=True))
    assert ("../1", ("escapes",)) in allowed
    assert ("out", ("escapes by a link",)) in allowed


def test_a_quote_left_open_swallows_no_pair_in_silence(tmp_path: Path):
    write(tmp_path, {"1.jpg": JPEG, "t.csv": 'image,caption\n1.jpg,good\n1.jpg,"open\n1.jpg,a\n1.jpg,b\n'})
    items = list(read(str(tmp_path)))
    assert pairs(items) == [("1", ("good",))]
    assert "lines 3 to 5" in reasons(items)["t.csv:3"]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "ndjson"])
def test_jsonl(tmp_path: Path, suffix: str):
    captions = {"captions": ["a cat", "  ", "a black cat"], "caption": "a cat"}
    records = [
        {"image": "i/1.jpg", **captions, "size": [3, 4], "score": float("nan")},
        {"image": base64.b64encode(JPEG * 5).decode(), "caption": "embedded", "deep": {"a": None}},
        {"image": "data:image/jpeg;base64," + base64.b64encode(JPEG).decode(), "caption": "as a data url"},
        {"image": {"bytes": None, "path": "i/1.jpg"}, "caption": "as datasets writes it"},
    ]
    data = "\n".join(map(json.dumps, records)).encode()
    write(tmp_path, {"i/1.jpg": JPEG, f"captions.{suffix}": gzip.compress(data) if "gz" in suffix else data})
    items = [item for item in read(str(tmp_path)) if isinstance(item, Pair)]
    stem = f"captions.{suffix}".rpartition(".")[0]
    assert [(item.key, item.captions) for item in items] == [
        ("i/1", ("a cat", "a black cat")),
        (f"{stem}:2", ("embedded",)),
        (f"{stem}:3", ("as a data url",)),
        ("i/1", ("as datasets writes it",)),
    ]
    assert [item.image for item in items] == [JPEG, JPEG * 5, JPEG, JPEG]
    assert items[0].metadata == {"size": [3, 4], "score": None}
    assert items[1].metadata == {"deep": {"a": None}}


def test_jsonl_rejects_and_goes_on(tmp_path: Path):
    lines = [
        b'{"image": "1.jpg", "caption": "good"}',
        b'{"image": "1.jpg", "caption": ',
        b'["image", "1.jpg"]',
        b'{"image": "1.jpg", "caption": 5}',
        b'{"image": 5, "caption": "x"}',
        b'{"caption": "no image"}',
        b'{"image": "1.jpg"}',
        b'{"image": "1.jpg", "caption": "half \\ud83d"}',
        b'{"image": "\\ud83d.jpg", "caption": "x"}',
        b'{"image": "1.jpg", "caption": "caf\xe9"}',
        b'{"image": "' + b"A" * 65 + b'", "caption": "broken base64"}',
        b"[" * 100_000,
        b"",
        b'{"image": "1.jpg", "caption": "last"}',
    ]
    write(tmp_path, {"1.jpg": JPEG, "t.jsonl": b"\r\n".join(lines)})
    items = list(read(str(tmp_path)))
    assert [captions for _, captions in pairs(items)] == [("good",), ("last",)]
    rejections = {int(item.origin.rpartition(":")[2]): item for item in items if isinstance(item, Rejected)}
    expected = ["not JSON", "not a JSON object", "not a text: ", "not a path, ", "no image", "no caption"]
    expected += ["surrogate", "", "UTF-8", "base64", "not JSON"]
    for line, part in enumerate(expected, 2):
        assert part in rejections[line].reason
        "".join((rejections[line].key, rejections[line].reason)).encode()
    assert len(rejections) == 11


def test_a_gzipped_table_that_is_cut_off_gives_what_came_before(tmp_path: Path):
    captions = (f'"{os.urandom(20).hex()}"' for _ in range(2000))
    lines = "".join(f'{{"image": "1.jpg", "key": {c}, "caption": {c}}}\n' for c in captions)
    data = gzip.compress(lines.encode())
    write(tmp_path, {"1.jpg": JPEG, "t.jsonl.gz": data[: len(data) // 2]})
    items = list(read(str(tmp_path)))
    assert len(pairs(items)) > 500
    assert isinstance(items[-1], Rejected)
    assert "damaged or cut off: what came before line" in items[-1].reason
    assert len(reasons(items)) == 1


def test_a_line_without_an_end_is_bounded(tmp_path: Path):
    lines = '{"image": "1.jpg", "caption": "good"}\n' + "x" * (2**20 + 200)
    write(tmp_path, {"1.jpg": JPEG, "t.jsonl": lines})
    items = list(read(str(tmp_path), max_image_bytes=100))
    assert len(pairs(items)) == 1
    assert "larger than the limit" in reasons(items)["t.jsonl:2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "empty"),
        ("t.csv", b"image,image,caption\n", "same name"),
        ("t.csv", b"image,caption\n", "no pair"),
        ("t.csv", "image,caption\n".encode("utf-16"), "UTF-16.*UTF-8 is expected"),
        ("t.csv.gz", b"image,caption\n", "cannot be read"),
        ("t.jsonl", b"", "empty"),
        ("t.jsonl", b"[\n{}\n]", "JSON array"),
        ("t.jsonl", b"{\n", "not JSON"),
        ("t.parquet", b"PAR1 not really", "not a Parquet file"),
        ("t.tar", b"", "not a tar file"),
        ("t.tar", b"x" * 2000, "not a tar file"),
        ("t.tar", b"\0" * 10240, "no pair"),
    ],
)
def test_a_file_that_cannot_be_used_at_all(tmp_path: Path, name: str, content: bytes, message: str):
    write(tmp_path, {name: content})
    with pytest.raises(InvalidInput, match=message):
        list(read(str(tmp_path / name)))


# columns
# ------------------------------


def test_columns_by_option(tmp_path: Path):
    table = "sku,picture,brand,kind,id\nA1,1.jpg,Oatly,oat milk,7\nA2,1.jpg,,soy milk,8\n"
    write(tmp_path, {"1.jpg": JPEG, "t.csv": table})
    columns = Columns(image="picture", caption=("brand", "kind"), key="sku")
    first, second = read(str(tmp_path), columns=columns)
    assert isinstance(first, Pair)
    assert (first.key, first.captions, first.metadata) == ("A1", ("Oatly", "oat milk"), {"id": "7"})
    assert pairs([second]) == [("A2", ("soy milk",))]
    assert pairs(read(str(tmp_path), columns=Columns(image="picture", caption="kind"))) == [
        ("7", ("oat milk",)),
        ("8", ("soy milk",)),
    ]


def test_an_empty_key_is_rejected(tmp_path: Path):
    lines = [json.dumps({"id": key, "image": "1.jpg", "text": "x"}) for key in (0, "", None, 1.5)]
    write(tmp_path, {"1.jpg": JPEG, "t.jsonl": "\n".join(lines)})
    items = list(read(str(tmp_path)))
    assert pairs(items) == [("0", ("x",))]
    assert len([item for item in items if isinstance(item, Rejected) and "key" in item.reason]) == 3


@pytest.mark.parametrize(
    "columns",
    [Columns(image="foto"), Columns(caption="foto"), Columns(key="foto"), Columns(caption=["name", "foto"])],
)
@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet"])
def test_an_unknown_column_lists_those_there_are(tmp_path: Path, name: str, columns: Columns):
    row = {"image": "1.jpg", "name": "a cat", "colour": "black"}
    write(tmp_path, {"1.jpg": JPEG})
    if name == "t.parquet":
        parquet.write_table(pa.Table.from_pylist([row]), tmp_path / name)
    else:
        table = ",".join(row) + "\n" + ",".join(row.values())
        texts = {"t.csv": table, "t.tsv": table.replace(",", "\t"), "t.jsonl": json.dumps(row)}
        write(tmp_path, {name: texts[name]})
    with pytest.raises(InvalidInput, match="no column 'foto'; there are: image, name, colour"):
        list(read(str(tmp_path), columns=columns))
    message = r"which column holds the caption\? There are: image, name, colour.*--caption-column"
    with pytest.raises(InvalidInput, match=message):
        list(read(str(tmp_path)))


def test_a_table_of_urls_says_what_to_do(tmp_path: Path):
    write(tmp_path, {"t.csv": "url,caption\nhttp://example.org/1.jpg,x\n"})
    with pytest.raises(InvalidInput, match=r"--image-column|img2dataset"):
        list(read(str(tmp_path / "t.csv")))


def test_a_folder_has_no_columns(tmp_path: Path):
    write(tmp_path, {"a.jpg": JPEG, "a.txt": "x"})
    with pytest.raises(InvalidInput, match="no columns"):
        read(str(tmp_path), columns=Columns(caption="text"))


# parquet
# ------------------------------


def test_parquet(tmp_path: Path):
    rows = [
        {"image": {"bytes": JPEG, "path": "x.jpg"}, "caption": ["a cat", "two cats"], "size": 3},
        {"image": {"bytes": None, "path": "i/1.jpg"}, "caption": ["from a path"], "size": None},
        {"image": {"bytes": None, "path": None}, "caption": ["nothing"], "size": 1},
        {"image": {"bytes": JPEG, "path": None}, "caption": None, "size": 1},
        {"image": {"bytes": JPEG, "path": None}, "caption": ["last"], "size": 1},
    ]
    write(tmp_path, {"i/1.jpg": JPEG})
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    items = list(read(str(tmp_path)))
    assert pairs(items) == [("t:1", ("a cat", "two cats")), ("i/1", ("from a path",)), ("t:5", ("last",))]
    assert reasons(items) == {"t:3": "no image", "t:4": "no caption"}
    assert items[0] == Pair("t:1", JPEG, ("a cat", "two cats"), {"size": 3}, f"{tmp_path}/t.parquet:1")


def test_parquet_of_bytes_and_paths_and_odd_values(tmp_path: Path):
    write(tmp_path, {"1.jpg": JPEG})
    table = pa.table(
        {
            "key": ["a", "b", "c"],
            "image": pa.array([JPEG, b"", None], pa.large_binary()),
            "text": pa.array([b"good", b"empty image", b"x"]).cast(pa.string()),
            "day": pa.array([0, None, 1], pa.date32()),
            "thumbnail": [b"x", b"x", b"x"],
            "score": [float("inf"), 0.5, 1.0],
        }
    )
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=1)
    items = list(read(str(tmp_path)))
    assert pairs(items) == [("a", ("good",)), ("b", ("empty image",))]
    assert reasons(items) == {"c": "no image"}
    assert isinstance(items[0], Pair)
    assert items[0].metadata == {"day": "1970-01-01", "score": None}
    table = pa.table({"path": ["1.jpg", "../1.jpg"], "title": ["x", "y"]})
    parquet.write_table(table, tmp_path / "t.parquet")
    items = list(read(str(tmp_path / "t.parquet")))
    assert pairs(items) == [("1", ("x",))]
    assert "leads out" in reasons(items)["../1"]


def test_a_parquet_text_that_is_not_utf8_costs_its_row_only(tmp_path: Path):
    buffers = pa.array([b"a cat", b"caf\xe9", b"last"], pa.binary()).buffers()
    texts = pa.Array.from_buffers(pa.string(), 3, buffers)
    parquet.write_table(pa.table({"image": [JPEG] * 3, "text": texts}), tmp_path / "t.parquet")
    items = list(read(str(tmp_path)))
    assert pairs(items) == [("t:1", ("a cat",)), ("t:3", ("last",))]
    assert "not UTF-8" in reasons(items)["t.parquet:2"]


def test_parquet_damaged_in_the_middle_gives_what_came_before(tmp_path: Path):
    table = pa.table({"image": [os.urandom(3000) for _ in range(200)], "text": ["x"] * 200})
    path = tmp_path / "t.parquet"
    parquet.write_table(table, path, row_group_size=50, compression="zstd")
    data = bytearray(path.read_bytes())
    start = parquet.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    data[start : start + 200] = b"\xff" * 200
    path.write_bytes(data)
    items = list(read(str(path)))
    assert len(pairs(items)) >= 64
    assert "damaged or cut off: what came before row" in list(reasons(items).values())[-1]


# webdataset
# ------------------------------


def test_webdataset(tmp_path: Path):
    members = [
        *sample("000", "a cat", captions=["a cat", "a black cat"], width=3),
        ("000.cls", "7"),
        ("./001.png", JPEG),
        ("./001.txt", "first line\n\nsecond line\n"),
        ("in/002.webp", JPEG),
        ("in/002.json", json.dumps({"caption": "only json", "status": "success"})),
        ("__private__", "x"),
        ("._003.jpg", "a Mac was here"),
        ("003.jpeg", JPEG),
        ("003.txt", "last"),
    ]
    for name, mode in (("t.tar", "w"), ("t.tar.gz", "w:gz")):
        items = list(read(str(write_tar(tmp_path / name, members, mode))))
        assert pairs(items) == [
            ("000", ("a cat", "a black cat")),
            ("001", ("first line", "second line")),
            ("in/002", ("only json",)),
            ("003", ("last",)),
        ]
        assert not reasons(items)
        assert items[0] == Pair("000", JPEG, ("a cat", "a black cat"), {"width": 3}, f"{tmp_path}/{name}!000")


def test_webdataset_rejects_and_goes_on(tmp_path: Path):
    members: list[tuple[str, bytes | str]] = [
        *(*sample("good"), ("a.txt", "no image")),
        *(("b.jpg", JPEG), ("b.cls", "1")),
        *(("c.jpg", JPEG), ("c.json", "{")),
        *(("d.jpg", b"x" * 101), ("d.txt", "too large")),
        *(("e.jpg", JPEG), ("e.txt", "caf\xe9".encode("latin-1"))),
        *(("f.jpg", JPEG), ("f.json", '{"caption": 5}')),
        *(("g.jpg", JPEG), ("g.json", "[]"), *sample("last")),
    ]
    items = list(read(str(write_tar(tmp_path / "t.tar", members)), max_image_bytes=100))
    assert [key for key, _ in pairs(items)] == ["good", "last"]
    rejections = reasons(items)
    expected = ["no image: its files are txt", "no caption", "not JSON: c.json", "d.jpg has more"]
    expected += ["not UTF-8", "not a text", "not a JSON object"]
    for key, part in zip("abcdefg", expected, strict=True):
        assert part in rejections.pop(key)
    assert not rejections


def test_webdataset_columns(tmp_path: Path):
    members = [*sample("0", "short", alt="the long text", sku="A1"), *sample("1", "short", sku="A2")]
    path = str(write_tar(tmp_path / "t.tar", members))
    items = list(read(path, columns=Columns(caption="alt", key="sku")))
    assert pairs(items) == [("A1", ("the long text",))]
    assert "no field 'alt'" in reasons(items)["1"]
    with pytest.raises(InvalidInput, match="no field 'foto': the json of '0' has key, caption, alt, sku"):
        list(read(path, columns=Columns(caption="foto")))
    assert pairs(read(path, columns=Columns(caption="txt"))) == [("0", ("short",)), ("1", ("short",))]


def test_a_shard_cut_off_anywhere_gives_what_came_before_and_one_rejection(tmp_path: Path):
    members = [member for i in range(6) for member in sample(f"{i}")]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    end = whole.rstrip(b"\0")
    for cut in range(512, len(end), 256):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:cut])
        try:
            items = list(read(str(path)))
        except InvalidInput:
            assert cut < 512 * 6
            continue
        # Whether a shard's very first sample is whole shows only when the second begins.
        complete = cut // (6 * 512) if cut >= 7 * 512 else 0
        keys = [key for key, _ in pairs(items)]
        assert keys == [str(i) for i in range(len(keys))]
        assert len(keys) == complete or (len(keys) == complete + 1 and cut % 3072 > 2560)
        assert len(items) == len(pairs(items)) + 1
        assert isinstance(items[-1], Rejected)
        assert "damaged or cut off" in items[-1].reason


def test_a_damaged_shard_and_a_damaged_gzip(tmp_path: Path):
    members = [member for i in range(6) for member in sample(f"{i}")]
    data = bytearray(write_tar(tmp_path / "t.tar", members).read_bytes())
    data[512 * 6 * 3 : 512 * 6 * 3 + 200] = b"\xff" * 200
    (tmp_path / "t.tar").write_bytes(data)
    items = list(read(str(tmp_path / "t.tar")))
    assert [key for key, _ in pairs(items)] == ["0", "1", "2"]
    assert len(reasons(items)) == 1
    members = [member for i in range(40) for member in ((f"{i}.jpg", os.urandom(4000)), (f"{i}.txt", "x"))]
    data = bytearray(write_tar(tmp_path / "t.tgz", members, "w:gz").read_bytes())
    (tmp_path / "t.tgz").write_bytes(data[: len(data) // 2])
    items = list(read(str(tmp_path / "t.tgz")))
    assert 10 < len(pairs(items)) < 30
    assert len(reasons(items)) == 1


# sources
# ------------------------------


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("a", ["a"]),
        ("a-{08..10}.tar", ["a-08.tar", "a-09.tar", "a-10.tar"]),
        ("a-{9..11}", ["a-9", "a-10", "a-11"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
        ("{a,{b,c}d}", ["a", "bd", "cd"]),
        ("{a}", ["{a}"]),
    ],
)
def test_braces(pattern: str, expanded: list[str]):
    assert list(dict.fromkeys(_braces(pattern))) == expanded


@given(st.integers(0, 999), st.integers(0, 50), st.integers(1, 5))
def test_braces_count_like_a_shell(first: int, more: int, width: int):
    names = list(_braces(f"s-{{{first:0{width}d}..{first + more:0{width}d}}}.tar"))
    assert len(names) == more + 1
    assert [int(name[2:-4]) for name in names] == list(range(first, first + more + 1))


def test_patterns_of_shards(tmp_path: Path):
    for i in range(3):
        write_tar(tmp_path / f"train-{i:03d}.tar", sample(f"t{i}"))
    write_tar(tmp_path / "val-000.tar", sample("v"))
    for source, keys in {
        "train-{000..002}.tar": ["t0", "t1", "t2"],
        "train-{001,000}.tar": ["t1", "t0"],
        "*.tar": ["t0", "t1", "t2", "v"],
        "{val,train}-*.tar": ["v", "t0", "t1", "t2"],
        "train-00[12].tar": ["t1", "t2"],
        "**/val-*.tar": ["v"],
        "": ["t0", "t1", "t2", "v"],
    }.items():
        assert [key for key, _ in pairs(read(str(tmp_path / source)))] == keys
        assert detect_format(str(tmp_path / source)) == "webdataset"
    with pytest.raises(NotFound, match=r"nothing there for .*train-003.tar, .*train-004.tar"):
        read(str(tmp_path / "train-{000..004}.tar"))


def test_keys_of_tables_are_relative_to_the_fixed_part_of_a_pattern(tmp_path: Path):
    for name in ("a", "b"):
        write(tmp_path / name, {"i/1.jpg": JPEG, "items.csv": f"image,caption\ni/1.jpg,{name}\n"})
    assert pairs(read(f"{tmp_path}/*/items.csv")) == [("a/i/1", ("a",)), ("b/i/1", ("b",))]


def test_one_bad_file_among_good_ones_is_a_rejection(tmp_path: Path):
    write_tar(tmp_path / "1.tar", sample("good"))
    write(tmp_path, {"0.tar": b"not a tar" * 100})
    for order in ("{0,1}", "{1,0}"):
        items = list(read(f"{tmp_path}/{order}.tar"))
        assert [key for key, _ in pairs(items)] == ["good"]
        assert "not a tar file" in reasons(items)["0.tar"]


def test_a_name_that_looks_like_a_pattern_is_a_file_first(tmp_path: Path):
    path = write_tar(tmp_path / "a{0..1}[x].tar", sample("good"))
    assert len(pairs(read(str(path)))) == 1


def test_img2dataset_output(tmp_path: Path):
    for i in range(2):
        write_tar(tmp_path / f"{i:05d}.tar", sample(f"{i:05d}0000"))
        write(tmp_path, {f"{i:05d}.parquet": b"", f"{i:05d}_stats.json": "{}"})
    assert [key for key, _ in pairs(read(str(tmp_path)))] == ["000000000", "000010000"]


@pytest.mark.parametrize(
    ("files", "listed"),
    [
        (["a.csv", "b.jsonl"], "a.csv, b.jsonl"),
        (["a.csv", "b.csv"], "a.csv, b.csv"),
        (["a.tar", "b.csv"], "b.csv, a.tar"),
        (["a.tar", "b.parquet"], "b.parquet, a.tar"),
        (["a.csv", "x.jpg", "x.txt"], "a.csv, images with caption files such as x.jpg"),
    ],
)
def test_an_ambiguous_folder_lists_what_was_found(tmp_path: Path, files: list[str], listed: str):
    write(tmp_path, dict.fromkeys(files, b"x"))
    with pytest.raises(InvalidInput, match=rf"more than one source in it \({listed}\).*--format"):
        read(str(tmp_path))


def test_format_overrides(tmp_path: Path):
    table = "image,caption\na.jpg,from the table\n"
    write(tmp_path, {"a.jpg": JPEG, "a.txt": "from the folder", "t.data": table, "u.csv": "x"})
    assert pairs(read(str(tmp_path), format="folder")) == [("a", ("from the folder",))]
    assert pairs(read(str(tmp_path / "t.data"), format="csv")) == [("a", ("from the table",))]
    with pytest.raises(NotFound, match="no file of format jsonl"):
        read(str(tmp_path), format="jsonl")
    with pytest.raises(InvalidInput, match="no format 'zip'; there are: folder, csv"):
        read(str(tmp_path), format="zip")
    with pytest.raises(InvalidInput, match="no folder"):
        read(str(tmp_path / "a.jpg"), format="folder")


def test_sources_that_are_none(tmp_path: Path):
    write(tmp_path, dict.fromkeys(("docs/readme.md", "mixed/a.csv", "mixed/b.tar"), b"x"))
    write(tmp_path, {"a.jpg": JPEG, "b.xyz": b""})
    (tmp_path / "empty").mkdir()
    for source, message in {
        "nothing": "no such file",
        "n*.tar": "nothing there for",
        "empty": "no images, no tables",
        "docs": "no images, no tables",
    }.items():
        with pytest.raises(NotFound, match=message):
            read(str(tmp_path / source))
    for source, message in {
        "a.jpg": "give the folder it lies in",
        "b.xyz": "name one of folder, csv",
        "mixed/*": "different formats",
        "*pt*": "matches folders",
    }.items():
        with pytest.raises(InvalidInput, match=message):
            read(str(tmp_path / source))
    with pytest.raises(InvalidInput, match="download it first"):
        read("https://example.org/train.tar")
    with pytest.raises(NotFound):
        read("x" * 5000)


# memory
# ------------------------------


def peak(source: Path) -> int:
    tracemalloc.start()
    try:
        assert sum(isinstance(item, Pair) for item in read(str(source))) >= 300
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["t.tar", "t.jsonl", "t.csv"])
def test_memory_does_not_grow_with_the_input(tmp_path: Path, name: str):
    peaks = []
    write(tmp_path, {"1.jpg": b"x" * 1000})
    for count in (300, 3000):
        if name == "t.tar":
            samples = (((f"{i}.jpg", b"x" * 1000), (f"{i}.txt", "x")) for i in range(count))
            write_tar(tmp_path / name, [member for sample in samples for member in sample])
        elif name == "t.jsonl":
            write(
                tmp_path,
                {
                    name: "".join(
                        f'{{"image": "1.jpg", "key": {i}, "caption": "a cat"}}\n' for i in range(count)
                    )
                },
            )
        else:
            write(
                tmp_path, {name: "image,key,caption\n" + "".join(f"1.jpg,{i},a cat\n" for i in range(count))}
            )
        peaks.append(peak(tmp_path / name))
    assert peaks[1] < peaks[0] * 1.2 + 20_000
