"""The command line of the model.

A command's module is imported at its use, so that `--help` need not wait for torch.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from typing import Any

try:
    import click
except ModuleNotFoundError:
    sys.exit("the tuna command needs the model extra: pip install 'tagstore[model]'")

from tagstore.errors import TagstoreError

COMMANDS = {
    "generate": ("generate", "Answer a question about an image."),
    "chat": ("chat", "Talk about images in the terminal."),
    "train": ("train", "Train as a recipe says."),
    "eval": ("eval", "Run a benchmark."),
    "audit": ("eval", "Measure how answers depend on tags, and follow wrong ones."),
    "explain": ("explain", "Write a page that explains an answer."),
    "serve": ("serve", "OpenAI's chat completions, with tags beside the answers."),
    "proxy": ("proxy", "Give any served model the tags of a store."),
    "prompt": ("prompt", "Write weighed tags into a prompt for any served model."),
}
"""Name -> (module of this package that has the click command of that name, its line in `--help`)."""


class _Lazy(click.Group):
    """A group that imports its commands at their use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(f"tuna_model.cli.{module}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-v", "--verbose", is_flag=True, help="Log what is done to stderr.")
@click.version_option(package_name="tagstore")
def cli(verbose: bool) -> None:
    """A multimodal model that grounds its answers in the tags of similar images.

    A model M is a preset (smol, tiny) or a directory. A store's URL is grpc://HOST:PORT/NAME,
    file://DIR/NAME, or null:// for none.
    """
    line_format = "%(asctime)s %(levelname)s %(name)s: %(message)s" if verbose else "%(message)s"
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format=line_format)


def main(arguments: list[str] | None = None) -> Any:
    """Entry point: our own errors become one line on stderr and exit code 1."""
    # idle OpenMP threads must not spin: they would take the cores from the others
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return cli(arguments)
    except (TagstoreError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
