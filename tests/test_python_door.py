"""A program gives what it has to `tagstore.ingest` (a DataFrame, a table, records), and asks with it."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import tagstore
from pictures import picture
from tagstore.errors import InvalidInput
from tagstore.storage.store import Store

CAPTIONS = {
    "a": ["A red circle.", "A circle on a table."],
    "b": ["A blue square."],
    "c": ["A green triangle."],
}
SHAPES = {"a": ("red", "circle"), "b": ("blue", "square"), "c": ("green", "triangle")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for key, shape in SHAPES.items():
        (tmp_path / "images" / f"{key}.png").write_bytes(picture(*shape))
    return tmp_path


def records(folder: Path) -> list[dict[str, object]]:
    return [
        {"image": f"{key}.png", "captions": captions, "price": 1.5, "sold": True}
        for key, captions in CAPTIONS.items()
    ]


def as_pandas(folder: Path) -> object:
    return pytest.importorskip("pandas").DataFrame(records(folder))


def as_polars(folder: Path) -> object:
    return pytest.importorskip("polars").DataFrame(records(folder))


def as_arrow(folder: Path) -> object:
    return pa.Table.from_pylist(records(folder))


def as_pairs(folder: Path) -> object:
    more = {"price": 1.5, "sold": True}
    return (tagstore.Pair(k, picture(*SHAPES[k]), tuple(c), more) for k, c in CAPTIONS.items())


def as_dataset(folder: Path) -> object:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(
        [
            record
            | {"key": str(record["image"])[:-4], "image": str(folder / "images" / str(record["image"]))}
            for record in records(folder)
        ]
    )
    return data.cast_column("image", datasets.Image())


@pytest.mark.parametrize("make", [records, as_pandas, as_polars, as_arrow, as_pairs, as_dataset])
def test_every_form_of_a_catalogue_gives_the_same_version(folder: Path, make, mini):
    images = None if make is as_dataset else folder / "images"
    report = tagstore.ingest(make(folder), root=folder, store="mine", images=images, encoder=mini)
    assert (report.entries, report.quarantined) == (3, [])
    expected = tagstore.ingest(
        records(folder), root=folder, store="same", images=folder / "images", encoder=mini
    )
    assert expected.tags == report.tags
    with (
        tagstore.connect(f"file://{folder}/mine") as source,
        tagstore.connect(f"file://{folder}/same") as same,
    ):
        assert source.pin().fingerprint == same.pin().fingerprint
        [answer], [right] = (s.retrieve([picture("red", "circle")], k=1) for s in (source, same))
        assert (answer.neighbours[0].key, answer.tags) == ("a", right.tags)
        assert [t.text for t in source.vocabulary()] == [t.text for t in same.vocabulary()]


def test_cells_of_every_kind(folder: Path, mini):
    pandas = pytest.importorskip("pandas")
    decoded = Image.open(io.BytesIO(picture("green", "triangle")))
    frame = pandas.DataFrame(
        {
            "img": [folder / "images" / "a.png", picture("blue", "square"), decoded, "gone.png", None],
            "id": [1.0, 2.0, 3.0, 4.0, 5.0],  # what pandas makes of integers beside a missing one
            "title": [
                "A red circle.",
                np.str_("A blue square."),
                "A green triangle.",
                "A dog.",
                float("nan"),
            ],
            "sizes": [np.arange(2), None, np.float32(2), pandas.NaT, pandas.NA],
        }
    )
    report = tagstore.ingest(frame, root=folder, store="mine", encoder=mini)
    assert report.entries == 3
    assert {r.key: r.reason.partition(":")[0] for r in report.quarantined} == {
        "4": "a file is missing", "5": "no image",
    }  # fmt: skip
    first, *_ = Store(folder, "mine").snapshot().entries()
    assert (first.key, dict(first.metadata)) == ("1", {"sizes": [0, 1]})


def test_paths_stay_in_the_folder_that_is_named(folder: Path, mini):
    secret = folder / "secret.png"
    secret.write_bytes(picture("red", "circle"))
    rows = [{"image": path, "caption": "A red circle."} for path in ("../secret.png", str(secret), "a.png")]
    report = tagstore.ingest(rows, root=folder, store="mine", images=folder / "images", encoder=mini)
    assert (report.entries, len(report.quarantined)) == (1, 2)
    assert all("leads out" in refused.reason for refused in report.quarantined)
    report = tagstore.ingest(rows[1:2], root=folder, store="own", encoder=mini)  # the program's own word
    assert report.entries == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"image": "a.png", "caption": "A dog."}, "a dict is one record: pass a list of them"),
        (7, "source is of type int: pass the path of a file or folder, a pandas or Polars DataFrame"),
        (b"bytes", "source is of type bytes: pass"),
        ([], "the builtins.list has no rows"),
        (["a.png"], "no record: item 1 is of type str, pass Pair or dict"),
        (
            [{"picture": "a.png", "caption": "A dog."}],
            "which column holds the image? There are: picture, caption",
        ),
    ],
)
def test_what_is_no_source_is_told_what_to_give(tmp_path: Path, source, message, mini):
    with pytest.raises(InvalidInput) as error:
        tagstore.ingest(source, root=tmp_path, store="mine", encoder=mini)
    assert message in str(error.value)
    assert not (tmp_path / "mine").exists()


def test_queries_take_what_a_program_has(folder: Path, mini):
    tagstore.ingest(records(folder), root=folder, store="mine", images=folder / "images", encoder=mini)
    data = picture("blue", "square")
    decoded = Image.open(io.BytesIO(data)).convert("RGB")
    with tagstore.connect(f"file://{folder}/mine") as source:
        forms = [
            data,
            folder / "images" / "b.png",
            str(folder / "images" / "b.png"),
            decoded,
            np.asarray(decoded),
        ]
        answers = source.retrieve(forms, k=1)
        assert [answer.neighbours[0].key for answer in answers] == ["b"] * 5
        assert len({round(answer.neighbours[0].similarity, 4) for answer in answers}) == 1
        for wrong, message in (
            (7, "image 0 is of type int: pass a path, encoded bytes, a PIL image, or an array"),
            (np.zeros((4, 4)), "image 0 is an array of shape [4, 4] and type float64"),
            (np.zeros((4, 4, 3)), "pass [H, W, 3] of uint8"),
        ):
            with pytest.raises(InvalidInput) as error:
                source.retrieve([wrong])
            assert message in str(error.value)


def test_the_notebook_runs(tmp_path: Path, monkeypatch):
    """Cell by cell, each with its last expression, as a notebook does it."""
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((Path(__file__).parent.parent / "docs" / "quickstart.ipynb").read_text())
    names: dict[str, object] = {}
    shown = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            *body, last = ast.parse("".join(cell["source"])).body
            exec(compile(ast.Module(body, []), "cell", "exec"), names)
            assert isinstance(last, ast.Expr)
            shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
    assert shown[1] == (12, shown[1][1], {})
    assert ("red ball", 3) in shown[2]
    assert shown[3] == (1, 2)


def test_importing_tagstore_loads_nothing_heavy():
    import subprocess
    import sys

    heavy = {"torch", "faiss", "spacy", "pandas", "pyarrow", "grpc"}
    code = f"import sys, tagstore; print(*{heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
