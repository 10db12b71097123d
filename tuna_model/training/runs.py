"""From a recipe or a checkpoint to a model."""

from __future__ import annotations

from pathlib import Path

from tagstore.errors import InvalidInput
from tuna_model import presets
from tuna_model.modeling.lora import add_lora, merge_lora
from tuna_model.modeling.model import TunaForConditionalGeneration
from tuna_model.presets.trained import save_trained
from tuna_model.processing.processor import TunaProcessor
from tuna_model.training import checkpoint as checkpoints
from tuna_model.training.recipe import Recipe


def build_model(recipe: Recipe) -> tuple[TunaForConditionalGeneration, TunaProcessor]:
    """Model and processor as a run begins with them: with LoRA where the recipe has it, nothing frozen yet, nothing trained."""
    # what ships as the trained part of `smol` came from a run: the next one must not begin where it ended
    model, processor = presets.load(recipe.model, trained=False, **dict(recipe.model_config))
    if recipe.lora.rank:
        lora = recipe.lora
        add_lora(model, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, targets=lora.targets)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, processor


def load_run(
    folder: str | Path, *, averaged: bool = True
) -> tuple[TunaForConditionalGeneration, TunaProcessor]:
    """The model of a checkpoint, in evaluation mode, LoRA merged into the decoder.

    Args:
        folder: RUN/step-000100, or RUN for its newest.
        averaged: take the moving average where there is one.

    Raises:
        NotFound, Damaged: there is no such checkpoint, or it is not what was written.
    """
    folder = Path(folder)
    folder = folder if (folder / "tuna.json").exists() else checkpoints.latest(folder) or folder
    state = checkpoints.read(folder)
    model, processor = build_model(state.recipe)
    if state.encoder != model.config.encoder_digest:
        raise InvalidInput(
            f"{folder} was trained on encoder {state.encoder}, and {model.config.encoder_digest} was loaded: its features differ"
        )
    which = "ema" if averaged and state.recipe.ema else "trained"
    checkpoints.put_trained(model, checkpoints.tensors(folder, which))
    if state.recipe.lora.rank:
        merge_lora(model)
    model.config.store, model.config.store_version = state.store.store, state.store.version
    return model.eval(), processor


def export(folder: str | Path, to: str | Path, *, pin: bool = True) -> Path:
    """Write what a checkpoint learnt so that others can use it.

    Args:
        to: ending in .safetensors, connector and tag path alone (for a base that everybody has); else a directory for the whole model.
        pin: keep which store and version it learnt with, so that others are refused unless told. False for a model that is meant for any
            store of its encoder.

    Raises:
        InvalidInput: the decoder learnt too, so the small file would not hold what was learnt.
    """
    model, processor = load_run(folder)
    if not pin:
        model.config.store, model.config.store_version = "", 0
    folder, target = Path(folder), Path(to)
    recipe = checkpoints.read(
        folder if (folder / "tuna.json").exists() else checkpoints.latest(folder) or folder
    ).recipe
    if target.suffix == ".safetensors":
        if recipe.lora.rank or recipe.rates.get("language_model", 0) > 0:
            raise InvalidInput(
                f"the decoder learnt too: give a directory instead of {target.name}, for the whole model"
            )
        save_trained(model, target)
    else:
        model.save_pretrained(target)
        processor.save_pretrained(target)
    return target
