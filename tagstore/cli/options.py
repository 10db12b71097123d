"""Options that several commands share."""

from __future__ import annotations

import click

from tagstore.client import parse
from tagstore.errors import InvalidInput

as_json = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON for programs instead of a table for people."
)
root = click.option("--root", required=True, metavar="DIR", help="Directory of the stores.")
device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N.")


stoplist = click.option(
    "--stoplist", metavar="FILE", help="Tags to leave out, one a line; the shipped list if not given."
)
synonyms = click.option(
    "--synonyms", metavar="FILE", help="variant TAB preferred; the shipped map if not given."
)
miner = click.option(
    "--miner",
    default="rules",
    show_default=True,
    metavar="M",
    help="What makes tags of captions; several as in rules+metadata.",
)
number = click.IntRange(1, (1 << 63) - 1)


def remote(url: str) -> bool:
    """Whether a URL is a server's: then what is done to its store is done there."""
    return parse(url)[0] in ("grpc", "grpcs")


def local(url: str, *, versioned: bool = False) -> tuple[str, str, int | None]:
    """(root, store, version or None) of a file:// URL.

    Raises `InvalidInput` for a server's, whose stores are changed where they are, and for a version where the store as a whole is meant.
    """
    scheme, place, store, version = parse(url)
    if version and not versioned:
        raise InvalidInput(
            f"{url} names version {version}, but this is about the store as a whole: leave @{version} out"
        )
    if scheme != "file":
        raise InvalidInput(f"{url} is a server's: run this where the store is, with file://DIR/{store}")
    return place, store, version or None
