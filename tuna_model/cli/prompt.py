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
    "--store", required=True, metavar="URL", help="Where tags come from; the server embeds the image."
)
@click.option("--timeout", default=30.0, show_default=True, help="Seconds the store has.")
@click.option(
    "--style", type=click.Choice(STYLES), default="weights", show_default=True, help="How tags are written."
)
@click.option("--max-tags", default=10, show_default=True, help="Tags, at most.")
@click.option("--neighbours", default=5, show_default=True, help="Similar images to take tags from.")
@click.option("--temperature", default=0.1, show_default=True, help="Of the weights.")
@click.option("--json", "as_json", is_flag=True, help="Prompt, tags and weights as JSON.")
def prompt(
    image: str, question: str, store: str, timeout: float, style: str, max_tags: int, neighbours: int,
    temperature: float, as_json: bool,
) -> None:  # fmt: skip
    """Write QUESTION with the weighed tags of IMAGE: a prompt for any vision-language model, without
    training.
    """
    with connect(store, timeout=timeout) as source:
        retrieval = source.retrieve([image], k=neighbours)[0]
    layout = TagLayout(cap=max_tags)
    # the store computed the relevance of each tag, so embeddings are not needed
    tags = ImageTags.of(retrieval, np.zeros((len(retrieval), 0), np.float32))
    text = tag_prompt(question, tags, style=style, temperature=temperature, layout=layout)
    if not as_json:
        click.echo(text)
        return
    chosen = layout.choose(tags)
    weights = relative_weights(chosen, temperature=temperature)
    weighed = [
        {"tag": tag, "weight": round(float(weight), 4)}
        for tag, weight in zip(chosen.texts, weights, strict=True)
    ]
    value = {"prompt": text, "tags": weighed, "store": retrieval.store, "version": retrieval.version}
    click.echo(json.dumps(value, ensure_ascii=False))
