"""serve, query, stats: what works on servers and directories alike."""

from __future__ import annotations

import json
import sys

import click

from tagstore.cli import options, output
from tagstore.errors import InvalidInput, NotFound


@click.command()
@options.root
@click.option("--address", default="127.0.0.1:50051", show_default=True, metavar="HOST:PORT", help="Port 0 picks a free one.")
@options.device
@click.option("--threads", type=click.IntRange(1), default=8, show_default=True, help="Requests answered at a time.")
@click.option("--insecure", is_flag=True, help="Listen where other machines can reach it, without encryption or tokens.")
def serve(root: str, address: str, device: str, threads: int, insecure: bool) -> None:
    """Serve all stores under a directory; prints HOST:PORT when ready. Ctrl-C and SIGTERM finish what is in flight."""
    from tagstore.server import Server

    Server(root, address, device=device, threads=threads, insecure=insecure).run(lambda at: click.echo(at))


@click.command()
@click.argument("url")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--k", type=click.IntRange(1, 1000), default=5, show_default=True, help="Neighbours of each image.")
@click.option("--max-tags", type=click.IntRange(0), default=0, help="At most so many tags of each image; 0 for all.")
@options.as_json
def query(url: str, images: tuple[str, ...], k: int, max_tags: int, as_json: bool) -> None:
    """Tags of the entries nearest to each IMAGE."""
    from tagstore.client import connect

    failed = False
    with connect(url) as source:
        source.info()
        for image in images:
            try:
                [retrieval] = source.retrieve([image], k=k, max_tags=max_tags)
            except (InvalidInput, NotFound) as error:
                # this picture only: the others may be fine
                click.echo(f"{image}: {error}", err=True)
                failed = True
                continue
            if as_json:
                click.echo(json.dumps({"image": image, **output.retrieval_json(retrieval)}))
            else:
                output.print_retrieval(image, retrieval)
    if failed:
        sys.exit(1)


@click.command()
@click.argument("url")
@options.as_json
def stats(url: str, as_json: bool) -> None:
    """What a store holds: counts, fingerprint, index."""
    from tagstore.client import connect

    with connect(url) as source:
        value = output.info_json(source.info())
    if as_json:
        click.echo(json.dumps(value))
    else:
        output.table(("", url), [(k, json.dumps(v) if isinstance(v, dict) else v) for k, v in value.items()])


COMMANDS = (serve, query, stats)
