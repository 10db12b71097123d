"""Commands that read pairs and captions: ingest, mine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import click

from tagstore.cli import options, output
from tagstore.errors import InvalidInput


@click.command()
@click.argument("source")
@click.option("--root", metavar="DIR", help="Directory of the stores.")
@click.option("--store", metavar="NAME", help="Store to add to; made if it does not exist.")
@click.option("--to", "url", metavar="URL", help="In place of --root and --store; may be a server's.")
@options.format_
@click.option("--encoder", metavar="E", help="mini, NAME/PRETRAINED, local-dir:PATH; by default the store's.")
@options.miner
@options.stoplist
@options.synonyms
@click.option("--image-column", metavar="C", help="Column with the image or its path.")
@click.option("--caption-column", metavar="C", multiple=True, help="Columns with captions; repeatable.")
@click.option("--key-column", metavar="C", help="Column with the unique key.")
@click.option("--images", metavar="DIR", help="Folder that image paths are relative to; the table's own.")
@click.option("--delimiter", metavar="C", default="", help="Between a CSV's fields; found by looking.")
@click.option("--encoding", metavar="E", default="", help="Of a table of text: latin-1, cp1252 ...")
@click.option(
    "--caption-from",
    type=click.Choice(["folder"]),
    help="Pictures without caption files: the folder's name is the caption.",
)
@click.option("--allow-outside", is_flag=True, help="Follow image paths out of the source's folder.")
@click.option("--dry-run", is_flag=True, help="Only say what would be read, with reasons and examples.")
@click.option(
    "--max-bad",
    type=click.FloatRange(0, 1),
    default=1.0,
    metavar="SHARE",
    help="Make no version if a larger share of the pairs is refused: 0.05.",
)
@click.option(
    "--sync",
    type=click.Choice(["full", "batch"]),
    default="full",
    show_default=True,
    help="When data reaches the disk.",
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
    images: str | None,
    delimiter: str,
    encoding: str,
    caption_from: Any,
    allow_outside: bool,
    dry_run: bool,
    max_bad: float,
    sync: Any,
    device: str,
    as_json: bool,
) -> None:
    """Make a version of a store from a source of pairs.

    SOURCE is a folder of images with same-name .txt files, a CSV, TSV, JSON (lines, a list, COCO's captions),
    Parquet or Arrow file, a saved Hugging Face dataset, or WebDataset .tar shards; globs and brace patterns
    work if quoted. A pair that cannot be used is quarantined with its reason, the rest goes on. Run an
    interrupted ingest again to continue it.
    """
    from tagstore.readers import Columns, Layout, read

    if len(delimiter := delimiter.replace("\\t", "\t")) > 1:
        raise InvalidInput(f"--delimiter is '{delimiter}': one character stands between two fields")
    layout = Layout(delimiter, encoding, caption_from or "")
    columns = Columns(image=image_column, caption=caption_column, key=key_column)
    # what the server's miner needs; other miners of pictures are known to the server alone
    optional = "image" in miner.split("+")
    reading: dict[str, Any] = {
        "format": format_, "columns": columns, "allow_outside": allow_outside, "images": images,
        "layout": layout,
    }  # fmt: skip
    if dry_run:
        from tagstore.ingestion.preview import preview

        output.print_preview(preview(source, captions_optional=optional, **reading), max_bad, as_json)
        return
    if bool(url) == bool(root or store) or (not url and not (root and store)):
        raise InvalidInput("say where to: --root DIR --store NAME, or --to URL")
    if url and options.remote(url):
        if stoplist or synonyms:
            raise InvalidInput(
                "a server mines with its own stop list and synonyms: leave --stoplist and --synonyms out"
            )
        from tagstore.client.admin import administer

        if max_bad < 1:
            raise InvalidInput("--max-bad is for a store on this machine: try --dry-run first")
        pairs = read(source, captions_optional=optional, **reading)
        with output.progress() as progress, administer(url) as admin:
            origin = os.path.abspath(source)
            ingested = admin.ingest(
                pairs, encoder=encoder or "", miner=miner, source=origin, progress=progress
            )
        output.print_report(ingested, as_json)
        return
    if url:
        root, store, _ = options.local(url)
    assert root is not None
    assert store is not None
    from tagstore.ingestion import ingest as run
    from tagstore.mining import load_rules

    with output.progress() as progress:
        report = run(
            source,
            root=root,
            store=store,
            **reading,
            encoder=encoder,
            miner=miner,
            vocabulary=load_rules(stoplist, synonyms),
            device=device,
            sync=sync,
            max_bad=max_bad,
            progress=progress,
        )
    output.print_report(report, as_json)


@click.command()
@click.argument("file", type=click.File("r", encoding="utf-8", errors="replace"))
@options.miner
@options.as_json
def mine(file: Any, miner: str, as_json: bool) -> None:
    """Print the tags of captions, one caption a line.

    FILE is a text file, or - for standard input.
    """
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
            values = [
                {"text": t.text, "kind": t.kind, "span": list(t.span), "score": round(t.score, 3)}
                for t in tags
            ]
            click.echo(json.dumps({"caption": caption, "tags": values}, ensure_ascii=False))
        else:
            click.echo(f"{caption}\n    " + (", ".join(f"{t.text} ({t.kind})" for t in tags) or "no tags"))
