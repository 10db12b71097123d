"""tuna explain"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tuna_model.cli.options import generation, load, with_generation, with_model


@click.command()
@click.argument("image", type=click.Path(exists=True, dir_okay=False))
@click.argument("question")
@with_model
@with_generation
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("explain.html"),
    show_default=True,
    help="The page.",
)
@click.option(
    "--ban",
    multiple=True,
    metavar="TAG",
    help="Also answer without this tag; the heaviest one if none is named.",
)
@click.option(
    "--samples",
    metavar="PATH",
    help="Data set that the store was made of: pictures and captions of the neighbours.",
)
@click.option(
    "--allow-outside", is_flag=True, help="Read images of --samples whose path leads out of its folder."
)
def explain(
    image: str, question: str, model: str, store: str, max_tokens: int, temperature: float, out: Path,
    ban: tuple[str, ...], samples: str | None, allow_outside: bool, **options: Any,
) -> None:  # fmt: skip
    """Write a page that explains the model's answer to QUESTION about IMAGE."""
    from tagstore.readers.samples import read_samples
    from tuna_model.evaluation.explain import explain as write_page
    from tuna_model.evaluation.run import write_atomically

    tuna = load(model, store, **options)
    known = read_samples(samples, allow_outside=allow_outside) if samples else ()
    page = write_page(
        tuna, image, question, ban=ban, samples=known, name=model, **generation(max_tokens, temperature)
    )
    write_atomically(out, page)
    click.echo(str(out))
