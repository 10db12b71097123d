"""Any model of transformers reads the tags of a store; without them it says the same as alone."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from pictures import picture
from tagstore.client import connect
from tagstore.errors import InvalidInput
from tuna_model import ContrastiveLogits, with_tags
from tuna_model.inference.with_tags import TaggedModel
from vlms import FAMILIES, WORDS, small_vlm

QUESTION = "What is this?"
OPTIONS = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def url(shapes_root: Path) -> str:
    return f"file://{shapes_root}/shapes"


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.open(io.BytesIO(picture("red", "circle"))).convert("RGB")


def conversation(image: object, question: str = QUESTION) -> list[dict[str, object]]:
    return [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}
    ]


def plain(asker: TaggedModel, messages: list[dict[str, object]]) -> torch.Tensor:
    """What transformers alone answers."""
    batch = asker.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return asker.model.generate(**batch, **OPTIONS)[:, batch["input_ids"].shape[1] :]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, url: str, photo: Image.Image):
    model, processor = small_vlm(family)
    messages = conversation(photo)
    with with_tags(model, processor, url, style="candidates", max_tags=3) as asker:
        batch = asker.inputs(messages)
        text = processor.batch_decode(batch["input_ids"])[0]
        [tags] = asker.tag(messages).tags
        assert len(tags) == 3
        line = f"The answer is likely one of these, the likeliest first: {', '.join(tags)}."
        assert f"{line}\n\n{QUESTION}" in text
        ids = asker.generate(messages, **OPTIONS)
        assert torch.equal(ids, model.generate(**batch, **OPTIONS)[:, batch["input_ids"].shape[1] :])
        answer = asker.answer(photo, QUESTION, **OPTIONS)
        assert (answer.tags, answer.store, answer.degraded) == ((tags,), "shapes@1", "")
        assert messages == conversation(photo)  # the caller's own are not changed
    # no tags: what transformers alone says
    with with_tags(model, processor, "null://") as asker:
        assert torch.equal(asker.generate(messages, **OPTIONS), plain(asker, messages))


@pytest.mark.parametrize("family", ["Llava", "Qwen2VL", "Qwen3VL", "Idefics3"])
def test_contrastive_decoding_of_other_models(family: str, url: str, photo: Image.Image):
    model, processor = small_vlm(family)
    messages = conversation(photo)
    with with_tags(model, processor, url, style="list") as asker:
        greedy = asker.generate(messages, **OPTIONS)
        batch, other = asker.inputs(messages), asker.inputs(asker.tag(conversation(photo, "Where is it?")))
        length = batch["input_ids"].shape[1]

        def contrasted(against: object, alpha: float) -> torch.Tensor:
            logits = ContrastiveLogits(model, dict(against), alpha=alpha, beta=0)
            return model.generate(**batch, logits_processor=[logits], **OPTIONS)[:, length:]

        assert torch.equal(contrasted(other, 0.0), greedy)
        assert torch.equal(contrasted(batch, 1.0), greedy)  # against itself nothing changes
        assert torch.equal(asker.generate(messages, **OPTIONS), greedy)  # nothing is left behind in the model
        # each token is the best of (1 + alpha) with - alpha against, recomputed from whole sequences
        alpha, chosen = 2.0, contrasted(other, 2.0)
        for step in range(chosen.shape[1]):
            scores = [following(model, inputs, chosen[:, :step]) for inputs in (batch, other)]
            mixed = ((1 + alpha) * scores[0] - alpha * scores[1])[:, :WORDS]
            assert mixed[0, chosen[0, step]] >= mixed.max() - 1e-4
        assert asker.answer(photo, QUESTION, contrast=1.0, **OPTIONS).tags


def following(model: object, inputs: dict[str, torch.Tensor], generated: torch.Tensor) -> torch.Tensor:
    """Logits of the token after a prompt and some tokens, in one forward."""
    inputs = dict(inputs)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], generated], dim=1)
    for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.full_like(generated, fill)], dim=1)
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[:, -1].float()


def test_styles_and_places(url: str, photo: Image.Image):
    model, processor = small_vlm("Llava")
    two = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [
            {"type": "image", "image": photo}, {"type": "image", "image": photo},
            {"type": "text", "text": "Both?"},
        ]},
    ]  # fmt: skip
    with with_tags(model, processor, url, place="system", template="TAGS {tags}", max_tags=1) as asker:
        tagged = asker.tag(two)
        [[first], [second]] = tagged.tags
        assert tagged.messages[0]["content"] == (
            f"Be brief.\n\nPicture 1: TAGS {first}\nPicture 2: TAGS {second}"
        )
        assert tagged.messages[1] == two[1]
        assert asker.tag([two[1]]).messages[0]["role"] == "system"
    with with_tags(model, processor, url, text_only=True, ban=("RED circle",)) as asker:
        [message] = asker.tag(conversation(photo)).messages
        assert [part["type"] for part in message["content"]] == ["text"]
        assert "red circle" not in message["content"][0]["text"]


def test_pictures_as_messages_hold_them(url: str, photo: Image.Image, tmp_path: Path):
    model, processor = small_vlm("Llava")
    data = picture("red", "circle")
    (tmp_path / "a.png").write_bytes(data)
    encoded = base64.b64encode(data).decode()
    with with_tags(model, processor, url) as asker:
        expected = asker.tag(conversation(photo)).tags
        assert expected[0]
        for part in (
            {"image": data}, {"image": tmp_path / "a.png"}, {"path": str(tmp_path / "a.png")},
            {"base64": encoded}, {"url": f"data:image/png;base64,{encoded}"},
        ):  # fmt: skip
            [message] = conversation(photo)
            message["content"][0] = {"type": "image", **part}
            assert asker.tag([message]).tags == expected, part
            asker.inputs([message])
        assert asker.tag([{"role": "user", "content": QUESTION}]).tags == ()
        assert asker.degraded == 0


def test_what_gets_no_tags_says_why(url: str, photo: Image.Image):
    model, processor = small_vlm("Llava")
    with with_tags(model, processor, "grpc://127.0.0.1:1/shapes", timeout=0.5) as asker:
        tagged = asker.tag(conversation(photo))
        assert tagged.degraded in ("unavailable", "deadline")
        assert tagged.messages == conversation(photo)
        assert torch.equal(asker.generate(tagged, contrast=1.0, **OPTIONS), plain(asker, conversation(photo)))
        assert asker.degraded == 1
    with with_tags(model, processor, url) as asker:
        assert asker.tag(conversation("https://example.org/a.jpg")).degraded == "address"
        assert asker.tag(conversation(b"no image")).degraded == "picture"
        assert asker.tag(conversation(None)).degraded == "picture"


def test_what_makes_no_sense_is_refused(url: str):
    model, processor = small_vlm("Llava")
    for style, message in (
        ({"style": "loud"}, "style 'loud' is not one of"), ({"max_tags": 0}, "max_tags is 0"),
        ({"colour": 1}, "a style has no field colour: there are style, place"),
        ({"template": "no tags"}, "a template holds {tags}"), ({"threshold": 2}, "threshold is 2"),
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=message.replace("{", "[{]")):
            with_tags(model, processor, url, **style)
    processor.chat_template = None
    with pytest.raises(InvalidInput, match="LlavaProcessor has no chat template"):
        with_tags(model, processor, connect("null://"))
