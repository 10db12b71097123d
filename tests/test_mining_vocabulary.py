"""Stop list, synonyms, counts: what a store does with mined tags without looking at an image again."""

from __future__ import annotations

from math import log
from pathlib import Path

import pytest

from tagstore.errors import InvalidInput, NotFound
from tagstore.mining import MergedTag
from tagstore.mining.vocabulary import Record, Rules, compare, idf, language, load_rules, rare, summarise


def tag(text: str, kind: str = "object", canonical: str = "", count: int = 1) -> MergedTag:
    return MergedTag(text, kind, canonical or text, 0.9, count, ((0, 0, len(text)),))  # type: ignore[arg-type]


def test_synonyms_merge_and_stopped_tags_go(tmp_path: Path):
    (tmp_path / "syn.tsv").write_text("tv\ttelevision\nsofa\tcouch\ncouch\tsettee\n# comment\n")
    (tmp_path / "stop.txt").write_text("area\nentity: canon  # a camera\n\n")
    rules = load_rules(tmp_path / "stop.txt", tmp_path / "syn.tsv")
    tags = [
        tag("TVs", canonical="tv"),
        tag("television", count=3),
        tag("red sofa", "attribute"),
        tag("area"),
        tag("Canon", "entity", "canon"),
        tag("canon"),
    ]
    kept = rules.apply(tags)
    assert [(t.text, t.kind, t.count) for t in kept] == [
        ("television", "object", 4),
        ("red settee", "attribute", 1),
        ("canon", "object", 1),
    ]
    assert len(kept[0].provenance) == 2


def test_entities_and_custom_tags_are_replaced_whole_only():
    rules = Rules(synonyms={"bike": "bicycle"})
    assert rules.preferred("attribute", "red bike") == "red bicycle"
    assert rules.preferred("entity", "bike week") == "bike week"
    assert rules.preferred("custom", "bike") == "bicycle"


def test_the_digest_follows_every_part():
    variants = [
        Rules(),
        Rules(minimum=2),
        Rules(stop=frozenset({("", "area")})),
        Rules(synonyms={"tv": "television"}),
    ]
    assert len({rules.digest for rules in variants}) == 4
    assert Rules().digest == Rules().digest


def test_the_shipped_files_load_and_none_can_be_asked_for():
    shipped, none = load_rules(), load_rules("", "")
    assert shipped.stopped("object", "stock photo")
    assert shipped.preferred("object", "tv") == "television"
    assert not none.stop
    assert not none.synonyms


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tv television\n", "line 1: expected a variant, one TAB"),
        ("a\tb\na\tc\n", "line 2: 'a' already stands for 'b'"),
        ("a\tb\nb\ta\n", "in a circle: a -> b -> a"),
    ],
)  # fmt: skip
def test_bad_synonyms_are_refused_with_their_line(text: str, message: str, tmp_path: Path):
    (tmp_path / "syn.tsv").write_text(text)
    with pytest.raises(InvalidInput, match=message):
        load_rules("", tmp_path / "syn.tsv")


def test_bad_stop_lists_are_refused(tmp_path: Path):
    (tmp_path / "stop.txt").write_text("area\nthing: area\n")
    with pytest.raises(InvalidInput, match=r"stop\.txt, line 2: 'thing' is no kind"):
        load_rules(tmp_path / "stop.txt", "")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(InvalidInput, match="not UTF-8"):
        load_rules(tmp_path / "latin1.txt", "")
    with pytest.raises(NotFound, match="no file"):
        load_rules(tmp_path / "missing.txt", "")
    with pytest.raises(InvalidInput, match="minimum count is 0"):
        load_rules("", "", 0)


def test_idf():
    assert idf(9, 9) == 1
    assert idf(0, 9) == pytest.approx(log(10) + 1)
    with pytest.raises(InvalidInput):
        idf(10, 9)


def test_summary_and_difference():
    old = [Record("dog", "object", 5), Record("cat", "object", 1), Record("blue sky", "attribute", 2)]
    new = [
        Record("dog", "object", 8),
        Record("blue sky", "attribute", 2),
        Record("Oatly", "entity", 4),
        Record("emu", "object", 1),
    ]
    summary = summarise(new, 2)
    assert (summary.unique, summary.total, summary.once) == (4, 15, 1)
    assert summary.kinds == {"object": (2, 9), "attribute": (1, 2), "entity": (1, 4)}
    assert [r.text for r in summary.head] == ["dog", "Oatly"]
    assert [r.text for r in summary.tail] == ["emu", "blue sky"]
    difference = compare(old, new)
    assert [r.text for r in difference.new] == ["Oatly", "emu"]
    assert [r.text for r in difference.vanished] == ["cat"]
    assert difference.changed == ((Record("dog", "object", 8), 3),)
    assert rare(new, Rules(minimum=2)) == {("object", "emu")}


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("a dog", "en"),
        ("café", "en"),
        ("собака", "und-Cyrl"),
        ("犬", "und-Hani"),
        ("いぬ", "und-Jpan"),
        ("12 🎉", "zxx"),
    ],
)
def test_language(text: str, tag: str):
    assert language(text) == tag
