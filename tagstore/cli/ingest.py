"""ingest, retag, reembed, mine: what makes versions and tags."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import click

from tagstore.cli import options, output
from tagstore.errors import InvalidInput


@click.command()
@click.argument("source")
@click.option("--root", metavar="DIR", help="Directory of the stores.")
@click.option("--store", metavar="NAME", help="Store to add to; it is made if it isn't there.")
@click.option(
    "--to",
    "url",
    metavar="URL",
    help="Instead of --root and --store; grpc://HOST:PORT/NAME sends the pairs to a server.",
)
@click.option(
    "--format",
    "format_",
    metavar="F",
    help="folder, csv, tsv, jsonl, parquet or webdataset; found by looking if not given.",
)
@click.option(
    "--encoder",
    metavar="E",
    help="mini, NAME/PRETRAINED or local-dir:PATH; the store's own, or mini, if not given.",
)
@options.miner
@options.stoplist
@options.synonyms
@click.option("--image-column", metavar="C", help="Column with the image or its path.")
@click.option(
    "--caption-column", metavar="C", multiple=True, help="Column with captions; may be given several times."
)
@click.option("--key-column", metavar="C", help="Column with the unique key.")
@click.option(
    "--allow-outside", is_flag=True, help="Follow image paths that lead out of the source's folder."
)
@click.option(
    "--sync",
    type=click.Choice(["full", "batch"]),
    default="full",
    show_default=True,
    help="When work reaches the disk.",
)
@options.device
@options.as_json
def ingest(
    source: str,
    root: str | None,
    store: str | None,
    url: str | None,
    format_: str | None,
    encoder: str | None,
    miner: str,
    stoplist: str | None,
    synonyms: str | None,
    image_column: str | None,
    caption_column: tuple[str, ...],
    key_column: str | None,
    allow_outside: bool,
    sync: Any,
    device: str,
    as_json: bool,
) -> None:
    """Make a version of a store out of SOURCE.

    SOURCE is a folder of images with same-name .txt files, a CSV, TSV, JSON Lines or Parquet file, or WebDataset .tar shards; globs and
    brace patterns are understood (quote them). A pair that can't be used is quarantined with its reason, the rest goes on. An ingest that
    was cut off goes on where it stopped when it is run again.
    """
    from tagstore.readers import Columns

    if bool(url) == bool(root or store) or (not url and not (root and store)):
        raise InvalidInput("say where to: --root DIR --store NAME, or --to URL")
    columns = Columns(image=image_column, caption=caption_column, key=key_column)
    if url and options.remote(url):
        if stoplist or synonyms:
            raise InvalidInput(
                "a server mines with its own stop list and synonyms: leave --stoplist and --synonyms out"
            )
        _send(url, source, format_, columns, allow_outside, encoder, miner, as_json)
        return
    if url:
        root, store, _ = options.local(url)
    assert root is not None
    assert store is not None
    from tagstore.ingest import ingest as run
    from tagstore.mining import load_rules

    with output.progress() as progress:
        report = run(
            source,
            root=root,
            store=store,
            format=format_,
            columns=columns,
            allow_outside=allow_outside,
            encoder=encoder,
            miner=miner,
            vocabulary=load_rules(stoplist, synonyms),
            device=device,
            sync=sync,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps(asdict(report)))
    else:
        output.print_report(report)


def _send(
    url: str,
    source: str,
    format_: str | None,
    columns: Any,
    allow_outside: bool,
    encoder: str | None,
    miner: str,
    as_json: bool,
) -> None:
    import os

    from tagstore.client.admin import administer
    from tagstore.readers import read

    pairs = read(source, format=format_, columns=columns, allow_outside=allow_outside)
    with output.progress() as progress, administer(url) as admin:
        report = admin.ingest(
            pairs, encoder=encoder or "", miner=miner, source=os.path.abspath(source), progress=progress
        )
    if as_json:
        click.echo(json.dumps(asdict(report)))
    else:
        output.print_report(report)


@click.command()
@click.argument("url")
@click.option("--encoder", required=True, metavar="E", help="mini, NAME/PRETRAINED or local-dir:PATH.")
@click.option(
    "--source",
    "sources",
    multiple=True,
    metavar="SRC",
    help="Where the images are, if not where they were ingested from.",
)
@options.device
def reembed(url: str, encoder: str, sources: tuple[str, ...], device: str) -> None:
    """Make a version with another encoder's vectors, from the original images; the old one is served until then."""
    from tagstore.upkeep.edits import reembed as run

    root, store, _ = options.local(url)
    version = run(root, store, encoder, sources=sources, device=device)
    click.echo(f"{store}@{version.number}: {version.entries} entries, vectors of {version.fingerprint}")


@click.command()
@click.argument("file", type=click.File("r", encoding="utf-8", errors="replace"))
@options.miner
@options.as_json
def mine(file: Any, miner: str, as_json: bool) -> None:
    """Tags of captions: one caption a line of FILE, or of standard input for -."""
    from tagstore.mining import mine as run

    captions: list[str] = []

    def lines() -> Iterator[str]:
        for line in file:
            captions.append(line.rstrip("\r\n"))
            yield captions[-1]

    # tags come in order, a batch behind the captions that were read for them
    for tags in run(lines(), miner):
        caption = captions.pop(0)
        if as_json:
            found = [
                {"text": t.text, "kind": t.kind, "span": list(t.span), "score": round(t.score, 3)}
                for t in tags
            ]
            click.echo(json.dumps({"caption": caption, "tags": found}, ensure_ascii=False))
        else:
            click.echo(f"{caption}\n    " + (", ".join(f"{t.text} ({t.kind})" for t in tags) or "no tags"))


@click.command()
@click.argument("url")
@options.miner
@options.stoplist
@options.synonyms
@click.option(
    "--min-count",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Leave out tags that fewer entries carry.",
)
def retag(url: str, miner: str, stoplist: str | None, synonyms: str | None, min_count: int) -> None:
    """Make a version whose tags are mined again from the stored captions; no image is read or embedded."""
    from tagstore.mining import load_rules
    from tagstore.upkeep.edits import retag as run

    root, store, _ = options.local(url)
    version = run(root, store, miner=miner, vocabulary=load_rules(stoplist, synonyms, min_count))
    click.echo(
        f"{store}@{version.number}: {version.entries} entries, {version.tags} tags, {version.unique_tags} unique tags"
    )


COMMANDS = (ingest, retag, reembed, mine)
