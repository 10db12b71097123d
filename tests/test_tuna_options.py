"""Every option of the configuration runs, forward and in generation, and makes a difference."""

from __future__ import annotations

import pytest
import torch

from tuna import features, small, tags

PROMPTS = ["Look: <image> what is it?", "<image> and <image>?"]
OPTIONS = [
    {},
    {"connector": "linear"},
    {"connector": "pooled", "pool_side": 2},
    {"connector_bias": False},
    {"connector_act": "relu"},
    {"tag_encoder_layers": 0},
    {"tag_encoder_layers": 2},
    {"tag_queries": "token"},
    {"tag_signal": "similarity"},
    {"tag_signal": "votes"},
    {"tag_signal": "uniform"},
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
def test_option(fields: dict, default: torch.Tensor) -> None:
    logits, _ = run(fields)
    assert torch.isfinite(logits).all()
    same = torch.allclose(logits, default, atol=1e-5)
    # nothing to drop: no tag of RAGGED holds another's words
    assert same == (fields in ({}, {"tag_merge": "contained"}))
