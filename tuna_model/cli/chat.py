"""tuna chat"""

from __future__ import annotations

from typing import Any

import click

from tagstore.errors import TagstoreError
from tuna_model.cli.options import generation, load, with_generation, with_model

HELP = (
    "/image PATH shows a picture, /tags lists the tags of the last answer, "
    "/reset starts anew, /quit (or end of input) leaves."
)


@click.command()
@click.argument("image", required=False, type=click.Path(exists=True, dir_okay=False))
@with_model
@with_generation
@click.option("--system", default="", help="The first message, before the conversation.")
def chat(
    image: str | None,
    model: str,
    store: str,
    max_tokens: int,
    temperature: float,
    system: str,
    **options: Any,
) -> None:
    """Talk about IMAGE; answers appear as they are written."""
    tuna = load(model, store, **options)
    click.echo(HELP, err=True)
    start = [{"role": "system", "content": system}] if system else []
    messages: list[dict[str, Any]] = list(start)
    images: list[str] = []
    new_images = [image] if image else []
    tags: Any = ()
    while True:
        try:
            line = click.prompt("you", prompt_suffix="> ", err=True).strip()
        except (click.Abort, EOFError):
            return
        if line == "/quit":
            return
        if line == "/reset":
            messages, images, new_images, tags = list(start), [], [], ()
        elif line == "/tags":
            click.echo("\n".join(f"{tag.weight:6.2f}  {tag.text}" for tag in tags) or "no tags", err=True)
        elif line.startswith("/image "):
            new_images.append(line.removeprefix("/image ").strip())
        elif line.startswith("/"):
            click.echo(HELP, err=True)
        else:
            new = [*({"type": "image"} for _ in new_images), {"type": "text", "text": line}]
            try:
                conversation = [*messages, {"role": "user", "content": new}]
                prepared = tuna.prepare([images + new_images], [conversation], new_tokens=max_tokens)
            except (TagstoreError, OSError) as error:
                click.echo(f"error: {error}", err=True)
                new_images = []
                continue
            if prepared.degraded[0]:
                click.echo(f"without tags: {tuna.lookup.last_error}", err=True)
            tags, text = prepared.tags[0], ""
            for piece in tuna.stream([], [], prepared=prepared, **generation(max_tokens, temperature)):
                click.echo(piece, nl=False)
                text += piece
            click.echo()
            images, new_images = images + new_images, []
            messages = [*conversation, {"role": "assistant", "content": text.strip()}]
