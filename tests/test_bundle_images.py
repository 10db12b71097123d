"""A bundle holds images on demand: those that were ingested, unpacked under names that nobody chose."""

from __future__ import annotations

import json
import os
import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pictures import ToyEncoder, picture, write_table
from tagstore.bundles import export, import_, inspect
from tagstore.bundles.archive import ArchiveWriter
from tagstore.cli import cli
from tagstore.errors import AlreadyExists, Damaged, InvalidInput, NotFound, TagstoreError
from tagstore.ingestion import ingest
from tagstore.storage.store import Store, store_names
from tagstore.upkeep.compact import compact
from tagstore.upkeep.edits import Selection, delete
from tagstore.upkeep.reprocessing import reembed
from tagstore.upkeep.verify import verify
from test_bundles import unpacked


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_table(tmp_path_factory.mktemp("source") / "pictures")


@pytest.fixture(scope="module")
def root(tmp_path_factory, source: Path) -> Path:
    """A store of 195 entries; the version that read them is gone."""
    root = tmp_path_factory.mktemp("root")
    ingest(str(source), root=root, store="s", encoder=ToyEncoder(), miner="keywords")
    delete(root, "s", Selection(keys=["3", "4", "17"]))
    compact(root, "s", keep=1)
    return root


@pytest.fixture(scope="module")
def bundle(root: Path, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "s.tagstore"
    export(root, "s", path, images=True)
    return path


def packed(path: Path, files: dict[str, bytes]) -> Path:
    with ArchiveWriter(path) as archive:
        for name, data in files.items():
            archive.put(name, len(data), [data])
    return path


def test_images_are_in_a_bundle_only_if_asked_for(root: Path, bundle: Path, tmp_path: Path):
    without = export(root, "s", tmp_path / "without")
    assert (without.images, without.image_bytes) == (False, 0)
    assert not [name for name in unpacked(tmp_path / "without") if name.startswith("images/")]
    files, entries = unpacked(bundle), list(Store(root, "s").snapshot().entries())
    images = {name: data for name, data in files.items() if name.startswith("images/")}
    digests = {name: sha256(data).digest() for name, data in images.items()}
    assert digests == {f"images/{e.entry_id}": e.sha256 for e in entries}
    assert inspect(bundle).image_bytes == sum(map(len, images.values()))
    assert inspect(bundle).files == without.files
    again = export(root, "s", tmp_path / "again", images=True)
    assert again.sha256 == sha256(bundle.read_bytes()).hexdigest()


def test_the_same_bytes_whatever_order_the_images_are_found_in(
    root: Path, bundle: Path, source: Path, tmp_path: Path
):
    shutil.copytree(source.parent, tmp_path / "copy")
    head, *rows = source.read_text().splitlines()
    for name, lines in (("a", rows[150:] + rows[:40]), ("b", rows[:160][::-1])):
        (tmp_path / "copy" / f"{name}.csv").write_text("\n".join([head, *lines]))
    sources = [str(tmp_path / "copy" / f"{name}.csv") for name in "ab"]
    info = export(root, "s", tmp_path / "b", images=True, sources=sources)
    assert info.sha256 == sha256(bundle.read_bytes()).hexdigest()


def test_unpacked_images_are_a_source_that_the_store_can_be_embedded_again_from(
    root: Path, bundle: Path, tmp_path: Path
):
    import_(tmp_path / "root", bundle, images=tmp_path / "pictures")
    before, after = Store(root, "s").snapshot(), Store(tmp_path / "root", "s").snapshot()
    assert list(before.entries()) == list(after.entries())
    assert len(os.listdir(tmp_path / "pictures")) == 195 + 1
    lines = [json.loads(line) for line in (tmp_path / "pictures" / "pairs.jsonl").read_text().splitlines()]
    for line, entry in zip(lines, after.entries(), strict=True):
        assert line == {"key": entry.key, "image": f"{entry.entry_id}.png", "caption": list(entry.captions)}
        assert sha256((tmp_path / "pictures" / line["image"]).read_bytes()).digest() == entry.sha256
    version = reembed(tmp_path / "root", "s", ToyEncoder("01"))
    assert (version.entries, version.fingerprint.weights) == (195, "01")
    new = Store(tmp_path / "root", "s").snapshot()
    np.testing.assert_array_equal(new.vectors(new.live()), before.vectors(before.live()))
    assert verify(tmp_path / "root", "s", full=True) == []
    pairs, toy = str(tmp_path / "pictures" / "pairs.jsonl"), ToyEncoder()
    report = ingest(pairs, root=tmp_path / "root", store="t", encoder=toy, miner="keywords")
    assert (report.entries, report.quarantined) == (195, [])
    again = export(tmp_path / "root", "t", tmp_path / "t", images=True)
    assert again.image_bytes == inspect(bundle).image_bytes


def test_images_from_the_command_line(root: Path, bundle: Path, source: Path, tmp_path: Path):
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    output = run("export", f"file://{root}/s", tmp_path / "b", "--images", "--source", source)
    assert sha256(bundle.read_bytes()).hexdigest() in output
    assert "s@3: 195 entries" in run(
        "import", tmp_path / "b", "--root", tmp_path / "root", "--images", tmp_path / "pictures"
    )
    assert (tmp_path / "pictures" / "pairs.jsonl").exists()


def test_images_are_checked_even_if_nobody_wants_them(bundle: Path, tmp_path: Path):
    assert import_(tmp_path, bundle).entries == 195
    with pytest.raises(InvalidInput, match=r"195 of 195 entries .* have no image .* name with --source"):
        # a bundle is not read from again, and its images were not unpacked
        reembed(tmp_path, "s", ToyEncoder("01"))
    assert Store(tmp_path, "s").snapshot().version.operation == "import"


def test_an_image_that_is_gone_or_another_now_is_named_and_nothing_is_written(
    root: Path, source: Path, tmp_path: Path
):
    shutil.copytree(source.parent, tmp_path / "copy")
    (tmp_path / "copy" / "red-circle.png").write_bytes(picture("red", "circle", shift=1))
    with pytest.raises(InvalidInput, match=r"\d+ of 195 entries .* the first: 0 \(read from items.csv:2\)"):
        export(root, "s", tmp_path / "b", images=True, sources=[str(tmp_path / "copy" / "items.csv")])
    with pytest.raises(NotFound, match="nowhere"):
        export(root, "s", tmp_path / "b", images=True, sources=[str(tmp_path / "nowhere")])
    assert os.listdir(tmp_path) == ["copy"]


def spoilt(files: dict[str, bytes], fault: str) -> dict[str, bytes]:
    names = [name for name in files if name.startswith("images/")]
    if fault == "a bit":
        return {**files, names[5]: bytes([files[names[5]][0] ^ 1]) + files[names[5]][1:]}
    if fault == "missing":
        return {name: data for name, data in files.items() if name != names[5]}
    if fault == "swapped":
        return {**files, names[0]: files[names[1]], names[1]: files[names[0]]}
    if fault == "named":
        return {name if name != names[5] else "images/../../../escape": data for name, data in files.items()}
    if fault == "more":
        return {**files, "images/9999": b"more"}
    manifest = json.loads(files["manifest.json"])
    manifest["image_bytes"] += {"too many": 1, "too few": -1}[fault]
    return {**files, "manifest.json": json.dumps(manifest).encode()}


@pytest.mark.parametrize("fault", ["a bit", "missing", "swapped", "named", "more", "too many", "too few"])
def test_images_that_are_not_those_of_the_entries_are_refused(bundle: Path, tmp_path: Path, fault: str):
    path = packed(tmp_path / "bad", spoilt(unpacked(bundle), fault))
    for images in (None, tmp_path / "pictures"):
        with pytest.raises(TagstoreError, match=r"image|where the archive should end"):
            import_(tmp_path / "root", path, images=images)
        assert store_names(tmp_path / "root") == []
        assert sorted(os.listdir(tmp_path)) == ["bad", "root"]


def test_images_are_unpacked_to_a_folder_that_is_new_or_empty(root: Path, bundle: Path, tmp_path: Path):
    export(root, "s", tmp_path / "without")
    with pytest.raises(InvalidInput, match="holds no images"):
        import_(tmp_path / "root", tmp_path / "without", images=tmp_path / "pictures")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(AlreadyExists, match="taken is there already"):
        import_(tmp_path / "root", bundle, images=tmp_path / "taken")
    with pytest.raises(NotFound, match="no folder"):
        import_(tmp_path / "root", bundle, images=tmp_path / "no" / "pictures")
    assert store_names(tmp_path / "root") == []
    (tmp_path / ".empty.partial").mkdir()
    (tmp_path / ".empty.partial" / "left").write_text("by an import that was killed")
    (tmp_path / "empty").mkdir()
    import_(tmp_path / "root", bundle, images=tmp_path / "empty")
    assert len(os.listdir(tmp_path / "empty")) == 196
    assert not (tmp_path / ".empty.partial").exists()
    with pytest.raises(AlreadyExists, match="a store 's' already"):
        import_(tmp_path / "root", bundle, images=tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(Damaged):
        import_(tmp_path / "new", packed(tmp_path / "cut", dict(list(unpacked(bundle).items())[:-200])))
