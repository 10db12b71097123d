"""Whatever stands in a training file: markers of pictures, line separators, who speaks first."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from captioned import write_llava
from pictures import picture
from tagstore.errors import InvalidInput
from tagstore.readers import read
from tagstore.readers.samples import Turn, read_samples
from tagstore.types import Pair
from test_train import recipe_of
from tuna import small, tags
from tuna_model.inference.conversations import Reader
from tuna_model.training.collator import IGNORED, Collator
from tuna_model.training.train import train

ODD = "a red\u2028circle\u2029with\u0085a\x1clot\x0bof\x0cends"
"""What Python takes for ends of lines, and JSON does not."""


def human(text: str) -> dict:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict:
    return {"from": "gpt", "value": text}


def write(folder: Path, *records: dict, name: str = "data.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for colour in ("red", "blue", "green"):
        (folder / f"{colour}.png").write_bytes(picture(colour, "circle"))
    (folder / name).write_text(json.dumps(list(records)))
    return folder / name


def turns_of(folder: Path, images: list[str], *turns: dict) -> tuple[Turn, ...]:
    [sample] = read_samples(write(folder, {"id": "x", "images": images, "conversations": list(turns)}))
    return sample.turns


# pictures


def test_pictures_of_later_turns_stay_there(tmp_path: Path):
    turns = turns_of(
        tmp_path, ["red.png", "blue.png"],
        human("<image>\nWhat is it?"), gpt("Red."), human("And this?\n<image>"), gpt("Blue."),
    )  # fmt: skip
    assert turns == (
        Turn("user", "What is it?", (0,)),
        Turn("assistant", "Red."),
        Turn("user", "And this?", (0,)),  # at an end: LLaVA shows it first
        Turn("assistant", "Blue."),
    )


def test_pictures_within_a_text_stay_there(tmp_path: Path):
    turns = turns_of(
        tmp_path, ["red.png", "blue.png"], human("Compare <image> with <image>, please."), gpt("No.")
    )
    assert turns[0] == Turn("user", "Compare  with , please.", (8, 14))


@pytest.mark.parametrize("text", ["What is it?", "<image>\nWhat is it?", "What is it?\n<image>"])
def test_pictures_without_a_place_come_first(tmp_path: Path, text: str):
    assert turns_of(tmp_path, ["red.png"], human(text), gpt("Red."))[0] == Turn("user", "What is it?")
    # fewer markers than pictures say nothing
    two = turns_of(tmp_path, ["red.png", "blue.png"], human(text), gpt("Red."))
    assert two[0] == Turn("user", "What is it?")


def test_a_marker_without_a_picture_is_text(tmp_path: Path):
    """As in conversations about HTML, which LLaVA's data has."""
    turns = turns_of(tmp_path, [], human("What is <image>?"), gpt("<image> is a tag."))
    assert [turn.text for turn in turns] == ["What is <image>?", "<image> is a tag."]
    one = turns_of(tmp_path, ["red.png"], human("<image>\nWhat is <image>?"), gpt("<image>, you say?"))
    assert [turn.text for turn in one] == ["What is <image>?", "<image>, you say?"]
    _, processor = small()
    encoded, labels = Collator(processor).encode(one, [tags(2)])
    shown = sum(
        token == processor.image_token_id and tag < 0
        for token, tag in zip(encoded.input_ids, encoded.tag_index, strict=True)
    )
    assert shown == processor.image_tokens
    assert processor.image_token_id not in labels
    assert processor.tokenizer.decode(encoded.input_ids).count("< image>") == 2


@pytest.mark.parametrize("context", ["", "Captions."])
def test_a_sample_is_learnt_as_the_conversation_is_answered(tmp_path: Path, context: str):
    turns = turns_of(
        tmp_path, ["red.png", "blue.png", "green.png"],
        human("<image>\nWhat is it?"), gpt("Red."), human("Is <image> as <image>?"), gpt("No."),
    )  # fmt: skip
    _, processor = small()
    found = [tags(2, seed) for seed in range(3)]
    encoded, labels = Collator(processor).encode(turns, found, context)
    image = {"type": "image"}

    def text(words: str) -> dict:
        return {"type": "text", "text": words}

    first = text(f"{context}\nWhat is it?" if context else "What is it?")
    asked = [
        {"role": "user", "content": [image, first]},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": [text("Is "), image, text(" as "), image, text("?")]},
    ]
    prompt = Reader(processor, 0).read([pixels() for _ in range(3)], asked)
    expected = processor.insert(prompt.token_ids, found)
    size = len(expected.input_ids)
    assert encoded.input_ids[:size] == expected.input_ids
    assert encoded.tag_index[:size] == expected.tag_index
    assert encoded.words == expected.words
    assert processor.tokenizer.decode([label for label in labels[size:] if label != IGNORED]).startswith(
        " No."
    )


def pixels():
    import torch

    return torch.zeros(3, 32, 32)


def test_a_picture_that_is_cut_off_is_named():
    _, processor = small()
    turns = [Turn("user", "x" * 100), Turn("assistant", "y"), Turn("user", "z", (0,)), Turn("assistant", "!")]
    with pytest.raises(InvalidInput, match=r"sample k: a picture of it stands after .* beyond 110 tokens"):
        Collator(processor, max_length=110)(["k"], [turns], [[tags(0)]])


# texts


def test_a_caption_with_a_marker_does_not_end_a_run(tmp_path: Path):
    caption = "A circle <image> that is </s><s> red<|im_end|>"
    records = [{"id": str(i), "image": "red.png", "captions": [caption]} for i in range(8)]
    data = {"path": str(write(tmp_path, *records))}
    for template in ("chat", "plain"):
        recipe = recipe_of(tmp_path, template, steps=1, data=data | {"template": template})
        assert train(recipe).exists()


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_json_lines_are_split_at_line_feeds_only_and_may_begin_with_a_mark(tmp_path: Path, name: str):
    write(tmp_path)
    records = [
        {"id": "a", "image": "red.png", "caption": ODD},
        {"id": "b", "image": "blue.png", "conversations": [human(ODD), gpt(ODD)]},
    ]
    # a carriage return is a blank between the words of JSON
    lines = [json.dumps(record, ensure_ascii=False).replace('": ', '":\r') for record in records]
    data = b"\xef\xbb\xbf" + "\r\n".join(lines).encode()
    data = gzip.compress(data) if name.endswith(".gz") else data
    (tmp_path / name).write_bytes(data)
    first, second = read_samples(tmp_path / name)
    assert (first.captions, second.turns) == ((ODD,), (Turn("user", ODD), Turn("assistant", ODD)))


def test_ingest_splits_json_lines_alike(tmp_path: Path):
    write(tmp_path)
    line = json.dumps({"key": "a", "image": "red.png", "caption": ODD}, ensure_ascii=False)
    (tmp_path / "pairs.jsonl").write_bytes(b"\xef\xbb\xbf" + line.replace('": ', '":\r').encode() + b"\n")
    [pair] = read(str(tmp_path / "pairs.jsonl"))
    assert isinstance(pair, Pair)
    assert pair.captions == (ODD,)


# who speaks


def test_a_conversation_begins_with_the_user(tmp_path: Path):
    def data(*turns: dict) -> Path:
        good = {"id": "good", "conversations": [human("?"), gpt("!")]}
        return write(tmp_path, good, {"id": "x", "image": "red.png", "conversations": list(turns)})

    with pytest.raises(InvalidInput, match=r"data\.json, record 1: the conversation begins with an answer"):
        read_samples(data(gpt("Hello."), human("?"), gpt("!")))
    system = {"from": "system", "value": "Be brief."}
    with pytest.raises(InvalidInput, match="must begin with the user"):
        read_samples(data(system, gpt("Hello.")))
    assert [turn.role for turn in read_samples(data(system, human("?"), gpt("!")))[1].turns] == [
        "system", "user", "assistant",
    ]  # fmt: skip


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_a_run_learns_from_system_turns(tmp_path: Path, template: str):
    system = {"from": "system", "value": "Be brief."}
    records = [
        {"id": str(i), "image": "red.png", "conversations": [system, human("What?"), gpt("Red.")]}
        for i in range(8)
    ]
    recipe = recipe_of(
        tmp_path, "out", steps=1, data={"path": str(write(tmp_path, *records)), "template": template}
    )
    assert train(recipe).exists()


# runs


def test_sequences_beyond_the_context_are_refused_before_anything_is_computed(tmp_path: Path):
    def nothing(*_: object) -> None:
        pytest.fail("images were embedded")

    write_llava(tmp_path / "data", 10)
    data = {"path": str(tmp_path / "data" / "data.json"), "features": str(tmp_path / "features")}
    recipe = recipe_of(tmp_path, "out", data=data | {"max_length": 2049})
    with pytest.raises(
        InvalidInput, match=r"data\.max_length is 2049, and the context of model 'tiny' holds 2048"
    ):
        train(recipe, preparing=nothing)
    assert not (tmp_path / "features").exists()


def test_a_run_resumes_only_on_the_data_it_began_with(tmp_path: Path):
    write_llava(tmp_path / "data", 10)
    file = tmp_path / "data" / "data.json"
    recipe = recipe_of(tmp_path, "out", steps=2, data={"path": str(file)})
    train(recipe)
    longer = recipe_of(tmp_path, "out", steps=4, data={"path": str(file)})
    whole = json.loads(file.read_text())
    image = file.parent / whole[0]["image"]
    pixels = image.read_bytes()

    changed = json.loads(file.read_text())
    changed[3]["conversations"][1]["value"] = "Another answer."
    for records in (changed, whole[:-1], [whole[1], whole[0], *whole[2:]]):
        file.write_text(json.dumps(records))
        with pytest.raises(InvalidInput, match=r"trained on other data than data.path holds now"):
            train(longer)
    file.write_text(json.dumps(whole))
    image.write_bytes(pixels + b"\0")
    with pytest.raises(InvalidInput, match="trained on other data"):
        train(longer)
    image.write_bytes(pixels)
    moved = tmp_path / "elsewhere"
    (tmp_path / "data").rename(moved)
    train(recipe_of(tmp_path, "out", steps=4, data={"path": str(moved / "data.json")}))


def test_a_run_may_be_prolonged(tmp_path: Path):
    write_llava(tmp_path / "data", 40)
    data = {"path": str(tmp_path / "data" / "data.json"), "features": str(tmp_path / "features")}
    assert train(recipe_of(tmp_path, "out", data=data)).name == "step-000006"
    assert train(recipe_of(tmp_path, "out", steps=12, data=data)).name == "step-000012"
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    rates = [line["rates"]["connector"] for line in lines]
    assert rates[5] < rates[6] > rates[11]  # the new steps have the rates of the longer run
    with pytest.raises(InvalidInput, match=r"another recipe \(steps 12 -> 8\)"):
        train(recipe_of(tmp_path, "out", steps=8, data=data))


def test_a_checkpoint_from_before_there_was_a_digest_can_be_resumed(tmp_path: Path):
    write_llava(tmp_path / "data", 10)
    data = {"path": str(tmp_path / "data" / "data.json")}
    record = train(recipe_of(tmp_path, "out", steps=1, data=data)) / "tuna.json"
    values = json.loads(record.read_text())
    assert len(values.pop("data")) == 64
    record.write_text(json.dumps(values))
    assert train(recipe_of(tmp_path, "out", steps=2, data=data)).name == "step-000002"
