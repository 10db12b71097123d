"""The parts that the rules use: cleaning with offsets, singular and plural, -ing forms, the lexicon."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tagstore.mining import lexicon
from tagstore.mining.nouns import singular
from tagstore.mining.relations import progressive
from tagstore.mining.text import clean


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("dog", "dogs"), ("box", "boxes"), ("bus", "buses"), ("berry", "berries"), ("shoe", "shoes"),
        ("tomato", "tomatoes"), ("knife", "knives"), ("woman", "women"), ("policeman", "policemen"),
        ("child", "children"), ("goose", "geese"), ("bench", "benches"), ("dish", "dishes"),
        ("glass", "glasses_"), ("sheep", "sheep"), ("people", "people"), ("glasses", "glasses"),
        ("jeans", "jeans"), ("tennis", "tennis"), ("traffic light", "traffic lights"),
        ("t-shirt", "t-shirts"), ("specimen", "specimen"), ("house", "houses"), ("tie", "ties"),
        ("bookshelf", "bookshelves"), ("snowshoe", "snowshoes"), ("octopus", "octopuses"),
        ("fungus", "fungi"),
        ("crisis", "crises"), ("antenna", "antennae"), ("party", "parties"), ("puppy", "puppies"),
        ("passerby", "passersby"), ("debris", "debris"), ("fish", "fishes"),
    ],
)  # fmt: skip
def test_singular(one: str, many: str):
    if not many.endswith("_"):
        assert singular(many) == one
    assert singular(one) == one


@pytest.mark.parametrize(
    ("verb", "tag", "form"),
    [
        ("rides", "VBZ", "riding"), ("sit", "VBP", "sitting"), ("carries", "VBZ", "carrying"),
        ("watches", "VBZ", "watching"), ("lies", "VBZ", "lying"), ("holding", "VBG", "holding"),
    ],
)  # fmt: skip
def test_progressive(verb: str, tag: str, form: str):
    assert progressive(verb, tag) == form


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        ("a plain caption", "a plain caption"),
        ("  two   spaces ", "two spaces"),
        ("Tom &amp; Jerry&#39;s caf&eacute;", "Tom & Jerry's café"),
        ("zero\u200bwidth and non\u00a0breaking", "zerowidth and non breaking"),
        ("cafe\u0301", "cafe\u0301"),
        ("“quoted” – it’s", "\"quoted\" - it's"),
        ("a dog 🐕 runs", "a dog runs"),
        ("an image of a dog", "a dog"),
        ("This is a black and white photo of a dog", "a dog"),
        ("Royalty-free stock photo: a dog", "a dog"),
        ("a dog | Shot with Canon EOS 5D, f/2.8 50mm ISO 400", "a dog"),
        ("Salt &amp;amp; pepper, a chef&amp;#39;s hat", "Salt & pepper, a chef's hat"),
        ("a &amp;amp;amp; b", "a & b"),
        ("a dog and " + "w" * 100, "a dog and"),
        *((name, "") for name in (
            "DSC00123", "IMG 2034", "IMG_2034.jpg", "DSC_0042", "MVI_3391", "P1010233.JPG", "GOPR0127",
            "_MG_1234",
            "20190714_153022", "WP_20150612_11_02_33_Pro", "PXL_20210304_101532",
            "Screenshot 2021-03-04 at 10.15.32",
            "image001", "product-photo-3", "1920x1080", "1366 x 768 px", "Open in new window",
            "Featured image",
        )),
        ("IMG 2034 two cats", "two cats"),
        ("Download wallpaper 1920x1080 mountain lake forest full hd", "mountain lake forest"),
        ("4K wallpaper of a red car, 3840x2160", "a red car"),
        ("a room with floral wallpaper", "a room with floral wallpaper"),
        ("Photo by Jane Doe on Unsplash: a bear", "a bear"),
        ("a bear - stock photo", "a bear"),
        ("Sony WH-1000XM4 Headphones, black", "Sony WH-1000XM4 Headphones, black"),
        ("a dog #dog #puppy @owner www.dogs.com/x", "a dog"),
        ("A DOG RUNS ON THE GRASS", "a dog runs on the grass"),
        ("<b>a dog</b>", "a dog"),
        ("", ""),
    ],
)  # fmt: skip
def test_clean(caption: str, text: str):
    assert clean(caption, 2000).text == text


@given(st.text(max_size=200), st.integers(1, 300))
@settings(max_examples=300, deadline=None)
def test_every_character_knows_where_it_stood(caption: str, most: int):
    cleaned = clean(caption, most)
    for i in range(len(cleaned.text)):
        start, end = cleaned.span(i, i + 1)
        assert 0 <= start < end <= min(most, len(caption))
    assert cleaned.span(0, 0) == (0, 0)
    assert "  " not in cleaned.text


def test_the_lexicon_is_lower_case_and_has_no_typing_traces():
    words = {
        name: getattr(lexicon, name)
        for name in dir(lexicon)
        if name.isupper() and isinstance(getattr(lexicon, name), frozenset)
    }
    assert len(words) > 15
    for name, entries in words.items():
        assert entries, name
        assert all(
            entry == entry.lower().strip() and "_" not in entry and "  " not in entry for entry in entries
        ), name


def test_sections_of_a_word_file():
    assert lexicon.sections("# about\n[a]\nx, y\nz # why\n[b]\nhot dog,\n") == {
        "a": {"x", "y", "z"},
        "b": {"hot dog"},
    }
