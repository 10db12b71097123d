"""From an image and a question to an answer: with a store, without one, with a store that is down."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pictures import picture
from tagstore.client import connect
from tagstore.errors import FingerprintMismatch, InvalidInput, NotFound, TagstoreError
from tuna import features, small, tags
from tuna_model import (
    ContrastiveLogits,
    ImageTags,
    Pipeline,
    TagLookup,
    TunaForConditionalGeneration,
    presets,
    tag_prompt,
)
from tuna_model.cli import COMMANDS, cli
from tuna_model.inference.pipeline import user_message
from tuna_model.inference.prompt import relative_weights

NOWHERE = "grpc://127.0.0.1:9/shapes"


@pytest.fixture(scope="module")
def loaded(mini):
    return presets.load("tiny")


@pytest.fixture
def source(shapes_root: Path):
    with connect(f"file://{shapes_root}/shapes") as opened:
        yield opened


@pytest.fixture
def tuna(loaded, source) -> Pipeline:
    return Pipeline(*loaded, source)


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "red-circle.png"
    path.write_bytes(picture("red", "circle"))
    return str(path)


def test_an_answer_with_its_tags(tuna: Pipeline, image: str, server_address: str):
    options = {"max_new_tokens": 4, "min_new_tokens": 4}
    answer = tuna.answer(image, "What is it?", **options)
    assert answer.tags[0].text == "red circle"
    assert answer.tags[0].weight == 1.0
    relevance = [tag.relevance for tag in answer.tags]
    assert relevance == sorted(relevance, reverse=True)
    assert answer.neighbours[0].key == "red-circle"
    assert (answer.store, answer.version, answer.degraded, answer.finished) == ("shapes", 1, False, False)
    # the same from a server, and from bytes
    with connect(f"grpc://{server_address}/shapes") as remote:
        pipeline = Pipeline(tuna.model, tuna.processor, remote)
        assert pipeline.answer(Path(image).read_bytes(), "What is it?", **options) == answer


def test_a_batch_of_conversations_is_its_members(tuna: Pipeline, image: str):
    images = [[image, picture("blue", "square")], [], [picture("green", "triangle")]]
    conversations = [[user_message("compare", 2)], [user_message("hello")], [user_message("what?", 1)]]
    options = {"max_new_tokens": 4, "min_new_tokens": 4}
    together = tuna.answers(images, conversations, **options)
    for pictures, messages, answer in zip(images, conversations, together, strict=True):
        alone = tuna.answers([pictures], [messages], **options)[0]
        assert alone.text == answer.text
        assert [(tag.text, tag.image) for tag in alone.tags] == [(tag.text, tag.image) for tag in answer.tags]
        np.testing.assert_allclose(
            [tag.weight for tag in alone.tags], [tag.weight for tag in answer.tags], atol=1e-4
        )
    assert {tag.image for tag in together[0].tags} == {0, 1}
    with pytest.raises(InvalidInput, match="1 parts"):
        tuna.answers([[]], [[user_message("what?", 1)]])


def test_a_store_that_is_down_costs_the_tags_and_is_counted(loaded, image: str):
    with connect(NOWHERE, timeout=0.3) as nowhere, connect("null://") as nothing:
        down, without = Pipeline(*loaded, nowhere), Pipeline(*loaded, nothing)
        degraded, plain = (one.answer(image, "What?", max_new_tokens=3) for one in (down, without))
    assert degraded.degraded
    assert not plain.degraded
    assert degraded.text == plain.text
    assert not degraded.tags
    assert down.lookup.degraded == 1
    assert "127.0.0.1:9" in down.lookup.last_error
    with connect(NOWHERE, timeout=0.3, on_failure="empty") as quiet:
        assert Pipeline(*loaded, quiet).answer(image, "What?", max_new_tokens=3).degraded


def test_another_store_than_the_checkpoints_is_refused(loaded, source, image: str):
    vector = loaded[0].encode_images(loaded[1].image_processor(image)["pixel_values"])[1]
    digest = loaded[0].config.encoder_digest
    for pins in ({"store": "flickr8k"}, {"store": "shapes", "version": 7}):
        with pytest.raises(InvalidInput, match="any_store=True"):
            TagLookup(source, **pins)(vector, digest)
        assert len(TagLookup(source, **pins, any_store=True)(vector, digest)[0])
    assert len(TagLookup(source, store="shapes", version=1)(vector, digest)[0])
    with pytest.raises(FingerprintMismatch):
        TagLookup(source)(vector, "0" * 16)


def test_a_configuration_says_how_the_store_is_asked(loaded, source, image: str):
    model, processor = loaded
    vector = model.encode_images(processor.image_processor(image)["pixel_values"])[1]
    for k in (1, 3):
        lookup = TagLookup.of(source, presets.tiny_config(neighbours=k, store="shapes", store_version=1))
        ((tags, answer),) = lookup.detailed(vector, model.config.encoder_digest)
        assert len(answer.neighbours) == k
        np.testing.assert_allclose(tags.vote_share, [tag.votes / k for tag in answer.tags])
    for pins in ({"store": "flickr8k"}, {"store": "shapes", "store_version": 7}):
        with pytest.raises(InvalidInput, match="any_store=True"):
            TagLookup.of(source, presets.tiny_config(**pins))(vector, model.config.encoder_digest)


def test_a_tag_crosses_the_wire_once(loaded, image: str, server_address: str):
    model, processor = loaded
    vector = model.encode_images(processor.image_processor(image)["pixel_values"])[1]
    with connect(f"grpc://{server_address}/shapes") as remote:
        lookup = TagLookup(remote)
        first, second = (lookup(vector, model.config.encoder_digest)[0] for _ in range(2))
        stats = remote.stats()
    assert first.texts == second.texts
    assert (stats.embedding_misses, stats.embedding_hits) == (len(first), len(first))


def test_relevance_is_the_cosine_that_the_model_weighs_by(loaded, source, image: str):
    model, processor = loaded
    grid, vectors = model.encode_images(processor.image_processor(image)["pixel_values"])
    [found] = TagLookup(source)(vectors, model.config.encoder_digest)
    np.testing.assert_allclose(found.relevance, found.embeddings @ vectors[0].numpy(), atol=1e-6)
    with torch.no_grad():
        out = model(**processor(text="<image>", tags=[found]), grid=grid, image_vectors=vectors)
    relevance = np.array(sorted(found.relevance, reverse=True)[: len(out.tag_weights)])
    np.testing.assert_allclose(out.tag_weights.numpy(), np.exp((relevance - relevance[0]) / 0.1), rtol=1e-3)


def test_a_stream_is_the_answer_in_pieces_and_can_be_left(tuna: Pipeline, image: str):
    messages = [user_message("What is it?", 1)]
    options = {"max_new_tokens": 12, "min_new_tokens": 12}
    streamed = "".join(tuna.stream([image], messages, **options)).strip()
    assert streamed == tuna.answers([[image]], [messages], **options)[0].text
    pieces = tuna.stream([image], messages, max_new_tokens=100_000, min_new_tokens=100_000)
    next(pieces)
    pieces.close()  # ends the thread: the fixture looks for threads left behind
    with pytest.raises(ValueError, match="top_k"):
        list(tuna.stream([image], messages, do_sample=True, top_k=-3))


def test_a_configuration_names_its_encoder():
    model = TunaForConditionalGeneration(presets.tiny_config(encoder="no-such-encoder"))
    with pytest.raises(TagstoreError, match="no-such-encoder"):
        model.encode_images(torch.zeros(1, 3, 224, 224))


def test_an_encoder_of_another_fingerprint_is_refused(loaded, mini):
    config = presets.tiny_config(encoder_digest="0123456789abcdef")
    model = TunaForConditionalGeneration(config)
    with pytest.raises(FingerprintMismatch, match="0123456789abcdef"):
        model.use_encoder(mini)
    assert not any(
        "trunk" in name for name in loaded[0].state_dict()
    )  # the frozen encoder is no part of the weights


def test_what_the_encoder_computes_is_on_the_models_device(mini):
    """The encoder stays on the CPU, wherever the model is: on a GPU, tags ended answers with an error."""
    model, _ = presets.load("tiny")
    features = model.to("meta").encode_images(torch.zeros(1, 3, 224, 224))
    assert [tensor.device.type for tensor in features] == ["meta", "meta"]


def contrast(alpha: float | None, beta: float, wrong_tags: bool = False, **options):
    model, processor = small(tag_coupling="log_bias")
    prompts = ["Say <image> it", "<image>"]
    given = dict(processor(text=prompts, tags=[tags(3), tags(2, 1)])) | features(2)
    if wrong_tags:
        against = dict(processor(text=prompts, tags=[tags(4, 7), tags(1, 8)])) | features(2)
    else:
        against = dict(processor(text=["Say it", "and"]))
    logits = [ContrastiveLogits(model, against, alpha=alpha, beta=beta)] if alpha is not None else []
    options |= {"max_new_tokens": 5, "min_new_tokens": 5, "logits_processor": logits}
    return model, given, against, model.generate(**given, **options)


@pytest.mark.parametrize("wrong_tags", [False, True])
def test_contrastive_decoding_follows_its_formula(wrong_tags: bool):
    """Without a cache, each step scores likely tokens as (1 + alpha) * with tags - alpha * against."""
    alpha, beta = 1.5, 0.2
    model, given, against, generated = contrast(alpha, beta, wrong_tags, do_sample=False)
    new_tokens = torch.zeros(2, 0, dtype=torch.int64)
    for _ in range(5):

        def after(inputs, new_tokens=new_tokens):
            longer = {
                "input_ids": torch.cat([inputs["input_ids"], new_tokens], 1),
                "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(new_tokens)], 1),
            }
            positions = (longer["attention_mask"].cumsum(1) - 1).clamp_min(0)
            with torch.no_grad():
                return model(**inputs | longer, position_ids=positions).logits[:, -1]

        scores = after(given)
        scores[:, model.config.text_config.eos_token_id] = -torch.inf
        mixed = (1 + alpha) * scores - alpha * after(against)
        probability = scores.softmax(-1)
        mixed[probability < beta * probability.max(-1, keepdim=True).values] = -torch.inf
        new_tokens = torch.cat([new_tokens, mixed.argmax(-1, keepdim=True)], 1)
    assert torch.equal(generated[:, -5:], new_tokens)


@pytest.mark.parametrize(
    "options", [{"do_sample": False}, {"do_sample": False, "num_beams": 3}], ids=["greedy", "beams"]
)
def test_contrast_of_no_strength_changes_nothing(options: dict):
    assert torch.equal(contrast(0.0, 0.0, **options)[3], contrast(None, 0.0, **options)[3])
    if "num_beams" in options:
        assert contrast(1.0, 0.1, True, **options)[3].shape == contrast(None, 0.0, **options)[3].shape
    with pytest.raises(InvalidInput, match="alpha"):
        ContrastiveLogits(None, {}, alpha=-1)


def test_a_pipeline_contrasts_with_itself_without_tags(shapes_root: Path):
    url, image = f"file://{shapes_root}/shapes", picture("red", "circle")
    options = {"max_new_tokens": 6, "do_sample": False}
    plain, contrasting = (Pipeline.load("tiny", store=url, contrast=alpha) for alpha in (0.0, 1.5))
    prepared = contrasting.prepare([[image]], [[user_message("What?", 1)]])
    assert plain.prepare([[image]], [[user_message("What?", 1)]]).against is None
    logits = ContrastiveLogits(plain.model, prepared.against, alpha=1.5)
    expected = plain.answer(image, "What?", logits_processor=[logits], **options)
    answer = contrasting.answer(image, "What?", **options)
    assert answer == expected != plain.answer(image, "What?", **options)
    assert contrasting.answer(image, "What?", num_beams=2, **options).text
    without = ImageTags.none(plain.model.config.tag_dimension)
    assert contrasting.answer(image, "What?", tags=without, **options).text == (
        plain.answer(image, "What?", tags=without, **options).text
    )
    with pytest.raises(InvalidInput, match="contrast is -1"):
        Pipeline.load("tiny", contrast=-1)


def test_prompts_for_models_that_know_nothing_of_tags():
    three_tags = tags(3)
    weights = relative_weights(three_tags)
    assert weights.max() == 1
    text = tag_prompt("What is it?", three_tags)
    assert text.endswith("\n\nWhat is it?")
    best = int(three_tags.relevance.argmax())
    assert f"from 0 to 1: {three_tags.texts[best]} (1.00)" in text
    for style in ("words", "list"):
        assert all(word in tag_prompt("?", three_tags, style=style) for word in three_tags.texts)
    assert "fit it less well" in tag_prompt("?", three_tags, style="words", temperature=0.01)
    assert tag_prompt("What is it?", three_tags.take([])) == "What is it?"
    for wrong in ({"style": "loud"}, {"temperature": 0.0}):
        with pytest.raises(InvalidInput):
            tag_prompt("?", three_tags, **wrong)


def run(options: str, *arguments: str, text: str | None = None):
    """Run `tuna` with the words of `options` and with arguments; `text` is its standard input."""
    return CliRunner().invoke(cli, [*options.split(), *arguments], input=text, catch_exceptions=False)


def test_tuna_generate(image: str, shapes_root: Path, mini):
    options = "generate --model tiny --max-tokens 4 --store"
    store = f"file://{shapes_root}/shapes"
    value = json.loads(run(options, store, image, "What?", "--json").stdout)
    assert value["tags"][0]["text"] == "red circle"
    assert all(tag["votes"] == tag["vote_share"] for tag in value["tags"])  # its old name, deprecated
    assert value["neighbours"][0]["key"] == "red-circle"
    plain = run(options, store, image, "What?")
    assert plain.stdout == value["answer"] + "\n"
    assert not plain.stderr
    down = run(options, NOWHERE, "--timeout", "0.3", image, "What?")
    assert down.exit_code == 0
    assert down.stderr.startswith("without tags: ")
    with pytest.raises(NotFound, match="nor a preset"):
        run("generate --model no-such-model", image, "What?")


def test_tuna_chat(image: str, shapes_root: Path, mini):
    lines = (
        f"hello\n/image {image}\nand this?\n/tags\n/image nowhere.png\nwhat?\n/help\n/reset\n/tags\n/quit\n"
    )
    chat = run(f"chat --model tiny --store file://{shapes_root}/shapes --max-tokens 3", image, text=lines)
    assert chat.exit_code == 0
    assert chat.stderr.count("red circle") == 2  # of each of the two pictures
    assert "cannot read image nowhere.png" in chat.stderr
    assert "no tags" in chat.stderr


def test_tuna_prompt(image: str, shapes_root: Path):
    options = f"prompt --store file://{shapes_root}/shapes"
    value = json.loads(run(options, image, "What is it?", "--json").stdout)
    assert value["tags"][0] == {"tag": "red circle", "weight": 1.0}
    assert run(options, image, "What is it?").stdout == value["prompt"] + "\n"


def test_help_is_quick_and_names_every_command():
    code = (
        "import sys\nfrom tuna_model.cli import cli\n"
        "cli(['--help'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert all(name in out for name in COMMANDS)
    assert all(run(name, "--help").exit_code == 0 for name in ("generate", "chat", "prompt"))


@pytest.mark.parametrize("stream", [False, True])
def test_a_decoder_that_computes_no_numbers_is_an_error_and_no_empty_answer(source, stream: bool):
    broken = Pipeline(*presets.load("tiny"), source)
    with torch.no_grad():
        broken.model.language_model.model.norm.weight.fill_(torch.nan)
    messages = [{"role": "user", "content": "What fruit is this?"}]
    ask = broken.stream if stream else lambda images, asked, **more: broken.answers([images], [asked], **more)
    with pytest.raises(ArithmeticError, match=r"not numbers \(NaN\)"):
        list(ask([], messages, max_new_tokens=12))


@pytest.mark.slow
def test_smol_answers_sanely_without_a_network(monkeypatch, mini, source):
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a network connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    smol = Pipeline(*presets.load("smol"), source, any_store=True)
    # its decoder is as it was
    assert "Paris" in smol.answer(None, "What is the capital of France?", max_new_tokens=20).text
    with_tags = smol.answer(
        picture("red", "circle"), "Describe the image in one sentence.", max_new_tokens=40
    )
    assert with_tags.finished
    assert with_tags.text.strip()
    # an empty answer to this was seen once
    for image in (None, picture("red", "circle")):
        short = smol.answer(image, "What fruit is this?", max_new_tokens=12)
        assert short.text
        assert 1 < short.tokens <= 12
    assert "red circle" in [tag.text for tag in with_tags.tags]
    without, _ = presets.load("smol", tags=False)
    batch = smol.processor(text="<image> What is it?", images=[picture("red", "circle")])
    with torch.no_grad():
        assert torch.equal(smol.model(**batch).logits, without(**batch).logits)
