"""Options and arguments that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from tagstore.client import parse
from tagstore.errors import InvalidInput

Command = TypeVar("Command", bound=Callable[..., Any])

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
root = click.option("--root", required=True, metavar="DIR", help="Directory of the stores.")
device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N.")
stoplist = click.option(
    "--stoplist", metavar="FILE", help="Tags to leave out, one a line; by default the shipped list."
)
synonyms = click.option(
    "--synonyms", metavar="FILE", help="variant TAB preferred; by default the shipped map."
)
miner = click.option(
    "--miner",
    default="rules",
    show_default=True,
    metavar="M",
    help="Miners of captions or pictures; several as in rules+image.",
)
format_ = click.option(
    "--format",
    "format_",
    metavar="F",
    help="folder, csv, tsv, jsonl, parquet or webdataset; by default found by looking.",
)
sources = click.option(
    "--source",
    "sources",
    multiple=True,
    metavar="SRC",
    help="Where the images are, if not where they were ingested from.",
)
existing_file = click.Path(exists=True, dir_okay=False)
version_number = click.IntRange(1, (1 << 63) - 1)


def number(
    name: str,
    default: int | None,
    help: str,
    *,
    least: int = 1,
    most: int | None = None,
    metavar: str | None = None,
) -> Callable[[Command], Command]:
    """Declare an option that takes a whole number."""
    kind = click.IntRange(least, most)
    return click.option(name, type=kind, default=default, show_default=True, metavar=metavar, help=help)


def remote(url: str) -> bool:
    """Say whether a URL is a server's: then the server changes its store."""
    return parse(url)[0] in ("grpc", "grpcs")


def local(url: str, *, versioned: bool = False) -> tuple[str, str, int | None]:
    """Return (root, store, version or None) of a file:// URL.

    Raises `InvalidInput` for the URL of a server, and for a version where the store as a whole is meant.
    """
    scheme, place, store, version = parse(url)
    if version and not versioned:
        raise InvalidInput(
            f"{url} names version {version}, but this is about the store as a whole: leave @{version} out"
        )
    if scheme != "file":
        raise InvalidInput(f"{url} is a server's: run this where the store is, with file://DIR/{store}")
    return place, store, version or None
