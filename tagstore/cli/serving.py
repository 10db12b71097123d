"""serve, query, stats, load, unload: servers, and what is asked of them."""

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
@click.option(
    "--workers", type=click.IntRange(1), help="Processes that serve; one for every two cores if not given."
)
@click.option(
    "--tls-certificate",
    default="",
    metavar="PEM",
    help="The server's certificate chain; read again when it changes.",
)
@click.option("--tls-key", default="", metavar="PEM", help="Its key.")
@click.option(
    "--tls-client-ca", default="", metavar="PEM", help="Ask every client for a certificate of this authority."
)
@click.option(
    "--tokens",
    default="",
    metavar="FILE",
    help="Callers and their rights, JSON; TAGSTORE_TOKENS if not given.",
)
@click.option(
    "--anonymous",
    type=click.Choice(["read", "ingest", "admin"]),
    help="What callers without a token may do on every store.",
)
@click.option(
    "--insecure", is_flag=True, help="Listen where other machines can reach it, without encryption or tokens."
)
@click.option("--audit", default="", metavar="FILE", help="Append writes and refusals, JSON Lines.")
@click.option("--metrics", default="", metavar="HOST:PORT", help="Answer Prometheus there.")
@click.option(
    "--tracing", is_flag=True, help="Send spans to an OpenTelemetry collector (OTEL_EXPORTER_OTLP_ENDPOINT)."
)
@click.option("--json-logs", is_flag=True, help="Log JSON, one object a line.")
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Threads of a worker for all but searches.",
)
@click.option(
    "--max-in-flight",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Calls in hand of a worker; more are refused.",
)
@click.option(
    "--max-per-client",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Calls in hand of one client.",
)
@click.option(
    "--max-message",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    metavar="MIB",
    help="Size of a request or an answer.",
)
@click.option(
    "--max-image",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    metavar="MIB",
    help="Size of one encoded image.",
)
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
    **given: Any,
) -> None:
    """Serve all stores under a directory; prints HOST:PORT when ready. Ctrl-C and SIGTERM finish what is in flight."""
    from tagstore.serving.settings import Limits, Settings, default_workers
    from tagstore.serving.signals import Runs, run

    limits = Limits(
        threads=threads,
        in_flight=max_in_flight,
        per_client=max_per_client,
        message_bytes=max_message << 20,
        image_bytes=max_image << 20,
    )
    settings = Settings(workers=workers or default_workers(), limits=limits, **given)
    if settings.json_logs:
        from tagstore.serving.logs import use_json

        use_json()
    server: Runs
    if settings.workers > 1:
        from tagstore.serving.workers import Supervisor

        server = Supervisor(root, address, device=device, settings=settings)
    else:
        from tagstore.serving.server import Server

        server = Server(root, address, device=device, settings=settings)
    run(server, click.echo)


@click.command()
@click.argument("url")
@click.argument("images", nargs=-1, metavar="IMAGE...")
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="TEXT",
    help="Ask in words what the pictures should show; may be given repeatedly.",
)
@click.option(
    "--k", type=click.IntRange(1, 1000), default=5, show_default=True, help="Neighbours of each query."
)
@click.option(
    "--max-tags", type=click.IntRange(0), default=0, help="At most so many tags of each query; 0 for all."
)
@options.as_json
def query(
    url: str, images: tuple[str, ...], texts: tuple[str, ...], k: int, max_tags: int, as_json: bool
) -> None:
    """Tags of the entries nearest to each IMAGE, then to each TEXT."""
    from tagstore.client import connect

    if not (images or texts):
        raise click.UsageError("nothing is asked: give an IMAGE, or --text TEXT")
    failed = False
    with connect(url) as source:
        source.info()
        for kind, asked in [("image", image) for image in images] + [("text", text) for text in texts]:
            try:
                [retrieval] = source.retrieve(
                    [asked] if kind == "image" else (),
                    captions=[asked] if kind == "text" else (),
                    k=k,
                    max_tags=max_tags,
                )
            except (InvalidInput, NotFound) as error:
                # this query only: the others may be fine
                click.echo(f"{asked}: {error}", err=True)
                failed = True
                continue
            if as_json:
                click.echo(json.dumps({kind: asked, **output.retrieval_json(retrieval)}))
            else:
                output.print_retrieval(asked, retrieval)
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


@click.command()
@click.argument("url")
def load(url: str) -> None:
    """Have a server serve a store: one that was unloaded, or that came since the server started."""
    from tagstore.client.admin import administer

    with administer(url) as admin:
        info = admin.load()
    click.echo(f"{info.store}@{info.version} is served: {info.entries} entries")


@click.command()
@click.argument("url")
def unload(url: str) -> None:
    """Have a server serve a store no more, and give its memory back. The store's files stay as they are."""
    from tagstore.client.admin import administer

    with administer(url) as admin:
        admin.unload()
    click.echo("unloaded; `tagstore load` brings it back")


COMMANDS = (serve, query, stats, load, unload)
