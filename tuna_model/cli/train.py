"""tuna train"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tuna_model.training.journal import LogLine


@click.command()
@click.option(
    "--config",
    required=True,
    metavar="NAME|FILE",
    help="A named recipe (see tuna_model/training/configs) or a TOML file.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a value: tags.store=null://, rates.connector=1e-3.",
)
@click.option("--data", metavar="PATH", help="Instead of data.path.")
@click.option("--store", metavar="URL", help="Instead of tags.store.")
@click.option("--out", metavar="DIR", help="Instead of out.")
@click.option(
    "--any-store", is_flag=True, help="Go on with another store or version than the run began with."
)
@click.option("--no-resume", is_flag=True, help="Begin anew where the run has checkpoints.")
@click.option(
    "--export",
    "export_to",
    metavar="PATH",
    help="At the end write what was learnt: FILE.safetensors, or a model's directory.",
)
def train(
    config: str, settings: tuple[str, ...], data: str | None, store: str | None, out: str | None,
    any_store: bool, no_resume: bool, export_to: str | None,
) -> None:  # fmt: skip
    """Train as a recipe says. A run that was cut off resumes from its newest checkpoint.

    Several processes or GPUs: accelerate launch [--config_file FILE] -m tuna_model.cli train ...
    """
    from accelerate import PartialState
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from tuna_model.training.recipe import Recipe
    from tuna_model.training.runs import export
    from tuna_model.training.train import train as run

    named = {
        "data.path": data,
        "tags.store": store,
        "out": out,
        "tags.any_store": "true" if any_store else None,
    }
    recipe = Recipe.read(config).with_values(
        [*settings, *(f"{key}={value}" for key, value in named.items() if value is not None)]
    )
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(), TextColumn("{task.fields[line]}"),
    )  # fmt: skip
    with Progress(*columns) as bar:
        tasks: dict[str, Any] = {}

        def show(activity: str, done: int, total: int, line: str = "") -> None:
            if activity not in tasks:
                tasks[activity] = bar.add_task(activity, total=total, line="")
            bar.update(tasks[activity], completed=done, line=line)

        def show_step(line: LogLine) -> None:
            show(recipe.stage, line.step, recipe.steps, describe(line))

        last = run(recipe, resume=not no_resume, progress=show_step, preparing=show)
    state = PartialState()
    if state.is_main_process:
        click.echo(str(last))
        if export_to:
            click.echo(str(export(last, export_to)))
    state.destroy_process_group()


def describe(line: LogLine) -> str:
    """Describe a step in a line of text."""
    rate = max(line.rates.values(), default=0.0)
    parts = [
        f"loss {line.loss:.3f}", f"lr {rate:.1e}", f"|g| {line.gradient_norm:.2f}",
        f"{line.samples_a_second:.1f}/s", f"store {line.retrieval_ms:.0f} ms",
        f"{line.memory_mb / 1000:.1f} GB",
    ]  # fmt: skip
    if line.degraded:
        parts.append(f"{line.degraded} without tags")
    return " ".join(parts)
