"""A LLaVA of transformers is read unchanged and, without tags, computes the same to the last bit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
)

from clip import write_clip
from tagstore.encoding.encoder import load_encoder
from tagstore.errors import Damaged, FingerprintMismatch, InvalidInput
from tuna_model import ImageTags, TunaForConditionalGeneration, presets

WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 260, **WIDTH}
DECODERS = {
    "llama": LlamaConfig(**TEXT, num_key_value_heads=2),
    "qwen2": Qwen2Config(**TEXT, num_key_value_heads=2),
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return f"hf:{write_clip(tmp_path_factory.mktemp('clip'))}"


def write_llava(directory: Path, decoder: str, clip: str) -> LlavaForConditionalGeneration:
    """A random Llava on the tower of a CLIP, in a directory as the hub has it."""
    tower = CLIPModel.from_pretrained(clip.removeprefix("hf:")).vision_model
    config = LlavaConfig(
        vision_config=CLIPVisionConfig.from_dict(tower.config.to_dict()),
        text_config=DECODERS[decoder],
        image_token_index=259,
    )
    torch.manual_seed(0)
    llava = LlavaForConditionalGeneration(config).eval()
    llava.model.vision_tower.load_state_dict(tower.state_dict())
    llava.save_pretrained(directory)
    presets.tiny_tokenizer().save_pretrained(directory)
    stored = json.loads((Path(clip.removeprefix("hf:")) / "preprocessor_config.json").read_text())
    (directory / "preprocessor_config.json").write_text(json.dumps(stored))
    return llava


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 256, (2, 20), generator=generator)
    ids[0, 3:7] = ids[1, 10:14] = 259
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(2, 3, 28, 28, generator=generator),
    }


@pytest.mark.parametrize("decoder", DECODERS)
def test_logits_are_equal_to_the_last_bit(decoder: str, clip: str, tmp_path: Path):
    llava = write_llava(tmp_path, decoder, clip)
    model = TunaForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs()).logits, llava(**inputs()).logits)
        # the same features, made before
        grid, vectors = model.encode_images(inputs()["pixel_values"])
        assert vectors is None
        prompts = {name: tensor for name, tensor in inputs().items() if name != "pixel_values"}
        assert torch.equal(model(**prompts, grid=grid).logits, llava(**inputs()).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "pad_token_id": 258}
    assert torch.equal(model.generate(**inputs(), **options), llava.generate(**inputs(), **options))


@pytest.mark.parametrize("layout", ["hub", "memory", "first"])
def test_names_of_weights_of_every_age(layout: str, clip: str, tmp_path: Path):
    """Weights may be named as on the hub, as in memory, or as in LLaVA-1.5's first files."""
    from safetensors.torch import load_file, save_file

    llava = write_llava(tmp_path, "llama", clip)
    file = tmp_path / "model.safetensors"
    if layout == "memory":
        weights = {name: tensor.contiguous() for name, tensor in llava.state_dict().items()}
        save_file(weights, file, metadata={"format": "pt"})
    if layout == "first":
        names = {
            name: name.replace("vision_tower.", "vision_tower.vision_model.") for name in load_file(file)
        }
        weights = {names[name]: tensor for name, tensor in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    model, notes = TunaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert all(
        name.startswith("tag_encoder") or name == "vision_projection" for name in notes["missing_keys"]
    )
    assert not notes["unexpected_keys"]
    model.eval().save_pretrained(tmp_path / "again")
    names = set(load_file(tmp_path / "again" / "model.safetensors"))
    weights = {"language_model.lm_head.weight", "vision_tower.post_layernorm.weight"}
    assert {*weights, "vision_projection"} <= names
    again = TunaForConditionalGeneration.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs()).logits, llava(**inputs()).logits)


def test_joined_to_its_encoder_one_forward_gives_grid_and_the_stores_vectors(clip: str, tmp_path: Path):
    write_llava(tmp_path, "llama", clip)
    model, processor = presets.load_llava(str(tmp_path), encoder=clip)
    model.eval()
    assert model.config.tag_coupling == "multiply"
    encoder = load_encoder(clip, device="cpu")
    assert model.config.encoder_digest == encoder.fingerprint.digest
    pictures = [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8))
        for i in range(2)
    ]
    grid, vectors = model.encode_images(processor.image_processor(pictures)["pixel_values"])
    np.testing.assert_allclose(vectors.numpy(), encoder.encode_images(pictures), atol=1e-5)
    np.testing.assert_allclose(grid.numpy(), encoder.encode_grid(pictures, layer=-2)[0], atol=1e-5)
    # tags run on it, and it comes back joined
    embeddings = encoder.encode_texts(["red circle", "dog"])
    ones = np.ones(2, np.float32)
    tags = ImageTags(("red circle", "dog"), embeddings, ones, ones, embeddings @ vectors[0].numpy(), (1, 2))
    batch = processor(text="<image> what?", images=pictures[:1], tags=[tags])
    with torch.no_grad():
        logits = model(**batch).logits
        model.save_pretrained(tmp_path / "joined")
        again = TunaForConditionalGeneration.from_pretrained(tmp_path / "joined").eval()
        assert torch.equal(again(**batch).logits, logits)


def test_another_tower_is_not_taken_for_its_encoders(clip: str, tmp_path: Path):
    write_llava(tmp_path / "llava", "llama", clip)
    other = f"hf:{write_clip(tmp_path / 'other', seed=1)}"
    with pytest.raises(FingerprintMismatch, match="is not that of encoder"):
        presets.load_llava(str(tmp_path / "llava"), encoder=other)
    model = TunaForConditionalGeneration.from_pretrained(tmp_path / "llava")
    with pytest.raises(InvalidInput, match="names no encoder"):
        _ = model.encoder


def test_llavas_that_cannot_be_read_are_refused(clip: str, tmp_path: Path):
    write_llava(tmp_path, "llama", clip)
    config = json.loads((tmp_path / "config.json").read_text())
    for field, value in (("vision_feature_select_strategy", "full"), ("vision_feature_layer", [-2, -1])):
        (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
        with pytest.raises(InvalidInput, match="one layer with 'default'"):
            TunaForConditionalGeneration.from_pretrained(tmp_path)
    shutil.rmtree(tmp_path)


def rewrite(directory: Path, rename) -> None:
    """Give the weights of a directory other names; those for which `rename` gives "" are left out."""
    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    weights = {rename(name): tensor for name, tensor in load_file(file).items()}
    weights.pop("", None)
    save_file(weights, file, metadata={"format": "pt"})


def originally(name: str) -> str:
    """The name of a hub's weight in LLaVA's original layout, which has no tower."""
    for ours, theirs in (
        ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("vision_tower.", ""),
        ("language_model.", ""),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours) if theirs or "language" in ours else ""
    return name


def test_weights_in_llavas_original_layout_are_refused_by_name(clip: str, tmp_path: Path):
    write_llava(tmp_path, "llama", clip)
    rewrite(tmp_path, originally)
    for load in (TunaForConditionalGeneration.from_pretrained, presets.load, presets.load_llava):
        with pytest.raises(InvalidInput, match=r"original layout .* llava-hf/llava-1\.5-7b-hf"):
            load(str(tmp_path))


@pytest.mark.parametrize("kind", ["llava", "llava_llama"])
def test_a_configuration_of_llavas_original_layout_is_refused_before_its_weights_are_read(
    kind: str, tmp_path: Path
):
    config = {
        "model_type": kind, "mm_vision_tower": "openai/clip-vit-large-patch14-336", "hidden_size": 4096,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (TunaForConditionalGeneration.from_pretrained, presets.load, presets.load_llava):
        with pytest.raises(InvalidInput, match="original layout"):
            load(str(tmp_path))


@pytest.mark.parametrize(
    "missing",
    [
        "multi_modal_projector.linear_2.bias",
        "language_model.model.layers.1.mlp.up_proj.weight",
        "language_model.lm_head.weight",
        "vision_tower.embeddings.patch_embedding.weight",
    ],
)
def test_only_the_tag_path_may_be_missing(missing: str, clip: str, tmp_path: Path):
    llava = tmp_path / "llava"
    write_llava(llava, "llama", clip)
    model, _ = presets.load_llava(str(llava))  # without a tag path
    model.save_pretrained(tmp_path / "tuna")
    for folder in (llava, tmp_path / "tuna"):
        before = (folder / "model.safetensors").stat().st_size
        rewrite(folder, lambda name: "" if name == missing else name)
        assert (folder / "model.safetensors").stat().st_size < before
        with pytest.raises(Damaged, match=rf"lacks {re.escape(missing)}, which would be random"):
            TunaForConditionalGeneration.from_pretrained(folder)
    with pytest.raises(Damaged, match="only the tag path"):
        presets.load(str(llava))


def test_a_tag_encoder_is_there_as_a_whole_or_not_at_all(clip: str, tmp_path: Path):
    write_llava(tmp_path / "llava", "llama", clip)
    model, _ = presets.load_llava(str(tmp_path / "llava"))
    model.save_pretrained(tmp_path / "tuna")
    names = [name for name in model.state_dict() if name.startswith("tag_encoder.")]
    assert len(names) > 3
    rewrite(tmp_path / "tuna", lambda name: "" if name == names[0] else name)
    with pytest.raises(Damaged, match=rf"lacks {re.escape(names[0])}.*the tag encoder as a whole"):
        TunaForConditionalGeneration.from_pretrained(tmp_path / "tuna")
    rewrite(tmp_path / "tuna", lambda name: "" if name in names else name)
    TunaForConditionalGeneration.from_pretrained(tmp_path / "tuna")


def test_many_missing_weights_are_counted(clip: str, tmp_path: Path):
    write_llava(tmp_path, "llama", clip)
    rewrite(tmp_path, lambda name: "" if name.startswith("vision_tower.") else name)
    with pytest.raises(Damaged, match=r"lacks (vision_tower\.\S+, ){2}vision_tower\.\S+ and \d\d more"):
        TunaForConditionalGeneration.from_pretrained(tmp_path)


def test_a_tied_head_is_not_missing(clip: str, tmp_path: Path):
    model = TunaForConditionalGeneration(
        presets.tiny_config(text_config=LlamaConfig(**TEXT, num_key_value_heads=2, tie_word_embeddings=True))
    )
    model.save_pretrained(tmp_path)
    again, notes = TunaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not notes["missing_keys"]
    assert torch.equal(again.get_output_embeddings().weight, model.get_input_embeddings().weight)


def test_a_layer_counted_from_the_front_is_the_same_layer(clip: str, tmp_path: Path):
    llava = write_llava(tmp_path, "llama", clip)
    config = json.loads((tmp_path / "config.json").read_text())
    layers = llava.config.vision_config.num_hidden_layers
    (tmp_path / "config.json").write_text(json.dumps(config | {"vision_feature_layer": layers - 1}))
    assert TunaForConditionalGeneration.from_pretrained(tmp_path).config.feature_layer == -2
