"""Ingest: good pairs get in, bad ones are quarantined with a reason, the same source changes nothing."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from pictures import ToyEncoder, picture, write_shapes
from tagstore.client import connect
from tagstore.encoding.images import decode
from tagstore.errors import FingerprintMismatch, InvalidInput, NotFound
from tagstore.ingestion import batches, ingest, pipeline
from tagstore.storage.generations import writer_lock
from tagstore.storage.store import Store, store_names
from tagstore.storage.writer import Writer


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_shapes(tmp_path / "shapes")


def test_a_folder_becomes_a_store(source: Path, tmp_path: Path, mini):
    stages: Counter[str] = Counter()

    def count(stage: str, number: int) -> None:
        stages[stage] += number

    report = ingest(str(source), root=tmp_path / "root", store="s", encoder=mini, progress=count)
    assert (report.version, report.pairs, report.added, report.entries) == (1, 18, 18, 18)
    assert report.quarantined == []
    assert report.tags >= 18 * 3
    assert stages == {"pairs": 18, "tags": report.unique_tags}
    steps = {"load", "read", "decode", "store", "embed", "mine", "embed tags", "commit", "total"}
    assert set(report.seconds) == steps
    snapshot = Store(tmp_path / "root", "s").snapshot()
    entry = next(e for e in snapshot.entries() if e.key == "red-circle")
    assert entry.captions == ("A red circle on a white table in Paris.",)
    ids = [tag.tag_id for tag in entry.tags]
    texts = dict(zip(ids, snapshot.tags(ids), strict=True))
    for tag in entry.tags:
        [(caption, start, end), *_] = tag.mentions
        assert entry.captions[caption][start:end].lower().startswith(texts[tag.tag_id][0].lower().split()[0])
    expected = mini.encode_images([decode(picture("red", "circle"))])
    np.testing.assert_allclose(snapshot.vectors(np.array([entry.entry_id])), expected, atol=1e-3)
    assert snapshot.version.miner["name"] == "rules"
    assert snapshot.version.fingerprint == mini.fingerprint


def test_the_same_source_again_changes_nothing(source: Path, tmp_path: Path, mini):
    ingest(str(source), root=tmp_path, store="s", encoder=mini)
    again = ingest(str(source), root=tmp_path, store="s", encoder=mini)
    assert (again.version, again.added, again.unchanged, again.entries) == (1, 0, 18, 18)


def test_pairs_that_the_store_has_need_neither_encoder_nor_decoder(
    source: Path, tmp_path: Path, mini, monkeypatch
):
    first = ingest(str(source), root=tmp_path, store="s", encoder=mini)
    with monkeypatch.context() as patch:
        patch.setattr(batches, "decoding", None)
        patch.setattr(pipeline, "load_encoder_of", None)
        again = ingest(str(source), root=tmp_path, store="s")
    assert (again.version, again.added, again.unchanged) == (first.version, 0, first.added)
    (source / "new.png").write_bytes(picture("blue", "square"))
    (source / "new.txt").write_text("A blue square.")
    third = ingest(str(source), root=tmp_path, store="s", device="cpu")
    assert (third.added, third.unchanged) == (1, first.added)


def test_a_changed_pair_replaces_its_entry(source: Path, tmp_path: Path, mini):
    ingest(str(source), root=tmp_path, store="s", encoder=mini)
    (source / "red-circle.txt").write_text("A tomato.")
    report = ingest(str(source), root=tmp_path, store="s", encoder=mini)
    assert (report.version, report.added, report.unchanged, report.entries) == (2, 1, 17, 18)
    with connect(f"file://{tmp_path}/s") as now:
        [answer] = now.retrieve([picture("red", "circle")], k=1)
        assert [t.tag for t in answer] == ["tomato"]


def test_another_miner_mines_everything_again(source: Path, tmp_path: Path, mini):
    ingest(str(source), root=tmp_path, store="s", encoder=mini, miner="none")
    assert Store(tmp_path, "s").snapshot().version.tags == 0
    report = ingest(str(source), root=tmp_path, store="s", encoder=mini, miner="rules")
    assert (report.version, report.added, report.entries) == (2, 18, 18)
    assert report.tags > 0


def test_bad_pairs_are_quarantined_and_the_good_ones_get_in(source: Path, tmp_path: Path, mini):
    def bad(name: str, data: bytes, caption: str | None = "A caption.") -> None:
        (source / name).write_bytes(data)
        if caption is not None:
            (source / name).with_suffix(".txt").write_text(caption)

    good = picture("red", "square", size=64)
    bad("corrupt.png", b"\x89PNG\r\n\x1a\n" + bytes(100))
    bad("truncated.png", good[: len(good) // 2])
    bad("zero.jpg", b"")
    bad("text.jpg", b"just text")
    bad("empty-caption.png", good, "")
    bad("blank-caption.png", good, " \n\t\n")
    bad("no-caption.png", good, None)
    bad("emoji.png", good, "\U0001f600\U0001f680 \U0001f468‍\U0001f469‍\U0001f467")
    bad("chinese.png", good, "一只红色的狗在草地上奔跑")
    bad("long.png", good, "a red square " * 800)
    report = ingest(str(source), root=tmp_path / "root", store="s", encoder=mini)
    quarantined = {r.key: r.reason for r in report.quarantined}
    captions = {"empty-caption", "blank-caption", "no-caption"}
    assert set(quarantined) == {"corrupt", "truncated", "zero", "text", *captions}
    assert all(len(reason) > 8 for reason in quarantined.values())
    assert report.pairs == 28
    assert report.entries == 21
    assert {"emoji", "chinese", "long"} <= {e.key for e in Store(tmp_path / "root", "s").snapshot().entries()}
    assert list(Store(tmp_path / "root", "s").snapshot().quarantine()) == report.quarantined
    assert sum(report.reasons.values()) == 7


def test_a_duplicate_key_keeps_the_first(tmp_path: Path, mini):
    (tmp_path / "red.png").write_bytes(picture("red", "circle"))
    (tmp_path / "blue.png").write_bytes(picture("blue", "circle"))
    rows = "1,red.png,A red circle.\n1,blue.png,A blue circle.\n2,blue.png,A blue circle."
    (tmp_path / "items.csv").write_text(f"id,image,caption\n{rows}")
    report = ingest(str(tmp_path / "items.csv"), root=tmp_path / "root", store="s", encoder=mini)
    assert (report.entries, [r.key for r in report.quarantined]) == (2, ["1"])
    assert "duplicate key" in report.quarantined[0].reason
    captions = {e.key: e.captions[0] for e in Store(tmp_path / "root", "s").snapshot().entries()}
    assert captions["1"] == "A red circle."


def test_a_source_of_which_nothing_can_be_used_makes_no_version(tmp_path: Path, mini):
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"no image")
    (folder / "a.txt").write_text("A caption.")
    with pytest.raises(InvalidInput, match="none of the 1 pairs"):
        ingest(str(folder), root=tmp_path / "root", store="s", encoder=mini)
    assert store_names(tmp_path / "root") == []


def test_a_source_that_cannot_be_read_leaves_nothing_on_disk(tmp_path: Path, mini):
    (tmp_path / "empty").mkdir()
    for source in ("empty", "missing", "missing-{0..3}.tar"):
        with pytest.raises((InvalidInput, NotFound)):
            ingest(str(tmp_path / source), root=tmp_path / "root", store="s", encoder=mini)
    with pytest.raises(InvalidInput, match="no name for a store"):
        ingest(str(tmp_path), root=tmp_path / "root", store="../s", encoder=mini)
    assert store_names(tmp_path / "root") == []


def test_an_ingest_with_another_encoder_is_refused(source: Path, tmp_path: Path, mini):
    ingest(str(source), root=tmp_path, store="s", encoder=mini)
    with pytest.raises(FingerprintMismatch, match=mini.fingerprint.digest):
        ingest(str(source), root=tmp_path, store="s", encoder="RN50/random", device="cpu")


def test_an_ingest_that_dies_leaves_the_version_before_and_can_be_run_again(
    source: Path, tmp_path: Path, mini, monkeypatch
):
    ingest(str(source), root=tmp_path, store="s", encoder=mini)
    (source / "new.png").write_bytes(picture("black", "square"))
    (source / "new.txt").write_text("A black square.")

    class Interrupted(BaseException):
        pass

    def die(*_: object) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr("tagstore.indexing.faiss_index.extend", die)
        with pytest.raises(Interrupted):
            ingest(str(source), root=tmp_path, store="s", encoder=mini)
    assert Store(tmp_path, "s").snapshot().version.number == 1
    report = ingest(str(source), root=tmp_path, store="s", encoder=mini)
    assert (report.version, report.added, report.entries) == (2, 1, 19)


@pytest.mark.parametrize("cut_off", [False, True])
def test_no_other_writer_gets_in_between_the_steps_of_an_ingest(
    source: Path, tmp_path: Path, mini, monkeypatch, cut_off: bool
):
    if cut_off:
        with monkeypatch.context() as patch:
            patch.setattr("tagstore.indexing.faiss_index.extend", None)
            with pytest.raises(TypeError):
                ingest(str(source), root=tmp_path, store="s", encoder=mini)
        (source / "red-circle.txt").write_text("A tomato.")  # what was staged is of no use now
    leave = Writer.__exit__
    with ExitStack() as other:

        def leave_to_another(writer: Writer, *error: object) -> None:
            leave(writer, *error)  # whoever waited for the lock has it from here on
            other.enter_context(writer_lock(writer.directory))

        monkeypatch.setattr(Writer, "__exit__", leave_to_another)
        report = ingest(str(source), root=tmp_path, store="s", encoder=mini)
    assert (report.version, report.added, report.resumed) == (1, 18, 0)


def test_an_ingest_reads_the_version_before_once(source: Path, tmp_path: Path, mini, monkeypatch):
    begin, begun = Writer._begin, []
    monkeypatch.setattr(Writer, "_begin", lambda writer: begun.append(begin(writer)))
    ingest(str(source), root=tmp_path, store="s", encoder=mini)
    assert len(begun) == 1


def test_the_share_of_captions_in_other_languages_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from tagstore.cli.output import print_report

    source = tmp_path / "source"
    source.mkdir()
    captions = ["A red circle", "Un chat gris dort sur le canapé", "Eine Katze schläft auf dem Sofa", "nan"]
    for number, caption in enumerate(captions):
        (source / f"{number}.png").write_bytes(picture("red", "circle", shift=number))
        (source / f"{number}.txt").write_text(caption, encoding="utf-8")
    report = ingest(str(source), root=tmp_path / "root", store="s", encoder=ToyEncoder())
    assert (report.captions, report.unread) == (3, {"fr": 1, "de": 1})
    assert report.reasons == {"no caption": 1}
    print_report(report, as_json=False)
    assert (
        "no tags from 2 of 3 captions (67%), which are in other languages: fr 1, de 1"
        in capsys.readouterr().out
    )
