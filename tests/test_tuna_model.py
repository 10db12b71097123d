"""Properties of the model: results do not depend on batch or cache, and weights act as configured."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from tagstore.errors import InvalidInput
from tuna import C, features, rows, small, tags
from tuna_model import TunaConfig, TunaForConditionalGeneration, presets
from tuna_model.processing.tags import TagLayout

PROMPTS = ["Look: <image> what is it?", "no picture", "<image><image> and now?"]
RAGGED = [tags(3), None, tags(5, 1)]
"""Of the three pictures of PROMPTS."""


def ragged(processor, side: str = "left") -> dict[str, torch.Tensor]:
    return dict(processor(text=PROMPTS, tags=RAGGED, padding_side=side)) | features(3)


def alone(processor) -> list[dict[str, torch.Tensor]]:
    """The prompts of `ragged`, each in a batch of its own."""
    batches = []
    for prompt, images in zip(PROMPTS, (slice(0, 1), slice(0, 0), slice(1, 3)), strict=True):
        grids = rows(features(3), images) if images.stop > images.start else {}
        batches.append(dict(processor(text=prompt, tags=RAGGED[images] or None)) | grids)
    return batches


IDS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
NARROW = {"hidden_size": 24, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 3}
BASE = {"vocab_size": 260, **WIDTH, **IDS}
QWEN = {"text_config": Qwen2Config(**BASE, num_key_value_heads=2, tie_word_embeddings=True)}
SMOLLM_HEADS = {"num_key_value_heads": 1, "head_dim": 8, "rope_theta": 100000.0}
SMOLLM_TEXT = LlamaConfig(vocab_size=260, **NARROW, **SMOLLM_HEADS, **IDS, tie_word_embeddings=True)
SMOLLM = {"text_config": SMOLLM_TEXT}
KINDS = {"llama": {}, "qwen2": QWEN, "smollm2": SMOLLM, "token": {"tag_queries": "token"}}
KINDS |= {coupling: {"tag_coupling": coupling} for coupling in ("log_bias", "drop")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_members_and_padding_changes_nothing(kind: str, side: str):
    model, processor = small(**copy.deepcopy(KINDS[kind]))
    batch = ragged(processor, side)
    with torch.no_grad():
        together = model(**batch).logits
        for row, single in enumerate(alone(processor)):
            logits = together[row][batch["attention_mask"][row].bool()]
            torch.testing.assert_close(logits, model(**single).logits[0], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_changes_nothing(kind: str):
    model, processor = small(**copy.deepcopy(KINDS[kind]))
    batch = ragged(processor)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    cached, plain = (model.generate(**batch, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    for with_cache, without in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(with_cache, without, atol=2e-4, rtol=1e-3)


OTHERS = {
    "mistral": MistralConfig(**BASE, num_key_value_heads=2, sliding_window=16),
    "gemma2": Gemma2Config(**BASE, num_key_value_heads=2, head_dim=8, sliding_window=16),
    "phi": PhiConfig(**BASE),
    "gpt2": GPT2Config(
        vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=256, eos_token_id=257
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_any_decoder_of_transformers(name: str):
    """Sliding windows, soft caps, biased heads and learned positions work: the decoder's own forward runs."""
    model, processor = small(text_config=copy.deepcopy(OTHERS[name]))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    together = model.generate(**ragged(processor), **options)
    assert torch.equal(together, model.generate(**ragged(processor), **options, use_cache=False))
    for row, single in enumerate(alone(processor)):
        assert torch.equal(together[row, -4:], model.generate(**single, **options)[0, -4:])
    if name in ("mistral", "gemma2"):
        with pytest.raises(ValueError, match="without sliding windows"):
            small(text_config=copy.deepcopy(OTHERS[name]), tag_coupling="log_bias")[0](**ragged(processor))


def test_a_static_cache_changes_nothing():
    model, processor = small()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    static = {"cache_implementation": "static", "disable_compile": True}
    dynamic = model.generate(**ragged(processor), **options)
    assert torch.equal(model.generate(**ragged(processor), **options, **static), dynamic)


@pytest.mark.parametrize("kind", ["llama", "log_bias"])
def test_beams_of_a_batch_are_those_of_its_members(kind: str):
    model, processor = small(**KINDS[kind])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3, "do_sample": False}
    together = model.generate(**ragged(processor), **options)
    for row, single in enumerate(alone(processor)):
        assert torch.equal(together[row, -5:], model.generate(**single, **options)[0, -5:])
    # without a cache every step looks the pictures' tokens up again
    assert torch.equal(together, model.generate(**ragged(processor), **options, use_cache=False))


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("coupling", ["multiply", "log_bias", "drop"])
def test_a_prompt_read_in_chunks_is_answered_alike(coupling: str, more: dict):
    if coupling != "multiply" and "cache_implementation" in more:
        pytest.skip("a bias needs a dynamic cache")
    model, processor = small(tag_coupling=coupling)
    batch = processor(text=["<image> What is it?", "Hi <image> there"], tags=[tags(3), tags(2, 1)])
    options = {**batch, **features(2), "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **more}
    whole = model.generate(**options)
    for size in (1, 7, 1000):
        assert torch.equal(model.generate(**options, prefill_chunk_size=size), whole)
    words = processor(text="words only")
    assert torch.equal(
        model.generate(**words, max_new_tokens=4, prefill_chunk_size=3),
        model.generate(**words, max_new_tokens=4),
    )


def test_sampling_is_reproducible_and_several_answers_are_given():
    model, processor = small()
    options = {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 2, "top_k": 20}
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(model.generate(**ragged(processor), **options))
    assert torch.equal(*drawn)
    assert len(drawn[0]) == 2 * len(PROMPTS)


def test_a_saved_model_is_the_same_model(tmp_path: Path):
    model, processor = small(learn_temperature=True, tag_temperature=0.3)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    stored = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert stored | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    read = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is TunaForConditionalGeneration
    batch = ragged(processor)
    for name, tensor in ragged(read).items():
        assert torch.equal(tensor, batch[name]), name
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again.eval()(**batch).logits)
    once_more, _ = presets.load(str(tmp_path), tag_coupling="multiply")
    assert once_more.config.tag_coupling == "multiply"


def test_tied_embeddings_are_saved_once_and_stay_tied(tmp_path: Path):
    model, _ = small(**copy.deepcopy(SMOLLM))
    model.save_pretrained(tmp_path)
    again = TunaForConditionalGeneration.from_pretrained(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_without_tags_there_is_no_tag_path():
    model, processor = small()
    without, _ = small(tags=False)
    weights, tag_path = model.state_dict(), ("tag_encoder", "weight_tuner")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(tag_path)}
    without.load_state_dict(kept, strict=True)
    batch = dict(processor(text=PROMPTS, tags=[tags(0)] * 3)) | features(3)
    assert "tag_index" not in batch
    with torch.no_grad():
        plain = without(**batch).logits
        assert torch.equal(model(**batch).logits, plain)
        empty = {"tag_embeddings": torch.zeros(0, 16), "tag_signals": torch.zeros(0, 2)}
        empty["cu_tags"] = torch.zeros(4, dtype=torch.int32)
        empty["tag_index"] = torch.full_like(batch["input_ids"], -1)
        assert torch.equal(model(**batch, **empty).logits, plain)
    with pytest.raises(ValueError, match="no tag path"):
        without(**ragged(processor))


@pytest.mark.parametrize("queries", ["tag", "token"])
def test_kernels_give_what_the_reference_gives(queries: str):
    # on the CPU through Triton's interpreter, which conftest asks for
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = []
    for kernels in ("reference", "triton"):
        model, processor = small(kernels=kernels, tag_queries=queries)
        batch = {name: tensor.to(device) for name, tensor in ragged(processor).items()}
        out = model.to(device)(**batch, output_tag_attention=True)
        out.logits.square().mean().backward()
        gradient = model.tag_encoder.from_tag.weight.grad
        results.append((out.logits, out.tag_attention, out.tag_weights, gradient))
    for reference, kernel in zip(*results, strict=True):
        torch.testing.assert_close(kernel, reference, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("coupling", ["multiply", "multiply_max", "none"])
def test_weights_scale_the_pair_of_each_tag(coupling: str):
    """The decoder sees w H_vt and w H_t where `tag_index` says, and nothing else is touched."""
    model, processor = small(tag_coupling=coupling)
    batch = dict(processor(text="<image>?", tags=[tags(4)])) | features(1)
    with torch.no_grad():
        out = model(**batch)
        cosines = torch.from_numpy(tags(4).embeddings) @ features(1)["image_vectors"][0]
        weights = torch.softmax(cosines / 0.1, 0)
        order = processor_order(tags(4))
        expected = weights[order] if coupling != "multiply_max" else weights[order] / weights.max()
        torch.testing.assert_close(out.tag_weights, expected)
        embeds = model.get_input_embeddings()(batch["input_ids"])[0].clone()
        ids, index = batch["input_ids"][0], batch["tag_index"][0]
        patches = iter(out.image_hidden_states[0])
        for place, (token, i) in enumerate(zip(ids.tolist(), index.tolist(), strict=True)):
            if i < 0:
                if token == model.config.image_token_id:
                    embeds[place] = next(patches)
                continue
            pair = out.tag_hidden_states[i] if token == model.config.image_token_id else embeds[place]
            embeds[place] = pair * (1 if coupling == "none" else expected[i])
        logits = model.language_model(inputs_embeds=embeds[None]).logits
        torch.testing.assert_close(logits, out.logits, atol=1e-5, rtol=1e-4)


def test_a_gate_begins_as_nothing():
    """With a closed gate the decoder reads the words of the tags, and zeros where H_vt stands."""
    model, processor = small(tag_gate=True, tag_coupling="none")
    batch = dict(processor(text="<image>?", tags=[tags(4)])) | features(1)
    with torch.no_grad():
        closed = model(**batch)
        assert closed.tag_hidden_states.count_nonzero() == 0
        model.tag_encoder.gate.fill_(1.0)
        plain, _ = small(tag_coupling="none")
        torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)
    model.tag_encoder.gate.data.zero_()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert model.tag_encoder.gate.grad.abs() > 0


def processor_order(image_tags) -> list[int]:
    """Indices of the tags in the order in which the processor writes them."""
    return sorted(range(len(image_tags)), key=lambda i: -image_tags.relevance[i])


def test_log_bias_is_as_many_copies_of_the_key():
    """With equal weights 1/n the bias of every tag token is log(1/n): each counts as an n-th of a key."""
    model, processor = small(tag_coupling="log_bias", tag_signal="uniform")
    batch = dict(processor(text="<image>?", tags=[tags(4)])) | features(1)
    with torch.no_grad():
        out = model(**batch)
        bias = torch.where(batch["tag_index"] >= 0, torch.tensor(0.25).log(), 0.0)
        torch.testing.assert_close(out.tag_bias, bias)
        torch.testing.assert_close(out.tag_weights, torch.full((4,), 0.25))
        plain, _ = small(tag_coupling="none")
        assert not torch.allclose(plain(**batch).logits, out.logits, atol=1e-3)


def test_dropped_tags_are_not_seen():
    """The same as hiding their tokens from the attention, at the same positions."""
    model, processor = small(tag_coupling="drop", tag_threshold=0.5)
    batch = dict(processor(text="Q <image>?", tags=[tags(6)])) | features(1)
    masked, _ = small(tag_coupling="multiply_max")
    with torch.no_grad():
        out = model(**batch)
        dropped = out.tag_weights == 0
        assert 0 < int(dropped.sum()) < 6
        index = batch["tag_index"]
        hidden = (index >= 0) & dropped[index.clamp_min(0)]
        mask = batch["attention_mask"].masked_fill(hidden, 0)
        seen = masked(**batch | {"attention_mask": mask}).logits
        torch.testing.assert_close(out.logits[~hidden], seen[~hidden], atol=1e-4, rtol=1e-3)


def test_every_trained_part_gets_a_gradient_with_and_without_tags():
    model, processor = small(learn_temperature=True)
    batch = ragged(processor)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name  # noqa: PT018
    assert model.weight_tuner.log_temperature.grad.abs().sum() > 0
    assert model.tag_encoder.from_tag.weight.grad.abs().sum() > 0
    # processes that wait for each other's gradients must all have them
    model.zero_grad()
    text = dict(processor(text=["a", "b"]))
    model(**text, labels=text["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for on in (False, True):
        model, processor = small()
        if on:
            model.activation_checkpointing_enable()
        batch = ragged(processor)
        model.train()(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, saved in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, saved)


@pytest.mark.parametrize("fields", [{}, {"tag_coupling": "log_bias"}, {"tag_queries": "token"}], ids=str)
def test_tensors_without_values_go_through_the_model(fields: dict):
    """As tools do that plan memory or shards before there are weights."""
    model, processor = small(**fields)
    batch = processor(text=["<image> What?", "Hi <image>"], tags=[tags(3), tags(2, 1)])
    inputs = {**batch, **features(2)}
    expected = model(**inputs).logits.shape
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = model(**{name: mode.from_tensor(tensor) for name, tensor in inputs.items()}).logits
    assert isinstance(fake, FakeTensor)
    assert fake.shape == expected


@pytest.mark.parametrize("coupling", ["multiply_max", "log_bias"])
def test_forward_compiles_whole(coupling: str):
    model, processor = small(tag_coupling=coupling)
    batch = ragged(processor)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-4)


def test_lora_trains_and_generates():
    from peft import LoraConfig, get_peft_model

    model, processor = small()
    batch = ragged(processor)
    before = model.generate(**batch, max_new_tokens=3, do_sample=False)
    modules = r".*language_model.*\.(q_proj|v_proj)"
    saved = ["multi_modal_projector", "tag_encoder"]
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=modules, modules_to_save=saved))
    assert torch.equal(tuned.generate(**batch, max_new_tokens=3, do_sample=False), before)
    tuned.train()(**batch, labels=batch["input_ids"]).loss.backward()
    trained = [name for name, parameter in tuned.named_parameters() if parameter.grad is not None]
    assert any("lora_B" in name for name in trained)
    assert any("tag_encoder" in name for name in trained)
    assert not any("base_layer" in name for name in trained)


def test_qlora_trains_and_generates(tmp_path: Path):
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    # wide enough for the blocks of 64 numbers that share a scale
    wide = LlamaConfig(**BASE | {"hidden_size": 128, "intermediate_size": 256}, num_key_value_heads=4)
    model, processor = small(text_config=wide)
    model.save_pretrained(tmp_path)
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "multi_modal_projector", "tag_encoder", "weight_tuner"],
    )
    small_again = TunaForConditionalGeneration.from_pretrained(tmp_path, quantization_config=quantized)
    assert isinstance(small_again.get_submodule("language_model.model.layers.0.self_attn.q_proj"), Linear4bit)
    assert not any(isinstance(module, Linear4bit) for module in small_again.tag_encoder.modules())
    tuned = get_peft_model(
        prepare_model_for_kbit_training(small_again), LoraConfig(r=2, target_modules=r".*\.(q_proj|v_proj)")
    )
    batch = ragged(processor)
    tuned.train()(**batch, labels=batch["input_ids"]).loss.backward()
    trained = {name for name, parameter in tuned.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)
    generated = tuned.eval().generate(**batch, max_new_tokens=2, do_sample=False)
    assert generated.shape[1] == batch["input_ids"].shape[1] + 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coupling", ["multiply_max", "log_bias"])
def test_half_precision_is_near_single(dtype: torch.dtype, coupling: str):
    model, processor = small(tag_coupling=coupling)
    batch = ragged(processor)
    with torch.no_grad():
        single = model(**batch).logits
        half = model.to(dtype)(**batch).logits
    assert half.dtype == dtype
    error = (half.float() - single)[batch["attention_mask"].bool()].abs().mean() / single.abs().mean()
    assert error < 0.1
    generated = model.generate(**batch, max_new_tokens=2, do_sample=False)
    assert generated.shape[1] == batch["input_ids"].shape[1] + 2


def test_what_does_not_fit_is_said():
    model, processor = small()
    batch = ragged(processor)
    two_images = rows(features(3), slice(0, 2)) | {"cu_tags": torch.tensor([0, 3, 8], dtype=torch.int32)}
    with pytest.raises(Exception, match="image tokens of 2 images"):
        model(**batch | two_images)
    with pytest.raises(ValueError, match="needs image vectors"):
        model(**{name: tensor for name, tensor in batch.items() if name != "image_vectors"})
    with pytest.raises(ValueError, match="tags need"):
        model(**{name: tensor for name, tensor in batch.items() if name not in ("grid", "image_vectors")})
    with pytest.raises(ValueError, match="either input_ids"):
        model()
    with pytest.raises(ValueError, match="tag_word_ids"):
        small(tag_queries="token")[0](**batch)
    bias, _ = small(tag_coupling="log_bias")
    with pytest.raises(ValueError, match="dynamic cache"):
        bias.generate(**batch, max_new_tokens=2, cache_implementation="static")
    bias.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'sdpa' or 'eager'"):
        bias(**batch)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tag_copling": "multiply"}, "did you mean tag_coupling"),
        ({"tag_coupling": "times"}, "multiply, multiply_max"),
        ({"connector": "pooled"}, "between 1 and 7"),
        ({"tag_queries": "token", "tag_encoder_layers": 0}, "at least 1"),
        ({"feature_layer": 3}, "negative"),
        ({"tag_temperature": 0.0}, "positive"),
        ({"tag_threshold": 2.0}, "between 0 and 1"),
        ({"tag_encoder_width": 33}, "divide among"),
        ({"max_tags": 0}, "at least 1"),
    ],
)
def test_a_configuration_that_means_nothing_is_refused(fields: dict, message: str):
    with pytest.raises(InvalidInput, match=message):
        presets.tiny_config(**fields)


def test_what_was_called_votes_is_read_as_vote_share(tmp_path: Path):
    """Until the share was told apart from the wire's count both were called votes."""
    presets.tiny_config(tag_signal="vote_share").save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"vote_share"', '"votes"'))
    assert TunaConfig.from_pretrained(tmp_path).tag_signal == "vote_share"
    six_tags = tags(6)
    assert six_tags.votes is six_tags.vote_share
    layouts = [TagLayout(signal=signal) for signal in ("votes", "vote_share")]  # as in preprocessor files
    assert layouts[0].choose(six_tags).ids == layouts[1].choose(six_tags).ids


def test_configuration_is_json_and_comes_back(tmp_path: Path):
    config = presets.tiny_config(tag_order="none", store="flickr8k", store_version=3)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["store_version"] == 3
    assert TunaConfig.from_pretrained(tmp_path).to_dict() | {"_name_or_path": ""} == config.to_dict() | {
        "_name_or_path": ""
    }


def test_every_field_is_documented():
    page = (Path(__file__).parent.parent / "docs" / "model.md").read_text()
    ours = set(TunaConfig.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
    assert not [name for name in ours if f"`{name}`" not in page]


def test_the_paper_preset_can_be_built_and_says_what_it_guesses():
    config = presets.paper_config()
    with torch.device("meta"):
        model = TunaForConditionalGeneration(config)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert 6.7e9 < counts["language_model"] < 6.8e9
    assert 3.0e8 < counts["vision_tower"] < 3.1e8
    assert counts["multi_modal_projector"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert config.image_tokens == 576
    assert set(presets.GUESSES) <= set(TunaConfig.__dataclass_fields__)
    with pytest.raises(InvalidInput, match="no weights"):
        presets.load("paper")


def test_pooled_and_linear_connectors():
    from tuna_model.modeling.connector import pool_grid

    grid = torch.arange(16.0).view(1, 16, 1)
    assert pool_grid(grid, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert torch.equal(pool_grid(grid, 4), grid)
    model, processor = small(connector="pooled", pool_side=2)
    assert processor.image_tokens == 4
    assert model(**ragged(processor)).image_hidden_states.shape == (3, 4, 32)
    linear, processor = small(connector="linear")
    parameters = {name for name, _ in linear.multi_modal_projector.named_parameters()}
    assert parameters == {"linear_1.weight", "linear_1.bias"}
    assert linear(**ragged(processor)).image_hidden_states.shape == (3, 16, 32)


def test_parameter_free_tags_look_where_they_are_seen():
    """A tag whose embedding is a patch's own projection looks at that patch, and brings its feature."""
    model, processor = small(tag_encoder_layers=0)
    grid = features(1)["grid"]
    projected = torch.nn.functional.normalize(grid[0] @ model.tag_encoder.projection, dim=-1)
    two_tags = tags(2)
    two_tags.embeddings[:] = projected[[3, 11]].numpy()
    order = processor_order(two_tags)
    batch = dict(processor(text="<image>", tags=[two_tags])) | features(1)
    with torch.no_grad():
        out = model(**batch, output_tag_attention=True)
    assert out.tag_attention.argmax(-1).tolist() == [[3, 11][i] for i in order]
    assert out.tag_attention.shape == (2, 16)
    torch.testing.assert_close(out.tag_attention.sum(-1), torch.ones(2))
    assert model.tag_encoder.projection.shape == (C, 16)
