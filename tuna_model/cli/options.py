"""Options that several commands share, and the model that they load."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tuna_model.inference.pipeline import Pipeline

DTYPES = ("fp32", "bf16", "fp16")


def with_model(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --model, --store and their settings."""
    for option in reversed(
        (
            click.option(
                "--model",
                default="smol",
                show_default=True,
                metavar="M",
                help="A preset (smol, tiny), a directory, or a training run.",
            ),
            click.option(
                "--store",
                default="null://",
                show_default=True,
                metavar="URL",
                help="Where tags come from; null:// for none.",
            ),
            click.option(
                "--any-store",
                is_flag=True,
                help="Take tags of another store than the model was trained with.",
            ),
            click.option(
                "--timeout",
                default=5.0,
                show_default=True,
                help="Seconds the store has; then the answer goes without tags.",
            ),
            click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N."),
            click.option(
                "--dtype",
                type=click.Choice(DTYPES),
                default="fp32",
                show_default=True,
                help="Of the weights.",
            ),
        )
    ):
        command = option(command)
    return command


def with_generation(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --max-tokens and --temperature."""
    command = click.option("--temperature", default=0.0, show_default=True, help="Above 0: sample.")(command)
    return click.option("--max-tokens", default=64, show_default=True, help="The answer's length at most.")(
        command
    )


def with_contrast(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --contrast."""
    return click.option(
        "--contrast",
        default=0.0,
        show_default=True,
        metavar="ALPHA",
        help="Contrastive decoding against the same prompt without tags; 1 is usual, 0 is none.",
    )(command)


def load(
    model: str,
    store: str,
    any_store: bool,
    timeout: float,
    device: str,
    dtype: str,
    contrast: float = 0.0,
) -> Pipeline:
    """Load the pipeline of these options, with transformers silent."""
    import torch
    from transformers.utils import logging as transformers_logging

    from tuna_model.inference.pipeline import Pipeline

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    return Pipeline.load(
        model, store=store, any_store=any_store, timeout=timeout, contrast=contrast, device=device, dtype=kind
    )


def generation(max_tokens: int, temperature: float) -> dict[str, Any]:
    """Options of `generate`."""
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    return {"max_new_tokens": max_tokens} | sampling
