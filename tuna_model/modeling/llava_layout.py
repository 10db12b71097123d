"""Layouts of LLaVA checkpoints: transformers' one is read, LLaVA's original one is refused by name.

    transformers' (llava-hf)   vision_tower.*, multi_modal_projector.*, language_model.*
    original (liuhaotian)      model.mm_projector.*, model.layers.*, no tower; mm_vision_tower in config.json

A weight that a file lacks would be random. A checkpoint may lack the tag path, which is trained later, and
nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tagstore.errors import Damaged, InvalidInput

KEY_MAPPING = {
    r"^model\.language_model\.": "language_model.model.",
    r"^lm_head\.": "language_model.lm_head.",
    r"^model\.vision_tower\.": "vision_tower.",
    r"^model\.multi_modal_projector\.": "multi_modal_projector.",
}
"""Weight names of a Llava in memory, which some files use too, to those of the hub's files."""
_ORIGINAL_FIELDS = ("mm_vision_tower", "mm_projector_type")
"""Fields of a configuration in the original layout, which has no text_config."""
_TAG_PATH = ("tag_encoder.", "weight_tuner.", "vision_projection")
_TAG_ENCODER = "tag_encoder."
_BEGINS_AS_NOTHING = ".gate"
"""A weight that a model may get later: at its first value it changes nothing."""
_SHOWN = 3
"""Missing weights that a message names."""


def check_config(fields: Mapping[str, Any], name: object) -> None:
    """Refuse a configuration of LLaVA's original layout with `InvalidInput`.

    Args:
        name: of the checkpoint, for the message.
    """
    if "text_config" not in fields and any(field in fields for field in _ORIGINAL_FIELDS):
        raise _original(name)


def check_weights(
    missing: Iterable[str], unexpected: Iterable[str], name: object, known: Iterable[str] = ()
) -> None:
    """Refuse a checkpoint that lacks weights of decoder, connector or tower, or a part of its tag encoder.

    Args:
        missing, unexpected: names of weights that the files lack, and that the model does not have.
        name: of the checkpoint, for the message.
        known: names of all weights of the model.

    Raises:
        InvalidInput: it has LLaVA's original layout.
        Damaged: any other.
    """
    missing = set(missing)
    lacking = sorted(key for key in missing if not key.startswith(_TAG_PATH))
    encoder = {key for key in known if key.startswith(_TAG_ENCODER) and not key.endswith(_BEGINS_AS_NOTHING)}
    if not encoder <= missing:
        lacking += sorted(encoder & missing)
    if not lacking:
        return
    if any("mm_projector" in key for key in unexpected):
        raise _original(name)
    more = f" and {len(lacking) - _SHOWN} more" if len(lacking) > _SHOWN else ""
    raise Damaged(
        f"{name} lacks {', '.join(lacking[:_SHOWN])}{more}, which would be random: only the tag path "
        "(tag_encoder, weight_tuner, vision_projection) may be missing, and the tag encoder as a whole. "
        "Copy or download the checkpoint "
        "again, and check that its config.json is of the same model"
    )


def _original(name: object) -> InvalidInput:
    return InvalidInput(
        f"{name} has LLaVA's original layout (model.mm_projector.*, no image tower), which is not read: take "
        "the converted repository of llava-hf on the hub, such as llava-hf/llava-1.5-7b-hf or "
        "llava-hf/llava-1.5-13b-hf"
    )
