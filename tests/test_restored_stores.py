"""A store that is replaced by a copy of itself while it is served, under the same name of its generation."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tagstore.bundles import export, import_
from tagstore.client import connect
from tagstore.serving.live_catalog import LiveCatalog
from tagstore.upkeep.edits import Selection, delete, drop


def test_a_restored_copy_answers(
    tmp_path: Path, shapes_root: Path, mini, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, copy, old = tmp_path / "root", tmp_path / "copy", tmp_path / "old"
    shutil.copytree(shapes_root / "shapes", root / "shapes")
    shutil.copytree(root / "shapes", copy)
    delete(root, "shapes", Selection(keys=["red-circle"]))
    monkeypatch.setattr(LiveCatalog, "encoder", lambda *_: mini)
    catalog = LiveCatalog(root, device="cpu")
    with connect(f"file://{root}/shapes") as local:
        assert catalog.engine("shapes").version.number == local.info().version == 2
        assert catalog.engine("shapes", 1) is catalog.ready("shapes", 1)
        pinned = catalog.engine("shapes", 1)
        (root / "shapes").rename(old)
        copy.rename(root / "shapes")
        assert catalog.ready("shapes") is None
        assert catalog.engine("shapes").version.number == local.info().version == 1
        assert catalog.engine("shapes", 1) is not pinned
        assert pinned.info().entries == 18  # a request in flight ends with what it has


def test_a_store_that_is_dropped_and_imported_again_answers(tmp_path: Path, shapes_root: Path, mini) -> None:
    shutil.copytree(shapes_root / "shapes", tmp_path / "shapes")
    export(tmp_path, "shapes", tmp_path / "shapes.bundle")
    delete(tmp_path, "shapes", Selection(keys=["red-circle"]))
    catalog = LiveCatalog(tmp_path, device="cpu")
    assert catalog.engine("shapes").info().entries == 17
    drop(tmp_path, "shapes")
    import_(tmp_path, tmp_path / "shapes.bundle", store="shapes")
    assert catalog.engine("shapes").info().entries == 18
