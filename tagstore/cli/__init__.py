"""The command line: a thin layer over the library. A command imports heavy modules when it runs."""

from __future__ import annotations

import logging
import os
import sys

try:
    import click
except ModuleNotFoundError:
    sys.exit("the tagstore command needs the server extra: pip install 'tagstore[server]'")

from tagstore.cli import bundles, catalog, edits, indexing, ingest, pairs, recording, serving, upkeep
from tagstore.errors import TagstoreError

COMMANDS: dict[str, tuple[click.Command, ...]] = {
    "Make a store": (ingest.ingest, ingest.mine, indexing.build_index),
    "Look at it": (
        catalog.stores, catalog.info, catalog.versions, catalog.diff, catalog.vocab, catalog.quarantine
    ),
    "Serve and query it": (serving.serve, serving.query, serving.load, serving.unload),
    "Change it": (
        edits.delete, edits.rollback, edits.retag, edits.ground, edits.reembed, edits.rename, edits.drop,
        edits.undrop
    ),
    "Keep it sound": (
        upkeep.verify, upkeep.repair, upkeep.compact, upkeep.takedowns, upkeep.prove_absent
    ),
    "Hand it on": (
        bundles.export, bundles.import_, recording.record, recording.verify_map, pairs.pairs
    ),
}  # fmt: skip
"""All commands, by job, in the order of `--help`."""
FORMER_NAMES = {"stats": "info"}
"""Former names of commands, which still work."""


class CommandsByJob(click.Group):
    """A group whose `--help` lists the commands by job."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, FORMER_NAMES.get(cmd_name, cmd_name))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        for job, commands in COMMANDS.items():
            with formatter.section(job):
                formatter.write_dl(
                    [(f"{c.name:{width}}", c.get_short_help_str(80 - width)) for c in commands]
                )


@click.group(cls=CommandsByJob, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-v", "--verbose", is_flag=True, help="Log what is done to stderr.")
@click.version_option(package_name="tagstore")
def cli(verbose: bool) -> None:
    """A datastore that maps images to the tags of similar images.

    URL is grpc://HOST:PORT/NAME for a server, file://DIR/NAME for a directory; NAME@7 is version 7.
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )


for command in (command for commands in COMMANDS.values() for command in commands):
    cli.add_command(command)


def main() -> None:
    """Run a command. An error of the library is one line on stderr and exit code 1."""
    # idle OpenMP threads that spin take the cores from FAISS and torch: up to 7 times slower on few cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        cli()
    except (TagstoreError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
