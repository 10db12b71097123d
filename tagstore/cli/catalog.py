"""Commands that look at stores: stores, info, versions, diff, vocab, quarantine."""

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
    """List the stores under a directory."""
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
            (
                (i.store, i.version, i.entries, i.tags, i.unique_tags, str(i.fingerprint), i.created)
                for i in infos
            ),
        )


@click.command()
@click.argument("url")
@options.as_json
def info(url: str, as_json: bool) -> None:
    """Show the counts, fingerprint and index of a version."""
    from tagstore.client import connect

    with connect(url) as source:
        values = output.info_json(source.info())
    if as_json:
        click.echo(json.dumps(values))
    else:
        rows = ((name, json.dumps(v) if isinstance(v, dict) else v) for name, v in values.items())
        output.table(("", url), rows)


@click.command()
@click.argument("url")
@options.as_json
def versions(url: str, as_json: bool) -> None:
    """List the versions of a store, newest last."""
    infos: Sequence[Any]
    if options.remote(url):
        from tagstore.client.admin import administer

        with administer(url) as admin:
            infos = admin.versions()
    else:
        from tagstore.storage.store import Store

        root, store, _ = options.local(url)
        infos = Store(root, store).versions()
    if as_json:
        skipped = ("pages", "ranges")
        click.echo(json.dumps([{k: v for k, v in asdict(i).items() if k not in skipped} for i in infos]))
        return
    output.table(
        ("version", "parent", "created", "operation", "entries", "unique tags", "encoder", "index"),
        (
            (
                v.number,
                v.parent or "",
                v.created,
                v.operation,
                v.entries,
                v.unique_tags,
                str(v.fingerprint),
                _index_state(v),
            )
            for v in infos
        ),
    )


def _index_state(version: Any) -> str:
    """Name the kind of a version's index, and say if it should be rebuilt; a server tells neither."""
    index: dict[str, Any] = getattr(version, "index", {})
    stale = " (stale: run build-index)" if index.get("stale", {}).get("rebuild") else ""
    return f"{index.get('kind', '')}{stale}"


@click.command()
@click.argument("url")
@click.argument("before", type=options.version_number)
@click.argument("after", type=options.version_number)
@click.option("--limit", default=20, show_default=True, help="Keys and tags to show.")
@options.as_json
def diff(url: str, before: int, after: int, limit: int, as_json: bool) -> None:
    """Compare the entries and tags of two versions."""
    difference: Any
    if options.remote(url):
        from tagstore.client.admin import administer

        with administer(url) as admin:
            difference = admin.diff(before, after)
    else:
        from tagstore.upkeep.edits import diff as run

        root, store, _ = options.local(url)
        difference = run(root, store, before, after)
    if as_json:
        click.echo(json.dumps(asdict(difference)))
        return
    for name in ("added", "removed", "changed"):
        keys: list[str] = getattr(difference, name)
        listed = f": {', '.join(keys[:limit])}" if keys else ""
        click.echo(f"{len(keys)} entries {name}{listed}{' ...' if len(keys) > limit else ''}")
    click.echo(f"{len(difference.tags)} tags changed")
    ranked = sorted(difference.tags, key=lambda tag: -abs(tag[3] - tag[2]))
    output.table(("tag", "kind", str(before), str(after)), ranked[:limit])


@click.command()
@click.argument("url")
@click.option("--n", default=20, show_default=True, help="Tags of the head and the tail to show.")
@click.option(
    "--against",
    type=options.version_number,
    metavar="VERSION",
    help="Show what is new and what vanished since that version.",
)
@options.as_json
def vocab(url: str, n: int, against: int | None, as_json: bool) -> None:
    """Show a store's vocabulary: its head, tail and kinds."""
    from tagstore.client import connect, parse
    from tagstore.mining.vocabulary import Record, compare, summarise

    def read(url: str) -> list[Record]:
        with connect(url) as source:
            return [Record(t.text, t.kind, t.count) for t in source.vocabulary()]

    records = read(url)
    if against is not None:
        scheme, place, store, _ = parse(url)
        change = compare(read(f"{scheme}://{place}/{store}@{against}"), records)
        if as_json:
            click.echo(json.dumps(asdict(change)))
        else:
            click.echo(f"new: {_summary(change.new, n)}\nvanished: {_summary(change.vanished, n)}")
        return
    summary = summarise(records, n)
    if as_json:
        click.echo(json.dumps(asdict(summary)))
        return
    kinds = ", ".join(f"{unique} {kind}" for kind, (unique, _) in summary.kinds.items())
    click.echo(f"{len(records)} tags: {kinds}")
    output.table(("most", "kind", "entries"), ((r.text, r.kind, r.count) for r in summary.head))
    output.table(("least", "kind", "entries"), ((r.text, r.kind, r.count) for r in summary.tail))


def _summary(records: Sequence[Record], n: int) -> str:
    texts = ", ".join(r.text for r in records[:n])
    return f"{len(records)} ({texts})" if texts else str(len(records))


@click.command()
@click.argument("url")
def quarantine(url: str) -> None:
    """List the pairs that a version refused, with reasons.

    One JSON object a line.
    """
    from tagstore.storage.store import Store

    root, store, version = options.local(url, versioned=True)
    for rejected in Store(root, store).snapshot(version).quarantine():
        click.echo(json.dumps(asdict(rejected)))
