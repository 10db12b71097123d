"""Commands for servers and what they are asked: serve, query, load, unload."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from tagstore.cli import options, output
from tagstore.errors import InvalidInput, NotFound


@click.command()
@options.root
@click.option(
    "--address",
    default="127.0.0.1:50051",
    show_default=True,
    metavar="HOST:PORT",
    help="Port 0 picks a free one.",
)
@options.device
@options.number("--workers", None, "Processes that serve; by default one for every two cores.")
@click.option(
    "--tls-certificate", default="", metavar="PEM", help="Certificate chain; reloaded when it changes."
)
@click.option("--tls-key", default="", metavar="PEM", help="The certificate's private key.")
@click.option(
    "--tls-client-ca", default="", metavar="PEM", help="Require client certificates of this authority."
)
@click.option(
    "--tokens", default="", metavar="FILE", help="Callers and rights, JSON; by default TAGSTORE_TOKENS."
)
@click.option(
    "--anonymous", type=click.Choice(["read", "ingest", "admin"]), help="What callers without a token may do."
)
@click.option("--insecure", is_flag=True, help="Serve other machines without encryption or tokens.")
@click.option("--audit", default="", metavar="FILE", help="Append writes and refusals, JSON Lines.")
@click.option("--metrics", default="", metavar="HOST:PORT", help="Serve metrics for Prometheus there.")
@options.number(
    "--scrub",
    8,
    "Compare the stores with their checksums in the background; 0: never.",
    least=0,
    metavar="MIB/S",
)
@click.option("--tracing", is_flag=True, help="Send OpenTelemetry spans to OTEL_EXPORTER_OTLP_ENDPOINT.")
@click.option("--json-logs", is_flag=True, help="Log JSON, one object a line.")
@options.number("--threads", 8, "Threads of a worker for all but searches.")
@options.number("--max-in-flight", 1024, "Calls in flight in a worker; more are refused.")
@options.number("--max-per-client", 64, "Calls in flight of one client.")
@options.number("--max-message", 18, "Size of a request or an answer.", metavar="MIB")
@options.number("--max-image", 16, "Size of one encoded image.", metavar="MIB")
def serve(
    root: str,
    address: str,
    device: str,
    workers: int | None,
    threads: int,
    max_in_flight: int,
    max_per_client: int,
    max_message: int,
    max_image: int,
    **settings: Any,
) -> None:
    """Serve all stores under a directory.

    Prints HOST:PORT when ready. Ctrl-C and SIGTERM finish the calls in flight first.
    """
    from tagstore.serving.settings import Limits, Settings, default_workers
    from tagstore.serving.signals import RunnableServer, run

    limits = Limits(
        threads=threads,
        in_flight=max_in_flight,
        per_client=max_per_client,
        message_bytes=max_message << 20,
        image_bytes=max_image << 20,
    )
    checked = Settings(workers=workers or default_workers(), limits=limits, **settings)
    if checked.json_logs:
        from tagstore.serving.logs import use_json

        use_json()
    server: RunnableServer
    if checked.workers > 1:
        from tagstore.serving.workers import Supervisor

        server = Supervisor(root, address, device=device, settings=checked)
    else:
        from tagstore.serving.server import Server

        server = Server(root, address, device=device, settings=checked)
    run(server, click.echo)


@click.command()
@click.argument("url")
@click.argument("images", nargs=-1, metavar="IMAGE...")
@click.option(
    "--text",
    "captions",
    multiple=True,
    metavar="TEXT",
    help="What the pictures should show; may be given several times.",
)
@options.number("--k", 5, "Neighbours of each query.", most=1000)
@click.option(
    "--max-tags", type=click.IntRange(0), default=0, help="Tags of each query, best first; 0 for all."
)
@click.option("--why", is_flag=True, help="Show the words that each tag came from.")
@options.as_json
def query(
    url: str,
    images: tuple[str, ...],
    captions: tuple[str, ...],
    k: int,
    max_tags: int,
    why: bool,
    as_json: bool,
) -> None:
    """Print the tags of similar images.

    Of the entries nearest to each IMAGE, then to each TEXT.
    """
    from tagstore.client import connect

    if not (images or captions):
        raise click.UsageError("nothing is asked: give an IMAGE, or --text TEXT")
    failed = False
    with connect(url, k=k, max_tags=max_tags, with_provenance=why) as source:
        source.info()
        for kind, name in [*(("image", image) for image in images), *(("text", text) for text in captions)]:
            try:
                [retrieval] = source.retrieve([name]) if kind == "image" else source.retrieve(captions=[name])
            except (InvalidInput, NotFound) as error:
                # this query only: the others may be fine
                click.echo(f"{name}: {error}", err=True)
                failed = True
                continue
            if as_json:
                click.echo(json.dumps({kind: name, **output.retrieval_json(retrieval)}))
            else:
                output.print_retrieval(name, retrieval)
    if failed:
        sys.exit(1)


@click.command()
@click.argument("url")
def load(url: str) -> None:
    """Let a running server open a store.

    One that was unloaded, or that was made after the server started.
    """
    from tagstore.client.admin import administer

    with administer(url) as admin:
        info = admin.load()
    click.echo(f"{info.store}@{info.version} is served: {info.entries} entries")


@click.command()
@click.argument("url")
def unload(url: str) -> None:
    """Let a running server close a store and free its memory.

    The store's files stay as they are.
    """
    from tagstore.client.admin import administer

    with administer(url) as admin:
        admin.unload()
    click.echo("unloaded; `tagstore load` brings it back")
