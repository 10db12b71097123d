"""From a recipe or a checkpoint to a model, and from a checkpoint to files that others can load."""

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
    """Model and processor at the start of a run: with the recipe's LoRA, nothing frozen yet, nothing trained.

    The trained part of `smol` is left out: it came from a run, and the next one must not begin where that
    ended.
    """
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
    """Load the model of a checkpoint, in evaluation mode, with LoRA merged into the decoder.

    Args:
        folder: RUN/step-000100, or RUN for its newest.
        averaged: take the moving average where there is one.

    Raises:
        NotFound, Damaged: there is no such checkpoint, or a file of it was changed.
    """
    folder = checkpoints.find(Path(folder))
    state = checkpoints.read(folder)
    model, processor = build_model(state.recipe)
    if state.encoder != model.config.encoder_digest:
        raise InvalidInput(
            f"{folder} was trained on encoder {state.encoder}, and {model.config.encoder_digest} was loaded: "
            "its features differ"
        )
    which = "ema" if averaged and state.recipe.ema else "trained"
    checkpoints.put_trained(model, checkpoints.tensors(folder, which))
    if state.recipe.lora.rank:
        merge_lora(model)
    if state.store.version:  # a model of several stores is for any
        model.config.store, model.config.store_version = state.store.store, state.store.version
    return model.eval(), processor


def export(folder: str | Path, to: str | Path, *, pin: bool = True) -> Path:
    """Write the model of a checkpoint for others to load.

    Args:
        to: a directory for the whole model; or a name ending in .safetensors for what was learnt alone
            (connector, tag path, LoRA), where everybody has the rest.
        pin: keep the store and version of the run, so that others are refused unless told. False for a model
            that is meant for any store of its encoder.

    Raises:
        InvalidInput: all of the decoder was trained, so the small file would not hold all of the training.
    """
    model, processor = load_run(folder)
    if not pin:
        model.config.store, model.config.store_version = "", 0
    folder = checkpoints.find(Path(folder))
    target, recipe = Path(to), checkpoints.read(folder).recipe
    if target.suffix == ".safetensors":
        if recipe.rates.get("language_model", 0) > 0 and not recipe.lora.rank:
            raise InvalidInput(
                f"all of the decoder was trained: give a directory instead of {target.name}, for the whole "
                "model"
            )
        updates = {
            name.removesuffix(".default.weight"): tensor
            for name, tensor in checkpoints.tensors(folder, "ema" if recipe.ema else "trained").items()
            if ".lora_" in name
        }
        scale = recipe.lora.alpha / recipe.lora.rank if updates else 1.0
        save_trained(model, target, updates=updates, scale=scale)
    else:
        model.save_pretrained(target)
        processor.save_pretrained(target)
    return target
