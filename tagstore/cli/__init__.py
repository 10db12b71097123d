"""The command line: a thin face of the library. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import logging
import os
import sys

try:
    import click
except ModuleNotFoundError:
    sys.exit("the tagstore command needs the server extra: pip install 'tagstore[server]'")

from tagstore.cli import catalog, indexing, ingest, recording, serving, upkeep
from tagstore.errors import TagstoreError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
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


for module in (ingest, recording, serving, catalog, upkeep, indexing):
    for command in module.COMMANDS:
        cli.add_command(command)


def main() -> None:
    """Entry point: errors of ours are one line on stderr and exit code 1."""
    # idle OpenMP threads that spin take the cores from FAISS, torch and each other: on few cores that costs a factor of 7
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        cli()
    except (TagstoreError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
