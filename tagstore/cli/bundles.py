"""Commands that hand a version on as one file: export, import."""

from __future__ import annotations

import click

from tagstore.cli import options


@click.command()
@click.argument("url")
@click.argument("path", type=click.Path(dir_okay=False))
@click.option("--licence", default="", help="Under which the content may be used, for the manifest.")
@click.option("--note", default="", help="Anything else that the manifest should say.")
@click.option("--key", type=options.existing_file, metavar="PEM", help="Ed25519 private key to sign with.")
@click.option("--images", is_flag=True, help="Include the images, read again from where they were ingested.")
@options.sources
def export(
    url: str, path: str, licence: str, note: str, key: str | None, images: bool, sources: tuple[str, ...]
) -> None:
    """Write a version to one file: entries, tags, vectors.

    The same version gives the same bytes.
    """
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
@click.argument("path", type=options.existing_file)
@options.root
@click.option("--store", metavar="NAME", help="Name of the new store; by default the exported one's.")
@click.option(
    "--key", type=options.existing_file, metavar="PEM", help="Ed25519 public key that must have signed it."
)
@click.option("--images", metavar="DIR", help="Unpack the images to a new folder, listed in pairs.jsonl.")
def import_(path: str, root: str, store: str | None, key: str | None, images: str | None) -> None:
    """Make a store from an exported file.

    All of it is verified before any of it can be seen.
    """
    from tagstore.bundles import import_ as run
    from tagstore.bundles import inspect

    version = run(root, path, store=store, key=key, images=images)
    name = store or inspect(path).store
    click.echo(f"{name}@{version.number}: {version.entries} entries, {version.unique_tags} unique tags")
