"""The training loop: one function that reads from top to bottom, for one process or many (DDP, FSDP2) through
Accelerate.

    tuna train --config smol-caption
    accelerate launch --config_file fsdp2.yaml -m tuna_model.cli train --config paper-finetune

1. model, data, tags and optimizer from the recipe    2. the newest checkpoint, if any    3. the steps
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn

from tagstore.client import TagSource, connect
from tagstore.errors import FingerprintMismatch, InvalidInput, Unavailable
from tagstore.readers.samples import Sample, read_samples
from tuna_model.modeling.model import TunaForConditionalGeneration
from tuna_model.processing.data import digest as data_digest
from tuna_model.processing.processor import TunaProcessor
from tuna_model.processing.tags import TagLookup, weigh_for_stores
from tuna_model.training import checkpoint as checkpoints
from tuna_model.training.checkpoint import Checkpoint, StorePin
from tuna_model.training.collator import Collator, to_device
from tuna_model.training.features import CachedFeatures, ImageFeatures, LiveFeatures, make_cache
from tuna_model.training.journal import Journal, LogLine, peak_memory
from tuna_model.training.loader import Loader, Step, seed_everything
from tuna_model.training.recipe import Recipe
from tuna_model.training.resuming import check_context, check_same_data, check_same_run
from tuna_model.training.runs import build_model
from tuna_model.training.schedule import learning_rate, parameter_groups, set_rate
from tuna_model.training.tag_feed import TagFeed

log = logging.getLogger(__name__)

STORE = "{store}"
"""In `tags.store`, where each sample names its own store."""


NOT_TAKEN = 3
"""Steps in a row that are not taken, after which a run ends."""


class Diverged(InvalidInput):
    """Loss or gradient of a run is not finite any more."""


def train(
    recipe: Recipe,
    *,
    resume: bool = True,
    progress: Callable[[LogLine], object] = lambda _: None,
    preparing: Callable[[str, int, int], object] = lambda *_: None,
) -> Path:
    """Train as the recipe says. A run that was cut off resumes from its newest checkpoint and gives the same
    result.

    Args:
        resume: False to begin anew in a directory that has checkpoints.
        progress: called in the main process after every `log_every` steps.
        preparing: called as (activity, done, total) while images are embedded.

    Returns:
        The last checkpoint's directory.

    Raises:
        InvalidInput: the recipe or a sample is invalid.
        FingerprintMismatch: the run's checkpoint is of another store or version, and `tags.any_store` is not
            set.
        NotFound, Unavailable, Damaged: a file, the store or a checkpoint; see their messages.
        Diverged: loss or gradient of several steps in a row, or of the last one, is not finite. A step of
            that kind is not taken, and the checkpoints are from before.
    """
    accelerator = make_accelerator(recipe)
    if recipe.precision == "bf16" and accelerator.device.type == "cpu" and not _multiplies_bf16():
        log.warning(
            "this processor has no bf16 products: with precision=bf16 a step takes many times as long as "
            "with precision=no"
        )
    out = Path(recipe.out)

    # 1. model, data, tags and optimizer
    torch.manual_seed(recipe.seed)
    model, processor = build_model(recipe)
    samples = read_samples(
        recipe.data.path,
        images=recipe.data.images or None,
        split=recipe.data.split,
        limit=recipe.data.limit,
        allow_outside=recipe.data.allow_outside,
    )
    if recipe.data.first_caption:
        samples = [replace(sample, captions=sample.captions[:1]) for sample in samples]
    samples_digest = data_digest(samples)
    check_context(recipe, model)
    with contextlib.ExitStack() as stack:
        names = store_names(recipe, samples)
        sources = {
            name: stack.enter_context(closing(connect(recipe.tags.store.replace(STORE, name))))
            for name in (sorted(set(names) - {""}) if names else [""])
        }
        pin = pin_of(recipe, sources)
        if pin.version:  # a model of several stores is for any
            model.config.store, model.config.store_version = pin.store, pin.version
        if not recipe.tags.store.startswith("null:"):
            weigh_for_stores(model, processor, [source.info() for source in sources.values()])
        features = image_features(recipe, model, processor, samples, accelerator, preparing)
        feed = tag_feed(recipe, model, sources, names, samples, pin)
        collator = Collator(processor, template=recipe.data.template, max_length=recipe.data.max_length)
        rank, world = accelerator.process_index, accelerator.num_processes
        loader = Loader(recipe, samples, features, feed, collator, rank=rank, world=world)
        groups = parameter_groups(parts_of(model), recipe.rates, recipe.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=recipe.betas)
        set_rate(optimizer, 1.0)
        wrapped, prepared = accelerator.prepare(model, optimizer)
        average: dict[str, torch.Tensor] | None = None
        if recipe.ema:
            average = {name: p.detach().clone() for name, p in checkpoints.trained_parameters(wrapped)}

        # 2. the newest checkpoint
        first, folder = 0, checkpoints.latest(out) if resume else None
        if folder is not None:
            saved = checkpoints.read(folder)
            checkpoints.check_store(saved.store, pin, allow=recipe.tags.any_store, where=folder)
            check_same_run(saved.recipe, recipe, folder)
            check_same_data(saved.data, samples_digest, folder)
            checkpoints.put_trained(wrapped, checkpoints.tensors(folder, "trained"))
            checkpoints.put_optimizer(wrapped, prepared.optimizer, checkpoints.tensors(folder, "optimizer"))
            if average is not None:
                checkpoints.put_average(average, checkpoints.tensors(folder, "ema"))
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(dict(saved.scaler))
            first = saved.step
            log.info("resuming from %s", folder)
        journal = Journal(out, first, recipe) if accelerator.is_main_process else None

        # 3. the steps
        skipped = in_a_row = 0
        wrapped.train()
        clock = time.perf_counter()
        with closing(loader.from_step(first)) as steps, journal or contextlib.nullcontext():
            for step in steps:
                waited = time.perf_counter() - clock
                seed_everything(recipe.seed, step.number, rank)
                factor = learning_rate(
                    step.number, steps=recipe.steps, warmup=recipe.warmup, floor=recipe.floor
                )
                set_rate(prepared.optimizer, factor)
                loss, tokens, norm, taken = optimizer_step(accelerator, wrapped, prepared, step, recipe.clip)
                done = step.number + 1
                skipped, in_a_row = skipped + (not taken), 0 if taken else in_a_row + 1
                if not taken:
                    what = f"step {done} has loss {loss} and a gradient of norm {norm}"
                    if in_a_row == NOT_TAKEN or done == recipe.steps:
                        raise Diverged(
                            f"{what}: lower the rates, or set precision=no. What {out} holds is from before"
                        )
                    log.warning("%s: it is not taken", what)
                elif average is not None:
                    update_average(average, wrapped, recipe.ema)
                if journal is not None and (done % recipe.log_every == 0 or done == recipe.steps):
                    seconds = time.perf_counter() - clock
                    line = LogLine(
                        step=done,
                        epoch=done / loader.steps_per_epoch,
                        loss=loss,
                        rates={name: rate * factor for name, rate in recipe.rates.items()},
                        gradient_norm=norm,
                        skipped=skipped,
                        samples_a_second=recipe.batch_size / seconds,
                        tokens=tokens,
                        tags=step.tags / max(1, step.samples),
                        retrieval_ms=step.retrieval_ms,
                        waited_ms=1000 * waited,
                        degraded=feed.degraded if feed else 0,
                        memory_mb=peak_memory(accelerator.device),
                    )
                    journal.write(line)
                    progress(line)
                clock = time.perf_counter()
                if (taken and done % recipe.save_every == 0) or done == recipe.steps:
                    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
                    state = Checkpoint(
                        done, recipe, pin, model.config.encoder_digest, scaler=scaler, data=samples_digest
                    )
                    save_checkpoint(accelerator, out, state, wrapped, prepared.optimizer, average)
                    clock = time.perf_counter()
    last = checkpoints.latest(out)
    assert last is not None  # the last step is always saved
    return last


def optimizer_step(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, step: Step, clip: float
) -> tuple[float, int, float, bool]:
    """Take one optimizer step, unless its loss or gradient is not finite.

    In fp16 a gradient may overflow while the scale is being found: the scaler then leaves the step out by
    itself, and it counts as taken.

    Losses are sums, divided by the labels of the whole step: every token counts the same in any process and
    micro-batch, so one process and eight have the same curve.

    Returns:
        Loss and labels (both over all processes), the gradient's norm before clipping, and whether the step
        was taken.
    """
    device = accelerator.device
    tokens = accelerator.reduce(torch.tensor(float(step.labels), device=device), "sum")
    # DDP and FSDP take the mean of the processes' gradients, and a sum is wanted
    share = tokens / accelerator.num_processes
    total = torch.zeros((), device=device)
    for i, part in enumerate(step.parts):
        last = i == len(step.parts) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            loss = model(**to_device(part, device), num_items_in_batch=share).loss
            accelerator.backward(loss)
        total += loss.detach()
    trained = [p for p in model.parameters() if p.requires_grad]
    norm = accelerator.clip_grad_norm_(trained, clip or float("inf"))
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    mean = float(accelerator.reduce(total, "mean"))
    taken = math.isfinite(mean) and (math.isfinite(norm) or accelerator.scaler is not None)
    if taken or accelerator.scaler is not None:  # the scaler has to learn of every gradient
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return mean, int(tokens), norm, taken


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Make the Accelerator for the environment that `accelerate launch` or torchrun set up."""
    # without cpu=True each process of a CPU-only launch would train on its own
    accelerator = Accelerator(
        mixed_precision=recipe.precision,
        step_scheduler_with_optimizer=False,
        cpu=not torch.cuda.is_available(),
    )
    if (
        accelerator.distributed_type is DistributedType.MULTI_CPU
        and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    ):
        # Accelerate takes FSDP on a CPU for DDP without a word; torch itself shards there as well, and tests
        # live on it
        state = accelerator.state
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = DistributedType.FSDP
        type(state)._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def _multiplies_bf16() -> bool:
    """Whether the CPU has instructions for products of bf16 (AVX512-BF16, AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def parts_of(model: TunaForConditionalGeneration) -> dict[str, nn.Module]:
    """The parts that can be trained. The image tower is not among them: its vectors must stay the store's."""
    parts: dict[str, nn.Module] = {"connector": model.multi_modal_projector}
    if model.config.tags:
        parts |= {"tag_encoder": model.tag_encoder, "weight_tuner": model.weight_tuner}
    parts["language_model"] = model.language_model
    return parts


def store_names(recipe: Recipe, samples: list[Sample]) -> list[str]:
    """What stands for `{store}` in the URL, for each sample: its field `store`, empty for no tags.

    Raises:
        InvalidInput: a sample with an image has no such field.
    """
    if STORE not in recipe.tags.store:
        return []
    names = [sample.metadata.get("store", None if sample.images else "") for sample in samples]
    for sample, name in zip(samples, names, strict=True):
        if not isinstance(name, str):
            raise InvalidInput(
                f"sample {sample.key} has no field 'store', and tags.store is '{recipe.tags.store}': "
                'say in each sample whose tags it gets, or "" for none'
            )
    return names


def pin_of(recipe: Recipe, sources: Mapping[str, TagSource]) -> StorePin:
    """The stores and versions that answer now.

    Raises:
        Unavailable: a run does not begin without its store.
        FingerprintMismatch: its stores are of different encoders.
    """
    if recipe.tags.store.startswith("null:") or not sources:
        return StorePin(recipe.tags.store)
    try:
        pins = [source.pin() for source in sources.values()]
    except Unavailable as error:
        raise Unavailable(
            f"{error}. A training run does not begin without its store: start it, or set tags.store=null://"
        ) from error
    first = pins[0]
    if len(pins) == 1:
        return StorePin(recipe.tags.store, first.store, first.version, first.fingerprint.digest)
    for pin in pins:
        if pin.fingerprint.digest != first.fingerprint.digest:
            raise FingerprintMismatch.between(pin.store, pin.fingerprint, first.fingerprint.digest)
    several = "+".join(sorted(f"{pin.store}@{pin.version}" for pin in pins))
    return StorePin(recipe.tags.store, several, 0, first.fingerprint.digest)


def tag_feed(
    recipe: Recipe,
    model: Any,
    sources: Mapping[str, TagSource],
    names: list[str],
    samples: list[Sample],
    pin: StorePin,
) -> TagFeed | None:
    """The source of the run's tags; None if it has none."""
    if not pin.store:
        return None
    captions = None
    if recipe.tags.content == "captions":
        known = read_samples(recipe.tags.captions) if recipe.tags.captions else samples
        captions = {sample.key: sample.captions for sample in known}
    lookups = {name: TagLookup.of(source, model.config) for name, source in sources.items()}
    digest = model.config.encoder_digest
    return TagFeed(
        lookups, recipe.tags, fingerprint=digest, seed=recipe.seed, stores=names, captions=captions
    )


def image_features(
    recipe: Recipe,
    model: Any,
    processor: TunaProcessor,
    samples: list[Sample],
    accelerator: Accelerator,
    preparing: Callable[[str, int, int], object],
) -> ImageFeatures:
    """Features of the data set's images: live, or from the cache, which the main process makes if it is
    missing."""
    live = LiveFeatures(model, processor.image_processor, samples)
    folder, digest, layer = (
        Path(recipe.data.features),
        model.config.encoder_digest,
        model.config.feature_layer,
    )
    if not recipe.data.features:
        if model.config.vision_config is not None and accelerator.distributed_type is DistributedType.FSDP:
            raise InvalidInput(
                "this model carries its own tower, which FSDP would cut into shards: "
                "set data.features, so that it runs before"
            )
        return live
    if not (folder / "cache.json").exists():
        if accelerator.is_main_process:
            report = partial(preparing, "images embedded")
            make_cache(folder, live, samples, encoder=digest, layer=layer, progress=report)
        accelerator.wait_for_everyone()
    return CachedFeatures(folder, samples, encoder=digest, layer=layer)


def update_average(average: dict[str, torch.Tensor], model: nn.Module, decay: float) -> None:
    """Take one step of the moving average."""
    with torch.no_grad():
        for name, value in checkpoints.trained_parameters(model):
            average[name].lerp_(value.detach(), 1 - decay)


def save_checkpoint(
    accelerator: Accelerator,
    out: Path,
    state: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Any,
) -> None:
    """Gather sharded tensors (in all processes) and write the checkpoint (in the main one)."""
    trained = checkpoints.trained_tensors(model)
    ema = checkpoints.trained_tensors(model, average) if average is not None else None
    moments = checkpoints.optimizer_tensors(model, optimizer)
    if accelerator.is_main_process:
        checkpoints.save(
            out / checkpoints.name_of(state.step), state, trained=trained, ema=ema, optimizer=moments
        )
        checkpoints.prune(out, state.recipe.keep)
    accelerator.wait_for_everyone()
