"""tuna proxy"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tagstore.errors import InvalidInput, MissingExtra

STYLES = ("list", "candidates", "weights", "words")
SIGNALS = ("relevance", "similarity", "vote_share")


@click.command()
@click.option(
    "--upstream",
    "upstreams",
    multiple=True,
    metavar="[MODEL=]URL",
    help="The server that answers, up to and including /v1; several by model, the first has all others.",
)
@click.option(
    "--store",
    "stores",
    multiple=True,
    metavar="[NAME=]URL",
    help="Where tags come from; several by name, the first is the default.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="TOML file instead of the options from --upstream to --cache-seconds.",
)
@click.option(
    "--style",
    type=click.Choice(STYLES),
    default="list",
    show_default=True,
    help="How tags are written. candidates: the answer is one of them.",
)
@click.option(
    "--place",
    type=click.Choice(("user", "system")),
    default="user",
    show_default=True,
    help="Which turn they are written into.",
)
@click.option("--template", default="", metavar="TEXT", help="Instead of the style's words, with {tags}.")
@click.option(
    "--signal",
    type=click.Choice(SIGNALS),
    default="relevance",
    show_default=True,
    help="Which tags are the best.",
)
@click.option("--max-tags", default=10, show_default=True, help="Tags of a picture, at most.")
@click.option(
    "--threshold",
    default=0.0,
    show_default=True,
    help="Leave out tags with less than this share of the best one's weight.",
)
@click.option("--ban", multiple=True, metavar="TAG", help="A tag that is never given.")
@click.option(
    "--text-only", is_flag=True, help="Leave the pictures out of what is forwarded: for a model without eyes."
)
@click.option("--neighbours", default=10, show_default=True, help="Similar images to take tags from.")
@click.option(
    "--deadline",
    default=1.0,
    show_default=True,
    help="Seconds that the store has; then a request goes on without tags.",
)
@click.option(
    "--cache-seconds",
    default=10.0,
    show_default=True,
    help="Seconds for which answers of the store are kept.",
)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8001, show_default=True, help="0 for a free one.")
@click.option(
    "--connections",
    default=1024,
    show_default=True,
    help="Requests under way; the next is told to come back later (503).",
)
@click.option("--grace", default=10, show_default=True, help="Seconds that requests get to end at SIGTERM.")
def proxy(
    upstreams: tuple[str, ...], stores: tuple[str, ...], config: Path | None, neighbours: int,
    deadline: float, cache_seconds: float, host: str, port: int, connections: int, grace: int, **style: Any,
) -> None:  # fmt: skip
    """Give the tags of a store to any model that is served with OpenAI's or Anthropic's API.

    Clients use the printed address in place of the model's. Requests with pictures get the tags of similar
    images; everything else passes as it is, and so do they where the store is down or late.
    """
    try:
        import uvicorn

        from tuna_model.proxy.server import app
        from tuna_model.proxy.settings import ProxySettings
    except ModuleNotFoundError as error:
        raise MissingExtra(f"the proxy needs {error.name}: pip install 'tagstore[api]'") from error
    if config is not None:
        if upstreams or stores:
            raise click.UsageError("--config names upstreams and stores: give it alone")
        settings = ProxySettings.read(config)
    elif not (upstreams and stores):
        raise click.UsageError("name the server with --upstream and the store with --store, or give --config")
    else:
        named = [_split(text) for text in upstreams]
        values: dict[str, Any] = {
            "upstreams": [{"url": url, "models": [name] if name else []} for name, url in named],
            "stores": {
                name or f"store{number}": url for number, (name, url) in enumerate(map(_split, stores), 1)
            },
            "tags": style,
            "neighbours": neighbours,
            "deadline": deadline,
            "cache_seconds": cache_seconds,
        }
        if len(values["stores"]) != len(stores):
            raise InvalidInput("two stores have one name")
        settings = ProxySettings.of(values, "command line")

    class Server(uvicorn.Server):
        """Prints its address."""

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            for server in self.servers:
                for socket in server.sockets:
                    click.echo(f"http://{host}:{socket.getsockname()[1]}/v1")

    Server(
        uvicorn.Config(
            app(settings),
            host=host,
            port=port,
            log_level="warning",
            timeout_graceful_shutdown=grace,
            limit_concurrency=connections,
        )
    ).run()


def _split(text: str) -> tuple[str, str]:
    """NAME=URL, or a URL alone, which may hold = itself."""
    name, equals, url = text.partition("=")
    return (name, url) if equals and "/" not in name else ("", text)
