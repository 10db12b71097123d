"""lmms-eval finds the model here, by the entry point `lmms_eval.models` of this package:

lmms-eval --model tuna --model_args pretrained=DIR,store=grpc://HOST:PORT/NAME --tasks pope
"""

from __future__ import annotations

from typing import Any


def model_manifest() -> Any:
    """Return the `ModelManifest` with which lmms-eval registers the model `tuna`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="tuna", simple_class_path="tuna_model.evaluation.lmms.tuna.Tuna")
