"""tuna prompt"""

from __future__ import annotations

import json

import click
import numpy as np

from tagstore.client import connect
from tuna_model.inference.prompt import STYLES, relative_weights, tag_prompt
from tuna_model.processing.tags import ImageTags, TagLayout


@click.command()
@click.argument("image", type=click.Path(exists=True, dir_okay=False))
@click.argument("question")
@click.option(
    "--store", required=True, metavar="URL", help="Where tags come from; its side looks at the image."
)
@click.option("--timeout", default=30.0, show_default=True, help="Seconds the store has.")
@click.option(
    "--style", type=click.Choice(STYLES), default="weights", show_default=True, help="How tags are written."
)
@click.option("--max-tags", default=10, show_default=True, help="At most so many.")
@click.option("--neighbours", default=5, show_default=True, help="How many similar images are asked for.")
@click.option("--temperature", default=0.1, show_default=True, help="Of the weights.")
@click.option("--json", "as_json", is_flag=True, help="Prompt, tags and weights as JSON.")
def prompt(
    image: str,
    question: str,
    store: str,
    timeout: float,
    style: str,
    max_tags: int,
    neighbours: int,
    temperature: float,
    as_json: bool,
) -> None:
    """Write QUESTION with the weighed tags of IMAGE: a prompt for any vision-language model, which needs no training for it."""
    with connect(store, timeout=timeout) as source:
        found = source.retrieve([image], k=neighbours)[0]
    layout = TagLayout(cap=max_tags)
    # the store has said how relevant each tag is: their embeddings are not needed
    tags = ImageTags.of(found, np.zeros((len(found), 0), np.float32))
    text = tag_prompt(question, tags, style=style, temperature=temperature, layout=layout)
    if not as_json:
        click.echo(text)
        return
    chosen = layout.choose(tags)
    weights = relative_weights(chosen, temperature=temperature)
    named = [
        {"tag": tag, "weight": round(float(weight), 4)}
        for tag, weight in zip(chosen.texts, weights, strict=True)
    ]
    click.echo(
        json.dumps(
            {"prompt": text, "tags": named, "store": found.store, "version": found.version},
            ensure_ascii=False,
        )
    )
