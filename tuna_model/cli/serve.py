"""tuna serve"""

from __future__ import annotations

from typing import Any

import click

from tagstore.errors import MissingExtra
from tuna_model.cli.options import load, with_contrast, with_model


@click.command()
@with_model
@with_contrast
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True, help="0 for a free one.")
@click.option("--batch", default=8, show_default=True, help="Requests answered together.")
@click.option(
    "--wait",
    default=0.01,
    show_default=True,
    help="Seconds that a request waits for others to share its batch.",
)
@click.option(
    "--waiting",
    default=256,
    show_default=True,
    help="Requests that may wait; the next is told to come back later (429).",
)
@click.option("--grace", default=10, show_default=True, help="Seconds that requests get to end at SIGTERM.")
@click.option("--body-seconds", default=30.0, show_default=True, help="Seconds in which a body must arrive.")
@click.option(
    "--api-key",
    default="",
    envvar="TUNA_API_KEY",
    show_envvar=True,
    metavar="KEY",
    help="What callers must give. A command line can be seen by others: prefer the variable.",
)
def serve(
    model: str, store: str, host: str, port: int, batch: int, wait: float, waiting: int, grace: int,
    body_seconds: float, api_key: str, **options: Any,
) -> None:  # fmt: skip
    """Serve OpenAI's chat completions with images, streaming, and the tags beside each answer.

    The address goes to stdout.
    """
    try:
        import torch
        import uvicorn

        from tuna_model.serving.server import app
    except ModuleNotFoundError as error:
        raise MissingExtra(f"serving needs {error.name}: pip install 'tagstore[api]'") from error

    class Server(uvicorn.Server):
        """Prints its address."""

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            for server in self.servers:
                for socket in server.sockets:
                    click.echo(f"http://{host}:{socket.getsockname()[1]}/v1")

    tuna = load(model, store, **options)
    torch.seed()  # else every start samples the same answers
    served = app(
        tuna, name=model, batch=batch, wait=wait, waiting=waiting, body_seconds=body_seconds, api_key=api_key
    )
    config = uvicorn.Config(
        served, host=host, port=port, log_level="warning", timeout_graceful_shutdown=grace
    )
    Server(config).run()
