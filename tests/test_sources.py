"""Tables and folders as other programs write them give the pairs that a person means."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner
from PIL import Image
from pyarrow import parquet

from pictures import picture
from tagstore.cli import cli
from tagstore.client.urls import locate
from tagstore.encoding.images import FORMATS as FORMATS_READ
from tagstore.errors import InvalidInput
from tagstore.ingestion import ingest
from tagstore.readers import FORMATS, Layout, detect_format, read
from tagstore.types import Pair
from test_readers import JPEG, pairs, reasons, write, write_tar

EXPECTED = [("1", ("A red circle.", "A circle on a table.")), ("2", ("A blue square.",))]
ROWS = [(f"{key}.jpg", caption) for key, captions in EXPECTED for caption in captions]
IMAGES: dict[str, bytes | str] = {"1.jpg": JPEG, "2.jpg": JPEG + b"2"}


def arrow(rows: list[dict[str, object]], *, stream: bool) -> bytes:
    table, sink = pa.Table.from_pylist(rows), io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def records() -> list[dict[str, object]]:
    return [{"file_name": f"{key}.jpg", "captions": list(captions)} for key, captions in EXPECTED]


def coco() -> str:
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in (1, 2)]
    annotations = [
        {"id": i, "image_id": int(image[0]), "caption": caption} for i, (image, caption) in enumerate(ROWS)
    ]
    return json.dumps({"info": {}, "images": images, "annotations": annotations[::-1][1:] + annotations[-1:]})


def delimited(delimiter: str) -> str:
    return "".join(delimiter.join(row) + "\n" for row in [("image", "caption"), *ROWS])


SAVED = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
SOURCES: dict[str, dict[str, bytes | str]] = {
    "Flickr's captions.txt": {"captions.txt": delimited(",")},
    "CSV with semicolons": {"t.csv": delimited(";")},
    "CSV with tabs": {"t.csv": delimited("\t")},
    "CSV with bars": {"t.csv": delimited("|")},
    "JSON list": {"captions.json": json.dumps(records())},
    "COCO": {"captions_val.json": coco()},
    "Arrow file": {"t.arrow": arrow(records(), stream=False)},
    "saved dataset": {
        "data-00000-of-00001.arrow": arrow(records(), stream=True),
        "state.json": json.dumps(SAVED),
    },
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_pairs(tmp_path: Path, name: str):
    write(tmp_path, IMAGES | SOURCES[name])
    whole = name not in ("JSON list", "COCO", "Arrow file")  # beside images a description may be anything
    items = list(read(str(tmp_path if whole else tmp_path / next(iter(SOURCES[name])))))
    assert [(key, set(captions)) for key, captions in pairs(items)] == [(k, set(c)) for k, c in EXPECTED]
    assert not reasons(items)


def test_pictures_in_another_folder(tmp_path: Path):
    write(
        tmp_path, {"annotations/captions.json": coco(), **{f"train/{n}": data for n, data in IMAGES.items()}}
    )
    (tmp_path / "train" / "secret.jpg").symlink_to("/etc/hostname")
    [first, second] = read(str(tmp_path / "annotations/captions.json"), images=tmp_path / "train")
    assert [item.key for item in (first, second)] == ["1", "2"]
    refused = reasons(read(str(tmp_path / "annotations/captions.json")))
    assert all("a file is missing" in reason for reason in refused.values())


def test_a_saved_dataset_of_splits(tmp_path: Path):
    write(
        tmp_path,
        {
            "both/dataset_dict.json": '{"splits": ["train", "test"]}',
            "one/dataset_dict.json": '{"splits": ["train"]}',
        },
    )
    write(tmp_path / "one" / "train", IMAGES | SOURCES["saved dataset"])
    assert detect_format(str(tmp_path / "one")) == "arrow"
    assert [key for key, _ in pairs(read(str(tmp_path / "one")))] == ["train/1", "train/2"]
    with pytest.raises(InvalidInput, match=r"several splits \(train, test\): give .*both/train"):
        read(str(tmp_path / "both"))
    write(tmp_path, {"broken/state.json": "{}"})
    with pytest.raises(InvalidInput, match="a saved dataset whose description is damaged"):
        read(str(tmp_path / "broken"))


def test_paths_as_other_machines_write_them(tmp_path: Path):
    table = "image,caption\nimages\\1.jpg,one\n/images/2.jpg,two\nC:\\data\\3.jpg,three\n"
    write(tmp_path, {"t.csv": table, "images/1.jpg": JPEG, "images/2.jpg": JPEG})
    items = list(read(str(tmp_path / "t.csv")))
    assert [key for key, _ in pairs(items)] == ["images/1", "images/2"]
    assert "the image's path is one of another machine: C:\\data\\3.jpg" in next(
        iter(reasons(items).values())
    )
    write(tmp_path, {"t.csv": "image,caption\n..\\..\\etc\\hostname,out\n/etc/hostname,out\n"})
    assert all("leads out" in reason for reason in reasons(read(str(tmp_path / "t.csv"))).values())


def test_encodings(tmp_path: Path):
    text = "image,caption\n1.jpg,Un café à Nîmes\n"
    write(tmp_path, IMAGES | {"latin.csv": text.encode("latin-1"), "wide.csv": text.encode("utf-16")})
    for name, encoding in (("latin.csv", "latin-1"), ("wide.csv", "utf-16")):
        items = read(str(tmp_path / name), layout=Layout(encoding=encoding))
        assert pairs(items) == [("1", ("Un café à Nîmes",))]
    assert "say --encoding latin-1" in next(iter(reasons(read(str(tmp_path / "latin.csv"))).values()))
    with pytest.raises(InvalidInput, match="no encoding 'klingon'"):
        list(read(str(tmp_path / "latin.csv"), layout=Layout(encoding="klingon")))


def test_nested_and_binary_captions(tmp_path: Path):
    rows = [
        {"image": "1.jpg", "caption": [{"raw": "A red circle.", "tokens": ["a"]}]},
        {"image": "2.jpg", "caption": [{"words": "A", "tokens": ["a"]}]},
    ]
    write(tmp_path, IMAGES)
    parquet.write_table(
        pa.table({"image": ["1.jpg", "2.jpg"], "caption": [b"A red circle.", b"\xff"]}),
        tmp_path / "b.parquet",
    )
    items = list(read(str(tmp_path / "b.parquet")))
    assert (pairs(items), list(reasons(items).values())) == (
        [("1", ("A red circle.",))], ["not UTF-8: a caption of bytes, convert it"],
    )  # fmt: skip
    write(tmp_path, {"n.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    items = list(read(str(tmp_path / "n.jsonl")))
    assert pairs(items) == [("1", ("A red circle.",))]
    assert "it is an object of words, tokens, make a column of its text" in next(
        iter(reasons(items).values())
    )


def test_rows_of_one_picture_that_stand_apart(tmp_path: Path, mini):
    for name, shape in (("1", "circle"), ("2", "square")):
        (tmp_path / f"{name}.png").write_bytes(picture("red", shape))
    rows = "image,caption\n1.png,A red circle.\n1.png,A circle.\n2.png,A red square.\n1.png,A round thing.\n"
    write(tmp_path, {"t.csv": rows})
    report = ingest(str(tmp_path / "t.csv"), root=tmp_path / "root", store="s", encoder=mini)
    assert (report.entries, len(report.quarantined)) == (2, 1)
    assert "sort the source by its key" in report.quarantined[0].reason


def test_folders_as_captions(tmp_path: Path):
    write(tmp_path, {"granny_smith/1.jpg": JPEG, "blue sky/2.jpg": JPEG, "blue sky/2.txt": "its own"})
    items = read(str(tmp_path), layout=Layout(caption_from="folder"))
    assert pairs(items) == [("blue sky/2", ("its own",)), ("granny_smith/1", ("granny smith",))]
    assert "--caption-from folder" in reasons(read(str(tmp_path)))["granny_smith/1"]


def test_less_usual_pictures(tmp_path: Path, mini):
    image = Image.new("RGB", (64, 64), (200, 30, 30))
    heif = pytest.importorskip("pillow_heif")
    for name in ("a.jfif", "b.avif", "c.heic", "d.svg", "e.jxl"):
        (tmp_path / name).with_suffix(".txt").write_text("A red wall.")
    image.save(tmp_path / "a.jfif", "JPEG")
    image.save(tmp_path / "b.avif")
    heif.from_pillow(image).save(tmp_path / "c.heic")
    write(tmp_path, {"d.svg": "<svg/>", "e.jxl": b"\xff\x0a" + b"\0" * 40})
    report = ingest(str(tmp_path), root=tmp_path / "root", store="s", encoder=mini)
    assert report.entries == 3
    assert {r.key: r.reason.partition(", give")[0] for r in report.quarantined} == {
        "d": "a format that is not read: SVG", "e": "a format that is not read: JPEG XL",
    }  # fmt: skip


def test_shards_whose_samples_are_torn_apart(tmp_path: Path):
    names = ["1.jpg", "2.jpg", "1.txt", "2.txt"]
    write_tar(tmp_path / "apart.tar", [(name, JPEG if name.endswith("jpg") else "a cat") for name in names])
    items = list(read(str(tmp_path / "apart.tar")))
    assert not pairs(items)
    assert all(
        "files of a sample must follow one another" in item.reason
        for item in items
        if not isinstance(item, Pair)
    )
    dots = [
        (f"photo.{i}.{suffix}", JPEG if suffix == "jpg" else "a cat")
        for i in (1, 2)
        for suffix in ("jpg", "txt")
    ]
    write_tar(tmp_path / "dots.tar", dots)
    refused = [item for item in read(str(tmp_path / "dots.tar")) if not isinstance(item, Pair)]
    assert len(refused) == 2
    assert "rename photo.1.jpg to photo_1.jpg" in refused[0].reason


def catalogue(folder: Path, good: int, bad: int) -> Path:
    rows = [f"{i}.png,A red circle.\n" for i in range(good)] + [f"gone{i}.png,A dog.\n" for i in range(bad)]
    write(folder, {"t.csv": "".join(("image,caption\n", *rows))})
    for i in range(good):
        (folder / f"{i}.png").write_bytes(picture("red", "circle", shift=i))
    return folder / "t.csv"


def test_no_version_of_a_source_that_is_mostly_bad(tmp_path: Path, mini):
    source, where = str(catalogue(tmp_path, 3, 1)), {"root": tmp_path / "root", "store": "s", "encoder": mini}
    with pytest.raises(InvalidInput) as error:
        ingest(source, **where, max_bad=0.2)
    assert "1 of 4 pairs (25.0%) were refused, and max_bad is 20.0%" in str(error.value)
    assert "Most often (1): a file is missing" in str(error.value)
    report = ingest(source, **where, max_bad=0.25)
    assert (report.version, report.entries, report.resumed) == (1, 3, 4)
    with pytest.raises(InvalidInput, match="it is a share"):
        ingest(source, **where, max_bad=5)


def test_a_dry_run_says_what_would_be_read(tmp_path: Path):
    source = catalogue(tmp_path, 3, 1)
    (tmp_path / "2.png").write_bytes(b"<html>")
    command = ["ingest", str(source), "--dry-run"]
    result = CliRunner().invoke(cli, [*command, "--json"])
    assert json.loads(result.stdout) == {
        "pairs": 4, "captions": 2, "refused": 2,
        "reasons": {f"not an image but a web page, give {FORMATS_READ}": 1, "a file is missing": 1},
        "examples": [{"key": key, "captions": ["A red circle."]} for key in "01"],
    }  # fmt: skip
    result = CliRunner().invoke(cli, [*command, "--max-bad", "0.4"])
    assert result.exit_code == 1
    assert "would read 4 pairs with 2 captions, and refuse 2" in result.stdout
    assert "1 x a file is missing, for example gone0: a file is missing: gone0.png" in result.stdout
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("version", ["0", "-1", "latest", "", "1.5", "٣"])
@pytest.mark.parametrize("place", ["file:///srv/stores", "grpc://localhost:50051"])
def test_what_is_no_version_is_refused(place: str, version: str):
    with pytest.raises(InvalidInput, match=f"asks for version '{version}': versions count from @1"):
        locate(f"{place}/mine@{version}")


def test_the_page_names_every_source():
    page = (Path(__file__).parent.parent / "docs" / "sources.md").read_text()
    assert all(f"| {name}" in page for name in SOURCES)
    assert all(f"`{name}`" in page for name in FORMATS)
