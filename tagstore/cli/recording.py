"""Commands for maps, the answers to a data set in one file that needs no server: record, verify-map."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from tagstore.cli import options, output


@click.command()
@click.argument("url")
@click.argument("dataset")
@click.option(
    "--out", required=True, type=click.Path(dir_okay=False), metavar="FILE", help="The map to write."
)
@click.option(
    "--images", metavar="DIR", help="Folder of the images of LLaVA-style JSON or JSON Lines, if not its own."
)
@options.format_
@click.option("--key-column", metavar="C", help="Column or field with the unique key.")
@click.option("--image-column", metavar="C", help="Column or field with the image or its path.")
@click.option(
    "--allow-outside",
    is_flag=True,
    help="Read images whose path leads out of DATASET's folder, or of --images.",
)
@options.number("--workers", 4, "Requests at a time.", most=64)
@options.number("--batch", 16, "Samples in a request.", most=32)
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
    """Keep the answers to a data set in one file.

    DATASET is whatever `tuna train` reads, under the same keys (LLaVA-style JSON, JSON Lines, WebDataset
    shards), or anything that `tagstore ingest` reads. Each image is asked for once. Options of the answers
    stand in the URL, as in "grpc://localhost:50051/flickr8k@7?k=10&exclude=self". Run an interrupted
    recording again to continue it.
    """
    from tagstore.client import connect
    from tagstore.client.recording import record as run
    from tagstore.readers import Columns
    from tagstore.readers.samples import read_images

    columns = Columns(image=image_column, key=key_column)
    samples = read_images(
        dataset, images=images, format=format_, columns=columns, allow_outside=allow_outside
    )
    with output.progress() as progress, connect(url, retries=20) as source:
        r = run(source, samples, out, workers=workers, batch=batch, progress=progress)
    if as_json:
        click.echo(json.dumps(asdict(r)))
        return
    size = f"{r.tags} tags, {r.bytes:,} bytes, checksum {r.checksum}"
    click.echo(f"{r.path}: {r.samples} samples of {r.store}@{r.version}, {size}")
    refused = f"; {r.refused} were refused, the map says why" if r.refused else ""
    click.echo(f"asked for {r.asked} in {r.seconds:.1f} s{refused}")


@click.command("verify-map")
@click.argument("path", type=options.existing_file)
def verify_map(path: str) -> None:
    """Compare a recorded file with its checksums.

    Exit code 1 if it differs.
    """
    from tagstore.client.mapfile import Map

    map_ = Map(path)
    map_.verify()
    meta = map_.meta
    click.echo(f"{path} is sound: {meta['samples']} samples of {meta['store']}@{meta['version']}")
