"""Every option of the configuration runs, forward and in generation, and makes a difference."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

from pictures import picture
from tagstore.client import connect
from tagstore.errors import InvalidInput
from tagstore.upkeep.reprocessing import ground
from tuna import features, small, tags
from tuna_model import Pipeline, TunaConfig, presets
from tuna_model.processing.tags import TagLayout, weigh_for_stores

PROMPTS = ["Look: <image> what is it?", "<image> and <image>?"]
OPTIONS = [
    {},
    {"connector": "linear"},
    {"connector": "pooled", "pool_side": 2},
    {"connector_bias": False},
    {"connector_act": "relu"},
    {"tag_encoder_layers": 0},
    {"tag_encoder_layers": 2},
    {"tag_encoder_width": 16},
    {"tag_encoder_heads": 4},
    {"tag_queries": "token"},
    {"tag_signal": "similarity"},
    {"tag_signal": "vote_share"},
    {"tag_signal": "uniform"},
    {"tag_signal": "mixed"},
    {"tag_signal": "mixed", "tag_mix": (0.0, 0.0, 5.0)},
    {"tag_gate": True},
    {"tag_temperature": 0.02},
    {"tag_coupling": "multiply"},
    {"tag_coupling": "log_bias"},
    {"tag_coupling": "drop"},
    {"tag_coupling": "none"},
    {"tag_place": "after"},
    {"tag_prefix": "Tags:", "tag_separator": " | ", "tag_suffix": "."},
    {"tag_separator": "", "tag_suffix": ""},
    {"tag_order": "retrieval"},
    {"tag_order": "none"},
    {"tag_merge": "none"},
    {"tag_merge": "contained"},
    {"max_tags": 2},
]
ELSEWHERE = {
    "text_config": "test_any_decoder_of_transformers",
    "encoder": "test_a_configuration_names_its_encoder",
    "encoder_digest": "test_an_encoder_of_another_fingerprint_is_refused",
    "vision_config": "test_logits_are_equal_to_the_last_bit",
    "feature_layer": "test_a_layer_counted_from_the_front_is_the_same_layer",
    "grid_side": "test_the_paper_preset_can_be_built_and_says_what_it_guesses",
    "grid_channels": "test_parameter_free_tags_look_where_they_are_seen",
    "tag_dimension": "test_parameter_free_tags_look_where_they_are_seen",
    "image_token_id": "test_weights_scale_the_pair_of_each_tag",
    "tags": "test_without_tags_there_is_no_tag_path",
    "tag_mix_grounded": "test_a_grounded_store_has_a_mix_of_its_own",
    "learn_temperature": "test_every_trained_part_gets_a_gradient_with_and_without_tags",
    "tag_threshold": "test_a_threshold_decides_what_is_dropped",
    "neighbours": "test_a_configuration_says_how_the_store_is_asked",
    "store": "test_a_configuration_says_how_the_store_is_asked",
    "store_version": "test_a_configuration_says_how_the_store_is_asked",
    "kernels": "test_kernels_give_what_the_reference_gives",
    "tie_word_embeddings": "test_tied_embeddings_are_saved_once_and_stay_tied",
}
"""Fields that OPTIONS cannot show, with the tests that show what they do."""
RAGGED = [tags(6), None, tags(3, 1).extend(tags(2, 1))]


def run(fields: dict) -> tuple[torch.Tensor, torch.Tensor]:
    model, processor = small(**fields)
    batch = dict(processor(text=PROMPTS, tags=RAGGED)) | features(3)
    with torch.no_grad():
        logits = model(**batch).logits
    new = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert new.shape[1] == batch["input_ids"].shape[1] + 3
    return logits[:, -1], new


@pytest.fixture(scope="module")
def default() -> torch.Tensor:
    return run({})[0]


@pytest.mark.parametrize(
    "fields", OPTIONS, ids=lambda fields: ",".join(f"{k}={v}" for k, v in fields.items()) or "defaults"
)
def test_option(fields: dict, default: torch.Tensor):
    logits, _ = run(fields)
    assert torch.isfinite(logits).all()
    same = torch.allclose(logits, default, atol=1e-5)
    # nothing to drop: no tag of RAGGED holds another's words
    assert same == (fields in ({}, {"tag_merge": "contained"}))


def test_a_threshold_decides_what_is_dropped():
    low, high = (run({"tag_coupling": "drop", "tag_threshold": share})[0] for share in (0.1, 0.9))
    assert not torch.allclose(low, high, atol=1e-5)


def test_every_field_is_tried():
    ours = set(TunaConfig.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
    assert {name for fields in OPTIONS for name in fields} | ELSEWHERE.keys() == ours | {
        "tie_word_embeddings"
    }
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_tuna*.py"))
    assert all(f"def {test}(" in tests for test in ELSEWHERE.values())


def test_a_grounded_store_has_a_mix_of_its_own(shapes_root: Path, tmp_path: Path):
    shutil.copytree(shapes_root / "shapes", tmp_path / "shapes")
    ground(tmp_path, "shapes")
    model, processor = presets.load("tiny", tag_signal="mixed", tag_mix=(5.0, 9.0, 6.6))
    for root, mix in ((tmp_path, (240.0, 54.0, 0.0)), (shapes_root, (5.0, 9.0, 6.6))):
        tuna = Pipeline(model, processor, connect(f"file://{root}/shapes"), any_store=True)
        assert tuple(processor.layout["mix"]) == mix  # asked of one store after the other
        weights = [tag.weight for tag in tuna.answer(picture("red", "circle"), "What is this?").tags]
        chosen = TagLayout(**processor.layout)
        pixels = processor.image_processor([picture("red", "circle")])["pixel_values"]
        tags = chosen.choose(tuna.lookup(model.encode_images(pixels)[1], model.config.encoder_digest)[0])
        scores = torch.tensor(tags.score("mixed", mix)) / model.config.tag_temperature
        expected = torch.exp(scores - scores.max())
        assert torch.allclose(torch.tensor(weights), expected, atol=1e-3)
    assert tuple(model.config.tag_mix) == (5.0, 9.0, 6.6)  # a checkpoint keeps both


def test_grounded_stores_and_others_are_not_mixed_in_a_run(shapes_root: Path, tmp_path: Path):
    shutil.copytree(shapes_root / "shapes", tmp_path / "shapes")
    ground(tmp_path, "shapes")
    model, processor = presets.load("tiny", tag_signal="mixed")
    infos = [connect(f"file://{root}/shapes").info() for root in (tmp_path, shapes_root)]
    with pytest.raises(InvalidInput, match="some are not"):
        weigh_for_stores(model, processor, infos)
    model.config.tag_signal = "relevance"  # one signal has no factors
    weigh_for_stores(model, processor, infos)
