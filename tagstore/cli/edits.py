"""Commands that change a store or its name: delete, rollback, retag, ground, reembed, rename and so on."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from tagstore.cli import options
from tagstore.client import parse
from tagstore.errors import InvalidInput


@click.command()
@click.argument("url")
@click.option("--key", "keys", multiple=True, metavar="K", help="Entries of these keys.")
@click.option("--sha256", "digests", multiple=True, metavar="HEX", help="Entries of images with this sha256.")
@click.option(
    "--near",
    "images",
    multiple=True,
    type=options.existing_file,
    metavar="IMAGE",
    help="Entries that look like IMAGE.",
)
@options.number("--distance", 4, "For --near: bits in which perceptual hashes may differ.", least=0, most=64)
@click.option("--where", multiple=True, metavar="FIELD=VALUE", help="Entries with all of this metadata.")
@click.option("--purge", is_flag=True, help="Remove their bytes too, and every version that held them.")
@click.option("--reason", default="", help="Why, for the takedown's record; required with --purge.")
@click.option(
    "--everywhere",
    is_flag=True,
    help="With --purge: remove their copies from all stores, dropped stores and bundles of the root too.",
)
@click.option("--by", default="", help="Who, for the takedown's record; by default the user's name.")
@options.as_json
def delete(
    url: str,
    keys: tuple[str, ...],
    digests: tuple[str, ...],
    images: tuple[str, ...],
    distance: int,
    where: tuple[str, ...],
    purge: bool,
    everywhere: bool,
    reason: str,
    by: str,
    as_json: bool,
) -> None:
    """Make a version without some entries.

    Entries that fit any of the options are deleted. With --purge, copies elsewhere under the root are listed;
    with --everywhere, or if you agree when asked, they are removed too, bundles as whole files.
    """
    from tagstore.encoding.images import decode, perceptual_hash

    if everywhere and not purge:
        raise InvalidInput("--everywhere is for a takedown: give --purge and --reason too")
    fields = dict(_field(text) for text in where)
    near = [(perceptual_hash(decode(Path(path).read_bytes())), distance) for path in images]
    version: Any
    if options.remote(url) and not purge:
        from tagstore.client.admin import administer

        with administer(url) as admin:
            version, deleted = admin.delete(keys=keys, sha256=digests, near=near, where=fields)
        store = parse(url)[2]
    else:
        from tagstore.upkeep.edits import Selection
        from tagstore.upkeep.edits import delete as run

        root, store, _ = options.local(url)
        selection = Selection(keys, digests, near, fields)
        if purge:
            _purge(root, store, selection, reason, by, everywhere, as_json)
            return
        version, deleted = run(root, store, selection)
    number, entries = version.number, version.entries
    if as_json:
        click.echo(json.dumps({"store": store, "version": number, "entries": entries, "deleted": deleted}))
    else:
        click.echo(f"deleted {len(deleted)} entries: {store}@{number} has {entries}")


def _purge(
    root: str, store: str, selection: Any, reason: str, by: str, everywhere: bool, as_json: bool
) -> None:
    from tagstore.bundles.root_takedown import Copy, take_down

    def consent(copies: Sequence[Copy]) -> bool:
        for copy in copies:
            keys = ", ".join(copy.keys[:5]) + (", ..." if len(copy.keys) > 5 else "")
            click.echo(f"{copy.where} holds {len(copy.keys)} the same: {keys}", err=True)
        if everywhere or as_json or not sys.stdin.isatty():
            return everywhere
        return click.confirm("Remove these too? Bundles are deleted as whole files.", err=True)

    if not reason:
        raise InvalidInput("a takedown is recorded with its reason: give --reason")
    takedown = take_down(root, store, selection, reason=reason, who=by, consent=consent)
    if as_json:
        click.echo(json.dumps(asdict(takedown)))
        return
    click.echo(
        f"took down {takedown.entries} entries; {store}@{takedown.version} is current, "
        f"versions {takedown.versions_dropped} are gone\n{takedown.proof}"
    )
    for place in takedown.removed:
        click.echo(f"removed from {place}")
    for place in takedown.left:
        click.echo(f"left: {place}")


def _field(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InvalidInput(f"'{text}' is no FIELD=VALUE")
    return name, value


@click.command()
@click.argument("url")
@click.argument("version", type=options.version_number)
def rollback(url: str, version: int) -> None:
    """Make a version that holds what an old one held."""
    current: Any
    if options.remote(url):
        from tagstore.client.admin import administer

        with administer(url) as admin:
            current, store = admin.rollback(version), parse(url)[2]
    else:
        from tagstore.upkeep.edits import rollback as run

        root, store, _ = options.local(url)
        current = run(root, store, version)
    click.echo(f"{store}@{current.number} holds what {store}@{version} held: {current.entries} entries")


@click.command()
@click.argument("url")
@options.miner
@options.stoplist
@options.synonyms
@options.number("--min-count", 1, "Leave out tags that fewer entries carry.")
def retag(url: str, miner: str, stoplist: str | None, synonyms: str | None, min_count: int) -> None:
    """Mine the stored captions again.

    Makes a version with the new tags. No image is read or embedded.
    """
    from tagstore.mining import load_rules
    from tagstore.upkeep.reprocessing import retag as run

    root, store, _ = options.local(url)
    version = run(root, store, miner=miner, vocabulary=load_rules(stoplist, synonyms, min_count))
    counts = f"{version.entries} entries, {version.tags} tags, {version.unique_tags} unique tags"
    click.echo(f"{store}@{version.number}: {counts}")


@click.command()
@click.argument("url")
@click.option("--encoder", required=True, metavar="E", help="mini, NAME/PRETRAINED or local-dir:PATH.")
@options.sources
@options.device
def reembed(url: str, encoder: str, sources: tuple[str, ...], device: str) -> None:
    """Embed the original images with another encoder.

    Makes a version with the new vectors; the old one is served until then.
    """
    from tagstore.upkeep.reprocessing import reembed as run

    root, store, _ = options.local(url)
    version = run(root, store, encoder, sources=sources, device=device)
    click.echo(f"{store}@{version.number}: {version.entries} entries, vectors of {version.fingerprint}")


@click.command()
@click.argument("url")
def ground(url: str) -> None:
    """Learn the tags' embeddings from the store's own pictures.

    Makes a version in which the relevance of a tag says how much a picture looks like those that carry it.
    Later ingests and retags learn them anew; `rollback` goes back to the words of the tags.
    """
    from tagstore.upkeep.reprocessing import ground as run

    root, store, _ = options.local(url)
    version = run(root, store)
    learnt = f"{version.unique_tags} tags learnt from {version.entries} pictures"
    click.echo(f"{store}@{version.number}: {learnt}")


@click.command()
@click.argument("url")
@click.argument("name")
def rename(url: str, name: str) -> None:
    """Give a store another name."""
    from tagstore.upkeep.edits import rename as run

    root, store, _ = options.local(url)
    run(root, store, name)
    click.echo(f"{store} is {name} now")


@click.command()
@click.argument("url")
def drop(url: str) -> None:
    """Take a store away; undrop brings it back for a week."""
    from tagstore.upkeep.edits import drop as run

    root, store, _ = options.local(url)
    days = run(root, store)
    click.echo(f"dropped {store}; `tagstore undrop {url}` brings it back within {days:g} days")


@click.command()
@click.argument("url")
def undrop(url: str) -> None:
    """Bring back a store that was dropped."""
    from tagstore.upkeep.edits import undrop as run

    root, store, _ = options.local(url)
    run(root, store)
    click.echo(f"{store} is back")
