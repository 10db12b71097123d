from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tagstore.storage.codec import decode_entry, decode_hot, decode_tag, encode_entry, encode_tag
from tagstore.types import KINDS, Entry, EntryTag

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | text, lambda v: st.lists(v, max_size=3), max_leaves=5
)
mentions = st.tuples(st.integers(-1, 300), st.integers(0, 9000), st.integers(0, 300)).map(
    lambda m: (m[0], m[1], m[1] + m[2])
)
tags = st.builds(
    EntryTag,
    st.integers(0, 1 << 33),
    st.integers(0, 255).map(lambda i: i / 255),
    st.lists(mentions, max_size=4).map(tuple),
)
entries = st.builds(
    Entry,
    entry_id=st.integers(0, 1 << 40),
    key=text,
    sha256=st.binary(min_size=32, max_size=32),
    perceptual_hash=st.integers(0, (1 << 64) - 1),
    captions=st.lists(text, max_size=5).map(tuple),
    tags=st.lists(tags, max_size=8).map(tuple),
    metadata=st.dictionaries(text, json_values, max_size=3),
    origin=text.map(lambda s: s.replace("\0", "")),
)


@given(entries)
def test_an_entry_comes_back_as_it_was_written(entry: Entry):
    data = encode_entry(entry)
    assert decode_entry(entry.entry_id, data) == entry
    assert decode_entry(entry.entry_id, memoryview(data)) == entry
    assert decode_hot(data) == (entry.key, [tag.tag_id for tag in entry.tags])


@given(text, st.sampled_from(KINDS), text)
def test_a_tag_comes_back_as_it_was_written(shown: str, kind, canonical: str):
    assert decode_tag(encode_tag(shown, kind, canonical)) == (shown, kind, canonical or shown)


def test_an_origin_that_names_the_key_costs_little_more_than_the_rest_of_it():
    entry = Entry(1, "1000268201_693b08cb0e", bytes(32), 0, (), (), {}, "train-000.tar!1000268201_693b08cb0e")
    assert decode_entry(1, encode_entry(entry)) == entry
    assert (
        len(encode_entry(entry)) == len(encode_entry(replace(entry, origin=""))) + len("train-000.tar!") + 1
    )


def test_a_lone_surrogate_does_not_stop_an_ingest():
    entry = Entry(1, "k\ud800", bytes(32), 0, ("a \udcff b",), ())
    assert decode_entry(1, encode_entry(entry)).captions == ("a ? b",)


def test_an_entry_costs_few_bytes_beyond_its_hashes_and_caption():
    caption = "A black dog is running after a white dog in the snow ."
    entry = Entry(
        1,
        "1000268201_693b08cb0e",
        bytes(32),
        1 << 63,
        (caption,),
        tuple(EntryTag(i * 300, 0.9, ((0, 2, 11),)) for i in range(5)),
    )
    overhead = len(encode_entry(entry)) - len(caption) - 32 - 8 - len(entry.key)
    assert overhead <= 5 * (2 + 5) + 8
