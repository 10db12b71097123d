"""delete, rollback, compact, verify, repair, prove-absent, takedowns, export, import: keeping a store sound, and handing it on."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import click

from tagstore.cli import options, output
from tagstore.client import parse
from tagstore.errors import InvalidInput


@click.command()
@click.argument("url")
@click.option("--key", "keys", multiple=True, metavar="K", help="Entries of these keys.")
@click.option("--sha256", "digests", multiple=True, metavar="HEX", help="Entries of images with this sha256.")
@click.option(
    "--near",
    "near",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    metavar="IMAGE",
    help="Entries that look like IMAGE.",
)
@click.option(
    "--distance",
    type=click.IntRange(0, 64),
    default=4,
    show_default=True,
    help="Bits of perceptual hash that count as alike.",
)
@click.option(
    "--where", multiple=True, metavar="FIELD=VALUE", help="Entries with this metadata; several must all fit."
)
@click.option(
    "--purge", is_flag=True, help="Remove their bytes from disk, and every version that held them, for good."
)
@click.option("--reason", default="", help="Why, for the takedown's record; needed with --purge.")
@click.option("--by", default="", help="Who, for the takedown's record; the user's name if not given.")
@options.as_json
def delete(
    url: str,
    keys: tuple[str, ...],
    digests: tuple[str, ...],
    near: tuple[str, ...],
    distance: int,
    where: tuple[str, ...],
    purge: bool,
    reason: str,
    by: str,
    as_json: bool,
) -> None:
    """Make a version without the entries that fit any of the options."""
    from tagstore.encoding.images import decode, perceptual_hash

    fields = dict(_field(text) for text in where)
    hashes = [(perceptual_hash(decode(Path(path).read_bytes())), distance) for path in near]
    if options.remote(url) and not purge:
        from tagstore.client.admin import administer

        with administer(url) as admin:
            made, gone = admin.delete(keys=keys, sha256=digests, near=hashes, where=fields)
        _deleted(parse(url)[2], made.number, made.entries, gone, as_json)
        return
    from tagstore.upkeep.edits import Selection
    from tagstore.upkeep.edits import delete as run

    root, store, _ = options.local(url)
    selection = Selection(keys, digests, hashes, fields)
    if purge:
        from tagstore.upkeep.compact import purge as run_purge

        if not reason:
            raise InvalidInput("a takedown is recorded with its reason: give --reason")
        takedown = run_purge(root, store, selection, reason=reason, who=by)
        text = f"took down {takedown.entries} entries; {store}@{takedown.version} is current, versions {takedown.versions_dropped} are gone"
        click.echo(json.dumps(asdict(takedown)) if as_json else f"{text}\n{takedown.proof}")
        return
    version, deleted = run(root, store, selection)
    _deleted(store, version.number, version.entries, deleted, as_json)


def _deleted(store: str, version: int, entries: int, keys: list[str], as_json: bool) -> None:
    text = f"deleted {len(keys)} entries: {store}@{version} has {entries}"
    click.echo(
        json.dumps({"store": store, "version": version, "entries": entries, "deleted": keys})
        if as_json
        else text
    )


def _field(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InvalidInput(f"'{text}' is no FIELD=VALUE")
    return name, value


@click.command()
@click.argument("url")
@click.argument("version", type=options.number)
def rollback(url: str, version: int) -> None:
    """Make a version that holds what an old one held."""
    made: Any
    if options.remote(url):
        from tagstore.client.admin import administer

        with administer(url) as admin:
            made, store = admin.rollback(version), parse(url)[2]
    else:
        from tagstore.upkeep.edits import rollback as run

        root, store, _ = options.local(url)
        made = run(root, store, version)
    click.echo(f"{store}@{made.number} holds what {store}@{version} held: {made.entries} entries")


@click.command()
@click.argument("url")
@click.option(
    "--keep",
    type=click.IntRange(1),
    metavar="N",
    help="Drop all but the newest N versions, this one included; all stay if not given.",
)
def compact(url: str, keep: int | None) -> None:
    """Write a store anew, without slack, its index in one file."""
    from tagstore.upkeep.compact import compact as run

    root, store, _ = options.local(url)
    before = _size(Path(root) / store)
    version = run(root, store, keep=keep)
    click.echo(
        f"{store}@{version.number}: {version.entries} entries, {before:,} -> {_size(Path(root) / store):,} bytes"
    )


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@click.command()
@click.argument("url")
@click.option("--full", is_flag=True, help="Compare every vector of the index instead of a sample.")
@options.as_json
def verify(url: str, full: bool, as_json: bool) -> None:
    """Check that a store is what was committed: exit code 1 and what is wrong, file by file, if not."""
    from tagstore.upkeep.verify import verify as run

    root, store, _ = options.local(url)
    problems = run(root, store, full=full)
    if as_json:
        click.echo(json.dumps([asdict(problem) for problem in problems]))
    elif problems:
        output.table(
            ("file", "problem", "repair can mend it"),
            [(p.file, p.what, "yes" if p.derived else "no") for p in problems],
        )
    else:
        click.echo(f"{store} is sound")
    if problems:
        sys.exit(1)


@click.command()
@click.argument("url")
def repair(url: str) -> None:
    """Make anew what is derived from the records and damaged."""
    from tagstore.upkeep.verify import repair as run

    root, store, _ = options.local(url)
    done = run(root, store)
    click.echo("\n".join(done) or f"{store} is sound: nothing to repair")


@click.command("prove-absent")
@click.argument("url")
@click.option("--key", "keys", multiple=True, metavar="K")
@click.option("--caption", "captions", multiple=True, metavar="TEXT")
@click.option(
    "--image", "images", multiple=True, type=click.Path(exists=True, dir_okay=False), metavar="IMAGE"
)
def prove_absent(url: str, keys: tuple[str, ...], captions: tuple[str, ...], images: tuple[str, ...]) -> None:
    """Search every file and record of a store, all versions and slack included: exit code 1 if anything is found.

    Of an image, its hash and its vector are searched for.
    """
    from tagstore.upkeep.compact import prove_absent as run

    root, store, _ = options.local(url)
    if not (keys or captions or images):
        raise InvalidInput("nothing to look for: give --key, --caption or --image")
    data = [Path(path).read_bytes() for path in images]
    found = run(
        root,
        store,
        keys=keys,
        captions=captions,
        images=[sha256(d).hexdigest() for d in data],
        vectors=_vectors(root, store, data),
    )
    click.echo("\n".join(found) or "nothing of it is in any file or record")
    if found:
        sys.exit(1)


def _vectors(root: str, store: str, images: list[bytes]) -> list[bytes]:
    if not images:
        return []
    import numpy as np

    from tagstore.encoding.encoder import load_encoder_of
    from tagstore.encoding.images import decode
    from tagstore.storage.store import Store

    encoder = load_encoder_of(Store(root, store).snapshot().version.fingerprint)
    return [
        row.astype(np.float16).tobytes() for row in encoder.encode_images([decode(data) for data in images])
    ]


@click.command()
@click.argument("url")
@options.as_json
def takedowns(url: str, as_json: bool) -> None:
    """What was taken down for good: when, by whom, why, and the proof."""
    from tagstore.upkeep.compact import takedowns as run

    root, store, _ = options.local(url)
    found = run(root, store)
    if as_json:
        click.echo(json.dumps([asdict(t) for t in found]))
    else:
        output.table(
            ("when", "who", "reason", "entries", "versions dropped"),
            [(t.when, t.who, t.reason, t.entries, t.versions_dropped) for t in found],
        )


@click.command()
@click.argument("url")
@click.argument("path", type=click.Path(dir_okay=False))
@click.option("--licence", default="", help="Under which the content may be used, for the manifest.")
@click.option("--note", default="", help="Anything else that the manifest should say.")
@click.option(
    "--key",
    type=click.Path(exists=True, dir_okay=False),
    metavar="PEM",
    help="Ed25519 private key to sign with.",
)
@click.option("--images", is_flag=True, help="Put the images in, read again from where they were ingested.")
@click.option(
    "--source",
    "sources",
    multiple=True,
    metavar="SRC",
    help="Where the images are, if not where they were ingested from.",
)
def export(
    url: str, path: str, licence: str, note: str, key: str | None, images: bool, sources: tuple[str, ...]
) -> None:
    """Write a version to PATH, one file: entries, vocabulary and vectors. The same version gives the same bytes."""
    from tagstore.bundles import export as run

    root, store, version = options.local(url, versioned=True)
    info = run(
        root,
        store,
        path,
        version=version,
        licence=licence,
        note=note,
        key=key,
        images=images,
        sources=sources,
    )
    click.echo(f"{path}: {info.store}@{info.version}, {info.entries} entries, sha256 {info.sha256}")


@click.command("import")
@click.argument("path", type=click.Path(exists=True, dir_okay=False))
@options.root
@click.option("--store", metavar="NAME", help="Name of the new store, if not the one it was exported from.")
@click.option(
    "--key",
    type=click.Path(exists=True, dir_okay=False),
    metavar="PEM",
    help="Take it only if this Ed25519 public key signed it.",
)
@click.option(
    "--images",
    metavar="DIR",
    help="Unpack the images to a new folder DIR, with a pairs.jsonl that lists them.",
)
def import_(path: str, root: str, store: str | None, key: str | None, images: str | None) -> None:
    """Make a store out of a bundle: all of it is verified before anything of it can be seen."""
    from tagstore.bundles import import_ as run
    from tagstore.bundles import inspect

    version = run(root, path, store=store, key=key, images=images)
    click.echo(
        f"{store or inspect(path).store}@{version.number}: {version.entries} entries, {version.unique_tags} unique tags"
    )


COMMANDS = (delete, rollback, compact, verify, repair, prove_absent, takedowns, export, import_)
