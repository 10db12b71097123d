"""Commands that keep a store sound: verify, repair, compact, takedowns, prove-absent."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import click

from tagstore.cli import options, output
from tagstore.errors import InvalidInput


@click.command()
@click.argument("url")
@click.option("--full", is_flag=True, help="Compare every vector of the index instead of a sample.")
@options.as_json
def verify(url: str, full: bool, as_json: bool) -> None:
    """Compare a store with its checksums.

    Exit code 1 if it is damaged; what is wrong is listed file by file.
    """
    from tagstore.upkeep.verify import verify as run

    root, store, _ = options.local(url)
    problems = run(root, store, full=full)
    if as_json:
        click.echo(json.dumps([asdict(problem) for problem in problems]))
    elif problems:
        columns = ("file", "problem", "repair can mend it")
        output.table(columns, ((p.file, p.what, "yes" if p.derived else "no") for p in problems))
    else:
        click.echo(f"{store} is sound")
    if problems:
        sys.exit(1)


@click.command()
@click.argument("url")
def repair(url: str) -> None:
    """Rebuild what is derived from the records and damaged."""
    from tagstore.upkeep.verify import repair as run

    root, store, _ = options.local(url)
    repairs = run(root, store)
    click.echo("\n".join(repairs) or f"{store} is sound: nothing to repair")


@click.command()
@click.argument("url")
@options.number("--keep", None, "Drop all but the newest N versions; by default all stay.", metavar="N")
def compact(url: str, keep: int | None) -> None:
    """Rewrite a store without slack, its index in one file."""
    from tagstore.upkeep.compact import compact as run

    root, store, _ = options.local(url)
    before = _bytes_in(Path(root) / store)
    version = run(root, store, keep=keep)
    after = _bytes_in(Path(root) / store)
    click.echo(f"{store}@{version.number}: {version.entries} entries, {before:,} -> {after:,} bytes")


def _bytes_in(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@click.command()
@click.argument("url")
@options.as_json
def takedowns(url: str, as_json: bool) -> None:
    """List what was taken down: when, by whom, why."""
    from tagstore.upkeep.takedown import takedowns as run

    root, store, _ = options.local(url)
    records = run(root, store)
    if as_json:
        click.echo(json.dumps([asdict(t) for t in records]))
    else:
        columns = ("when", "who", "reason", "entries", "versions dropped")
        output.table(columns, ((t.when, t.who, t.reason, t.entries, t.versions_dropped) for t in records))


@click.command("prove-absent")
@click.argument("url")
@click.option("--key", "keys", multiple=True, metavar="K")
@click.option("--caption", "captions", multiple=True, metavar="TEXT")
@click.option("--image", "images", multiple=True, type=options.existing_file, metavar="IMAGE")
def prove_absent(url: str, keys: tuple[str, ...], captions: tuple[str, ...], images: tuple[str, ...]) -> None:
    """Search every file and record for what was deleted.

    All versions and slack are searched; for an image, its hash and its vector. Exit code 1 if anything is
    left.
    """
    from tagstore.upkeep.takedown import prove_absent as run

    root, store, _ = options.local(url)
    if not (keys or captions or images):
        raise InvalidInput("nothing to look for: give --key, --caption or --image")
    encoded = [Path(path).read_bytes() for path in images]
    digests = [sha256(image).hexdigest() for image in encoded]
    vectors = _stored_vectors(root, store, encoded)
    places = run(root, store, keys=keys, captions=captions, images=digests, vectors=vectors)
    click.echo("\n".join(places) or "nothing of it is in any file or record")
    if places:
        sys.exit(1)


def _stored_vectors(root: str, store: str, images: list[bytes]) -> list[bytes]:
    """Embed images as the store's encoder does, and return the bytes that the store would hold."""
    if not images:
        return []
    import numpy as np

    from tagstore.encoding.encoder import load_encoder_of
    from tagstore.encoding.images import decode
    from tagstore.storage.store import Store

    encoder = load_encoder_of(Store(root, store).snapshot().version.fingerprint)
    vectors = encoder.encode_images([decode(image) for image in images])
    return [row.astype(np.float16).tobytes() for row in vectors]
