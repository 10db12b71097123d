"""tuna generate"""

from __future__ import annotations

import json
from typing import Any

import click

from tuna_model.cli.options import generation, load, with_contrast, with_generation, with_model


@click.command()
@click.argument("image", type=click.Path(exists=True, dir_okay=False))
@click.argument("question")
@with_model
@with_contrast
@with_generation
@click.option("--beams", default=1, show_default=True, help="Beams of the search.")
@click.option("--json", "as_json", is_flag=True, help="Answer, tags, weights and neighbours as JSON.")
def generate(
    image: str, question: str, model: str, store: str, max_tokens: int, temperature: float, beams: int,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Answer QUESTION about IMAGE. The answer alone goes to stdout."""
    tuna = load(model, store, **options)
    answer = tuna.answer(image, question, num_beams=beams, **generation(max_tokens, temperature))
    if answer.degraded:
        click.echo(f"without tags: {tuna.lookup.last_error}", err=True)
    if not as_json:
        click.echo(answer.text)
        return
    value = {
        "answer": answer.text,
        "finished": answer.finished,
        "tags": [tag.to_dict() for tag in answer.tags],
        "neighbours": [
            {"key": neighbour.key, "entry_id": neighbour.entry_id, "similarity": neighbour.similarity}
            for neighbour in answer.neighbours
        ],
        "store": answer.store,
        "version": answer.version,
        "degraded": answer.degraded,
        "model": model,
        "encoder": tuna.model.config.encoder_digest,
    }
    click.echo(json.dumps(value, ensure_ascii=False))
