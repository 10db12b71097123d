"""The other miners: columns, keywords, FACTUAL, compositions, and those of other packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tagstore.errors import InvalidInput, NotFound
from tagstore.mining import Miner, load_miner, unread_captions
from tagstore.mining.factual import FactualMiner, facts, graph_tags
from tagstore.mining.text import clean
from tagstore.types import Pair, Tag

METADATA = {"brand": "Puma", "colour": " Navy  Blue ", "sizes": ["S", "M"], "vegan": True}
NO_TAGS = {"id": 7, "url": "https://x.y/z", "gap": "NA"}
"""Metadata that must give no tags."""
SHOE = Pair("1", b"", ("A red shoe",), METADATA | NO_TAGS)


def mined(miner: Miner, *pairs: Pair) -> list[tuple[Tag, ...]]:
    return list(miner.mine(pairs))


def texts(miner: Miner, *pairs: Pair) -> list[list[str]]:
    return [[tag.text for tag in tags] for tags in mined(miner, *pairs)]


def test_every_shipped_miner_keeps_the_protocol():
    for name in ("rules", "metadata", "keywords", "factual", "none", "rules+metadata"):
        miner = load_miner(name)
        assert isinstance(miner, Miner)
        assert miner.name == name
        assert miner.version
    assert mined(load_miner("none"), SHOE, SHOE) == [(), ()]


def test_metadata_columns_and_templates():
    assert texts(load_miner("metadata"), SHOE) == [["Puma", "Navy Blue", "S", "M", "vegan"]]
    miner = load_miner("metadata", columns="brand, colour", templates=["{colour} {brand}", "{gap} {brand}"])
    (tags,) = mined(miner, SHOE)
    assert [(t.text, t.kind, t.canonical, t.label, t.caption) for t in tags] == [
        ("Puma", "custom", "puma", "brand", -1),
        ("Navy Blue", "custom", "navy blue", "colour", -1),
        ("Navy Blue Puma", "custom", "navy blue puma", "{colour} {brand}", -1),
    ]
    split = load_miner("metadata", columns=["tags"], separator="|")
    assert texts(split, Pair("1", b"", (), {"tags": "beach| sunset||sunset"})) == [["beach", "sunset"]]


def test_a_column_that_no_pair_has_is_refused_by_name():
    with pytest.raises(InvalidInput, match="no pair has a column 'brnd': there are brand, colour"):
        mined(load_miner("metadata", columns="brnd"), SHOE)
    assert texts(load_miner("metadata", columns="brand"), Pair("0", b"", ()), SHOE) == [[], ["Puma"]]
    for template in ("no braces", "{brand.x}", "{", "{}"):
        with pytest.raises(InvalidInput, match="template"):
            load_miner("metadata", templates=template)


def test_keywords_in_captions_and_in_a_column():
    caption = "beach, #sunset,palm  tree, , 🎉"
    (tags,) = mined(load_miner("keywords"), Pair("1", b"", ("x", caption)))
    assert [(t.text, t.caption, caption[slice(*t.span)] if t.caption else "x") for t in tags] == [
        ("x", 0, "x"),
        ("beach", 1, "beach"),
        ("sunset", 1, "sunset"),
        ("palm  tree", 1, "palm  tree"),
    ]
    assert tags[-1].canonical == "palm tree"
    pairs = [Pair("1", b"", (), {"kw": "a|b"}), Pair("2", b"", (), {"kw": ["c", "d"]}), Pair("3", b"", ())]
    assert texts(load_miner("keywords", column="kw", separator="|"), *pairs) == [["a", "b"], ["c", "d"], []]


def test_a_composition_gives_the_tags_of_its_parts_and_their_identity():
    miner = load_miner("rules+metadata", columns="brand", max_chars=500)
    (tags,) = mined(miner, SHOE)
    assert {"shoe", "red shoe", "Puma"} == {tag.text for tag in tags}
    assert miner.settings["rules"]["max_chars"] == 500
    assert miner.settings["metadata"]["columns"] == ["brand"]
    with pytest.raises(InvalidInput, match="'rules\\+metadata' has no setting 'colum'"):
        load_miner("rules+metadata", colum="brand")


def test_miners_that_others_install_are_found_by_entry_point(tmp_path: Path, monkeypatch):
    (tmp_path / "shouting.py").write_text(
        "from tagstore.types import Tag\n"
        "class Shout:\n"
        "    name, version = 'shout', '3'\n"
        "    def __init__(self, *, mark='!'):\n"
        "        self.settings = {'mark': mark}\n"
        "    def mine(self, pairs):\n"
        "        for pair in pairs:\n"
        "            yield (Tag(pair.key.upper() + self.settings['mark'], 'custom', (0, 0), -1),)\n"
    )
    info = tmp_path / "shouting-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[tagstore.miners]\nshout = shouting:Shout\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert texts(load_miner("shout", mark="?"), Pair("hey", b"", ())) == [["HEY?"]]
    with pytest.raises(InvalidInput, match="shout"):
        load_miner("whisper")


# what the published model answers, from its README and its repository; the parsing must read all of them
PIGS = (
    "( pigs , is , 2 ) , ( pigs , is , beautiful ) , ( bags , on back of , pigs ) , "
    "( pigs , fly on , sky ) , ( bags , is , 2 )"
)


def test_a_recorded_scene_graph_becomes_tags_with_places():
    caption = "2 beautiful pigs are flying on the sky with 2 bags on their backs"
    tags = {tag.text: tag for tag in graph_tags(PIGS, clean(caption, 400), 0, relations=True)}
    assert {text for text, tag in tags.items() if tag.kind == "object"} == {"pigs", "bags", "sky"}
    assert {text for text, tag in tags.items() if tag.kind == "attribute"} == {
        "2 pigs",
        "beautiful pigs",
        "2 bags",
    }
    assert {text for text, tag in tags.items() if tag.kind == "relation"} == {
        "bags on back of pigs",
        "pigs fly on sky",
    }
    assert caption[slice(*tags["beautiful pigs"].span)] == "beautiful pigs"
    assert tags["2 pigs"].canonical == "two pig"
    assert tags["bags on back of pigs"].score > 0


@pytest.mark.parametrize(
    ("graph", "read"),
    [
        ("", []),
        ("no graph at all", []),
        ("( dog , is , wet ) , ( dog , run o", [("dog", "is", "wet")]),
        ("( man:1 , v:ride , horse:2 )", [("man", "ride", "horse")]),
        ("(dog,is,wet),(dog,is,wet),(cat)", [("dog", "is", "wet"), ("cat",)]),
        ("( a , b ) , ( , is , wet )", []),
    ],
)
def test_facts_of_a_generated_graph(graph: str, read: list[tuple[str, ...]]):
    assert facts(graph) == read


def test_a_thing_that_the_caption_does_not_name_scores_low_and_has_no_place():
    tags = {
        tag.text: tag
        for tag in graph_tags("( unicorn , is , blue )", clean("a blue sky", 400), 2, relations=False)
    }
    assert tags["unicorn"].span == (0, 0)
    assert tags["unicorn"].caption == 2
    assert tags["unicorn"].score == 0.5


@pytest.fixture
def tiny_t5(tmp_path: Path) -> Path:
    """A T5 of random weights with a word tokenizer, saved as any seq2seq model is."""
    import torch

    from tagstore.encoding.torchvision_shim import prepare_torchvision

    prepare_torchvision()
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    words = [
        "<pad>",
        "</s>",
        "<unk>",
        "(",
        ")",
        ",",
        "is",
        "dog",
        "wet",
        "Generate",
        "Scene",
        "Graph",
        ":",
        "a",
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    torch.manual_seed(0)
    size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    T5ForConditionalGeneration(T5Config(vocab_size=len(words), **size, **ids)).save_pretrained(tmp_path)
    return tmp_path


def test_factual_reads_a_model_from_a_directory_and_keeps_the_order(tiny_t5: Path):
    miner = load_miner("factual", model=str(tiny_t5), device="cpu", batch_size=2, max_tokens=8)
    assert isinstance(miner, FactualMiner)
    pairs = [Pair(str(n), b"", ("a wet dog",) * (n % 3)) for n in range(5)]
    assert (
        len(mined(miner, *pairs)) == 5
    )  # weights are random: what counts is that tokenizer, model and decoding fit together
    miner._generate = lambda texts: [f"( {text.split()[-1]} , is , wet )" for text in texts]  # type: ignore[method-assign]
    pairs = [Pair("1", b"", ("a dog", "🎉")), Pair("2", b"", ()), Pair("3", b"", ("a cat",))]
    assert texts(miner, *pairs) == [["dog", "wet dog"], [], ["cat", "wet cat"]]


def test_a_model_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(NotFound, match="cannot load the scene graph model"):
        mined(load_miner("factual", model=str(tmp_path / "none"), device="cpu"), Pair("1", b"", ("a dog",)))


@pytest.fixture
def german(tmp_path: Path) -> Path:
    """A German pipeline on disk that knows the words of the test; it has no parser."""
    import spacy

    nlp = spacy.blank("de", meta={"name": "toy", "version": "1.2.3"})
    ruler = nlp.add_pipe("attribute_ruler")
    words = {"NOUN": ["Hund", "Garten", "Leine"], "ADJ": ["roter", "schwarzer"], "ADP": ["ohne", "im"]}
    for pos, texts in words.items():
        for text in texts:
            ruler.add([[{"LOWER": text.lower()}]], {"POS": pos, "LEMMA": text})  # type: ignore[attr-defined]
    entities = nlp.add_pipe("entity_ruler")
    entities.add_patterns([{"label": "PER", "pattern": "Anna"}])  # type: ignore[attr-defined]
    nlp.to_disk(tmp_path / "de_toy")
    return tmp_path / "de_toy"


def test_another_spacy_model_reads_the_captions_of_its_language(german: Path):
    caption = "Ein schwarzer Hund spielt ohne Leine mit Anna im Garten"
    miner = load_miner(f"rules+spacy:{german}")
    english, tags = mined(miner, Pair("1", b"", ("two dogs on the grass",)), Pair("2", b"", (caption,)))
    assert {(tag.text, tag.language) for tag in english} == {
        ("dog", "en"),
        ("two dogs", "en"),
        ("grass", "en"),
    }
    assert {(t.text, t.kind, t.canonical, t.language, caption[slice(*t.span)]) for t in tags} == {
        ("hund", "object", "hund", "de", "Hund"),
        ("schwarzer hund", "attribute", "schwarzer hund", "de", "schwarzer Hund"),
        ("garten", "object", "garten", "de", "Garten"),
        ("Anna", "entity", "anna", "de", "Anna"),
    }
    assert next(tag.label for tag in tags if tag.kind == "entity") == "PERSON"
    assert miner.settings["spacy"]["model"].startswith("de_toy 1.2.3, spacy")
    assert miner.settings["spacy"]["language"] == "de"


def test_a_spacy_model_that_is_not_there_is_named():
    with pytest.raises(NotFound, match="no spaCy model 'de_core_news_xxl'"):
        load_miner("spacy:de_core_news_xxl")
    with pytest.raises(InvalidInput, match="which spaCy model"):
        load_miner("spacy")
    with pytest.raises(InvalidInput, match="miner 'rules' has no model"):
        load_miner("rules:en_core_web_sm")


def test_captions_that_no_part_reads_are_counted(german: Path):
    captions = (
        "two dogs on the grass",
        "Ein schwarzer Hund spielt im Garten",
        "Un chat gris dort sur le canapé",
    )
    for spec, unread in (("rules", {"de": 1, "fr": 1}), (f"rules+spacy:{german}", {"fr": 1}), ("none", {})):
        miner = load_miner(spec)
        mined(miner, Pair("1", b"", captions))
        counts = unread_captions(miner)
        assert counts.pop("") == (3 if spec != "none" else 0)
        assert counts == unread
