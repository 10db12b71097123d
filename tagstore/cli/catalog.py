"""stores, versions, diff, vocab, quarantine, rename, drop, undrop: what there is, and what it is called."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from tagstore.cli import options, output
from tagstore.errors import TagstoreError

if TYPE_CHECKING:
    from tagstore.mining.vocabulary import Record


@click.command()
@options.root
@options.as_json
def stores(root: str, as_json: bool) -> None:
    """The stores under a directory."""
    from tagstore.storage.store import Store, store_names

    infos = []
    for name in store_names(root):
        try:
            infos.append(Store(root, name).snapshot().info())
        except TagstoreError as error:
            click.echo(f"{name}: {error}", err=True)
    if as_json:
        click.echo(json.dumps([output.info_json(info) for info in infos]))
    elif not infos:
        click.echo(f"no stores under {root}")
    else:
        output.table(
            ("store", "version", "entries", "tags", "unique tags", "encoder", "created"),
            [
                (i.store, i.version, i.entries, i.tags, i.unique_tags, str(i.fingerprint), i.created)
                for i in infos
            ],
        )


@click.command()
@click.argument("url")
@options.as_json
def versions(url: str, as_json: bool) -> None:
    """The versions of a store, newest last."""
    found: Sequence[Any]
    if options.remote(url):
        from tagstore.client.admin import administer

        with administer(url) as admin:
            found = admin.versions()
    else:
        from tagstore.storage.store import Store

        root, store, _ = options.local(url)
        found = Store(root, store).versions()
    if as_json:
        skipped = ("pages", "ranges")
        click.echo(
            json.dumps([{k: v for k, v in asdict(version).items() if k not in skipped} for version in found])
        )
    else:
        output.table(
            ("version", "parent", "created", "operation", "entries", "unique tags", "encoder", "index"),
            [
                (
                    v.number,
                    v.parent or "",
                    v.created,
                    v.operation,
                    v.entries,
                    v.unique_tags,
                    str(v.fingerprint),
                    _index(v),
                )
                for v in found
            ],
        )


def _index(version: Any) -> str:
    """Kind of a version's index, and whether it is time to build it anew; a server does not say."""
    about: dict[str, Any] = getattr(version, "index", {})
    return str(about.get("kind", "")) + (
        " (stale: run build-index)" if about.get("stale", {}).get("rebuild") else ""
    )


@click.command()
@click.argument("url")
@click.argument("before", type=options.number)
@click.argument("after", type=options.number)
@click.option("--limit", default=20, show_default=True, help="How many of each to show.")
@options.as_json
def diff(url: str, before: int, after: int, limit: int, as_json: bool) -> None:
    """Entries and tags that differ between two versions."""
    found: Any
    if options.remote(url):
        from tagstore.client.admin import administer

        with administer(url) as admin:
            found = admin.diff(before, after)
    else:
        from tagstore.upkeep.edits import diff as run

        root, store, _ = options.local(url)
        found = run(root, store, before, after)
    if as_json:
        click.echo(json.dumps(asdict(found)))
        return
    for name in ("added", "removed", "changed"):
        keys: list[str] = getattr(found, name)
        click.echo(
            f"{len(keys)} entries {name}"
            + (f": {', '.join(keys[:limit])}" + (" ..." if len(keys) > limit else "") if keys else "")
        )
    click.echo(f"{len(found.tags)} tags changed")
    ranked = sorted(found.tags, key=lambda t: -abs(t[3] - t[2]))
    output.table(("tag", "kind", str(before), str(after)), list(ranked[:limit]))


@click.command()
@click.argument("url")
@click.option("--n", default=20, show_default=True, help="How many tags of the head and the tail to show.")
@click.option(
    "--against",
    type=options.number,
    metavar="VERSION",
    help="Show what is new and what vanished since that version.",
)
@options.as_json
def vocab(url: str, n: int, against: int | None, as_json: bool) -> None:
    """The vocabulary of a store: its head, tail and kinds."""
    from tagstore.client import connect, parse
    from tagstore.mining.vocabulary import Record, compare, summarise

    def records(at: str) -> list[Record]:
        with connect(at) as source:
            return [Record(t.text, t.kind, t.count) for t in source.vocabulary()]

    now = records(url)
    if against is not None:
        scheme, place, store, _ = parse(url)
        change = compare(records(f"{scheme}://{place}/{store}@{against}"), now)
        click.echo(
            json.dumps(asdict(change))
            if as_json
            else f"new: {_names(change.new, n)}\nvanished: {_names(change.vanished, n)}"
        )
        return
    summary = summarise(now, n)
    if as_json:
        click.echo(json.dumps(asdict(summary)))
        return
    click.echo(
        f"{len(now)} tags: " + ", ".join(f"{unique} {kind}" for kind, (unique, _) in summary.kinds.items())
    )
    output.table(("most", "kind", "entries"), [(r.text, r.kind, r.count) for r in summary.head])
    output.table(("least", "kind", "entries"), [(r.text, r.kind, r.count) for r in summary.tail])


def _names(records: Sequence[Record], n: int) -> str:
    shown = ", ".join(r.text for r in records[:n])
    return f"{len(records)}" + (f" ({shown})" if shown else "")


@click.command()
@click.argument("url")
def quarantine(url: str) -> None:
    """The pairs that were refused when a version was made, JSON Lines."""
    from tagstore.storage.store import Store

    root, store, version = options.local(url, versioned=True)
    for rejected in Store(root, store).snapshot(version).quarantine():
        click.echo(json.dumps(asdict(rejected)))


@click.command()
@click.argument("url")
@click.argument("name")
def rename(url: str, name: str) -> None:
    """Give a store another NAME."""
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


COMMANDS = (stores, versions, diff, vocab, quarantine, rename, drop, undrop)
