"""record, verify-map: the answers to a data set in one file that needs no server."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from tagstore.cli import options, output


@click.command()
@click.argument("url")
@click.argument("dataset")
@click.option(
    "--out",
    required=True,
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="The map; connect to it with replay://FILE.",
)
@click.option(
    "--images",
    metavar="DIR",
    help="Image paths of DATASET, LLaVA-style JSON or JSON Lines, are relative to DIR; by default to its folder.",
)
@click.option(
    "--format",
    "format_",
    metavar="F",
    help="folder, csv, tsv, jsonl, parquet or webdataset; found by looking if not given.",
)
@click.option("--key-column", metavar="C", help="Column or field with the unique key.")
@click.option("--image-column", metavar="C", help="Column or field with the image or its path.")
@click.option(
    "--allow-outside",
    is_flag=True,
    help="Read images whose path leads out of DATASET's folder, or of --images.",
)
@click.option(
    "--workers", type=click.IntRange(1, 64), default=4, show_default=True, help="Requests at a time."
)
@click.option("--batch", type=click.IntRange(1, 32), default=16, show_default=True, help="Samples a request.")
@options.as_json
def record(
    url: str,
    dataset: str,
    out: str,
    images: str | None,
    format_: str | None,
    key_column: str | None,
    image_column: str | None,
    allow_outside: bool,
    workers: int,
    batch: int,
    as_json: bool,
) -> None:
    """Ask URL once for every image of DATASET and keep the answers in a file.

    DATASET is whatever `tuna train` reads, under the same keys (LLaVA-style JSON, JSON Lines, WebDataset shards), or
    anything that `tagstore ingest` reads. Options of the answers stand in the URL, as in
    "grpc://localhost:50051/flickr8k@7?k=10&exclude=self". A recording that was cut off goes on where it stopped when
    it is run again.
    """
    from tagstore.client import connect
    from tagstore.client.recording import record as run
    from tagstore.readers import Columns
    from tagstore.readers.samples import read_images

    samples = read_images(
        dataset,
        images=images,
        format=format_,
        columns=Columns(image=image_column, key=key_column),
        allow_outside=allow_outside,
    )
    with output.progress() as progress, connect(url, retries=20) as source:
        recorded = run(source, samples, out, workers=workers, batch=batch, progress=progress)
    if as_json:
        click.echo(json.dumps(asdict(recorded)))
        return
    r = recorded
    click.echo(
        f"{r.path}: {r.samples} samples of {r.store}@{r.version}, {r.tags} tags, {r.bytes:,} bytes, checksum {r.checksum}"
    )
    click.echo(
        f"asked for {r.asked} in {r.seconds:.1f} s"
        + (f"; {r.refused} were refused, the map says why" if r.refused else "")
    )


@click.command("verify-map")
@click.argument("path", type=click.Path(exists=True, dir_okay=False))
def verify_map(path: str) -> None:
    """Compare all of a recorded map with its checksums: exit code 1 and what is wrong if it differs."""
    from tagstore.client.mapfile import Map

    map_ = Map(path)
    map_.verify()
    click.echo(
        f"{path} is sound: {map_.meta['samples']} samples of {map_.meta['store']}@{map_.meta['version']}"
    )


COMMANDS = (record, verify_map)
