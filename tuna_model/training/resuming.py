"""Whether a run may begin or resume: recipe and data as before, sequences that the decoder can read."""

from __future__ import annotations

from pathlib import Path

from tagstore.errors import InvalidInput
from tuna_model.modeling.model import TunaForConditionalGeneration
from tuna_model.training.journal import flat
from tuna_model.training.recipe import Recipe


def check_same_run(saved: Recipe, now: Recipe, where: Path) -> None:
    """Refuse to resume with another recipe; only fields that do not change the result may differ.

    A run may be prolonged, by more `steps`: those that were done keep the rates of the shorter run, and the
    others get those of the longer one.

    Raises `InvalidInput` with the fields that differ.
    """
    free = {"out", "log_every", "save_every", "keep", "ahead", "tensorboard"}
    free |= {"data.path", "data.images", "data.allow_outside", "data.features"}
    free |= {"tags.store", "tags.any_store", "tags.captions"}
    free |= {"steps"} if now.steps >= saved.steps else set()
    old, new = flat(saved.to_dict()), flat(now.to_dict())
    changed = sorted(key for key in (old.keys() | new.keys()) - free if old.get(key) != new.get(key))
    if changed:
        changes = ", ".join(f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in changed[:4])
        raise InvalidInput(
            f"{where} is of a run with another recipe ({changes}): "
            "give another --out, or begin anew with --no-resume"
        )


def check_same_data(saved: str, now: str, where: Path) -> None:
    """Refuse to resume on other samples: which ones were learnt from is known by their numbers alone.

    Raises `InvalidInput`.
    """
    if saved and saved != now:
        raise InvalidInput(
            f"{where} was trained on other data than data.path holds now (digest {saved[:12]}, "
            f"now {now[:12]}): samples were added, removed or changed. Give the data that it began with, "
            "another --out, or begin anew with --no-resume"
        )


def check_context(recipe: Recipe, model: TunaForConditionalGeneration) -> None:
    """Refuse sequences that the decoder cannot read, before anything is computed. Raises `InvalidInput`."""
    context = getattr(model.config.text_config, "max_position_embeddings", 0) or 0
    if context and recipe.data.max_length > context:
        raise InvalidInput(
            f"data.max_length is {recipe.data.max_length}, and the context of model '{recipe.model}' holds "
            f"{context} tokens: lower data.max_length"
        )
