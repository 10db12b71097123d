"""The command line: a thin face of the library. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

try:
    import click
except ModuleNotFoundError:
    sys.exit("the tagstore command needs the server extra: pip install 'tagstore[server]'")

from tagstore.errors import InvalidInput, TagstoreError

if TYPE_CHECKING:
    from tagstore.builder import Advance, Report
    from tagstore.types import Retrieval, StoreInfo

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs instead of a table for people.")
root_option = click.option("--root", required=True, metavar="DIR", help="Directory of the stores.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-v", "--verbose", is_flag=True, help="Log what is done to stderr.")
@click.version_option(package_name="tagstore")
def cli(verbose: bool) -> None:
    """A datastore that maps images to the tags of similar images.

    URL is grpc://HOST:PORT/NAME for a server, file://DIR/NAME for a directory; NAME@7 is version 7.
    """
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


@cli.command()
@click.argument("source")
@root_option
@click.option("--store", required=True, metavar="NAME", help="Store to add to; it is made if it isn't there.")
@click.option("--format", "format_", metavar="F", help="folder, csv, tsv, jsonl, parquet or webdataset; found by looking if not given.")
@click.option("--encoder", metavar="E", help="mini, NAME/PRETRAINED or local-dir:PATH; the store's own, or mini, if not given.")
@click.option("--miner", default="rules", show_default=True, metavar="M", help="What makes tags of captions; none for none.")
@click.option("--image-column", metavar="C", help="Column with the image or its path.")
@click.option("--caption-column", metavar="C", multiple=True, help="Column with captions; may be given several times.")
@click.option("--key-column", metavar="C", help="Column with the unique key.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N.")
@as_json
def ingest(
    source: str,
    root: str,
    store: str,
    format_: str | None,
    encoder: str | None,
    miner: str,
    image_column: str | None,
    caption_column: tuple[str, ...],
    key_column: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Make a version of a store out of SOURCE.

    SOURCE is a folder of images with same-name .txt files, a CSV, TSV, JSON Lines or Parquet file, or WebDataset .tar shards; globs and
    brace patterns are understood (quote them). A pair that can't be used is quarantined with its reason, the rest goes on.
    """
    from tagstore.builder import ingest as run
    from tagstore.readers import Columns

    with _progress(source) as progress:
        report = run(
            source,
            root=root,
            store=store,
            format=format_,
            columns=Columns(image=image_column, caption=caption_column, key=key_column),
            encoder=encoder,
            miner=miner,
            device=device,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps(asdict(report)))
    else:
        _print_report(report)


@cli.command()
@root_option
@click.option("--address", default="127.0.0.1:50051", show_default=True, metavar="HOST:PORT", help="Port 0 picks a free one.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N.")
@click.option("--threads", default=8, show_default=True, help="Requests answered at a time.")
@click.option("--insecure", is_flag=True, help="Listen where other machines can reach it, without encryption or tokens.")
def serve(root: str, address: str, device: str, threads: int, insecure: bool) -> None:
    """Serve all stores under a directory; prints HOST:PORT when ready. Ctrl-C and SIGTERM finish what is in flight."""
    from tagstore.server import Server

    Server(root, address, device=device, threads=threads, insecure=insecure).run(lambda at: click.echo(at))


@cli.command()
@click.argument("url")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--k", type=click.IntRange(1, 1000), default=5, show_default=True, help="Neighbours of each image.")
@click.option("--max-tags", type=click.IntRange(0), default=0, help="At most so many tags of each image; 0 for all.")
@as_json
def query(url: str, images: tuple[str, ...], k: int, max_tags: int, as_json: bool) -> None:
    """Tags of the entries nearest to each IMAGE."""
    from tagstore.client import connect

    failed = False
    with connect(url) as source:
        for image in images:
            try:
                [retrieval] = source.retrieve([image], k=k, max_tags=max_tags)
            except InvalidInput as error:
                # this picture only: the others may be fine
                click.echo(f"{image}: {error}", err=True)
                failed = True
                continue
            if as_json:
                click.echo(json.dumps({"image": image, **_retrieval_json(retrieval)}, ensure_ascii=False))
            else:
                _print_retrieval(image, retrieval)
    if failed:
        sys.exit(1)


@cli.command()
@click.argument("file", type=click.File("r", encoding="utf-8", errors="replace"))
@click.option("--miner", default="rules", show_default=True, metavar="M", help="What makes tags of captions.")
@as_json
def mine(file: Any, miner: str, as_json: bool) -> None:
    """Tags of captions: one caption a line of FILE, or of standard input for -."""
    from tagstore.mining import mine as run

    captions: list[str] = []

    def lines() -> Iterator[str]:
        for line in file:
            captions.append(line.rstrip("\r\n"))
            yield captions[-1]

    # tags come in order, a batch behind the captions that were read for them
    for tags in run(lines(), miner):
        caption = captions.pop(0)
        if as_json:
            found = [{"text": t.text, "kind": t.kind, "span": list(t.span), "score": round(t.score, 3)} for t in tags]
            click.echo(json.dumps({"caption": caption, "tags": found}, ensure_ascii=False))
        else:
            click.echo(f"{caption}\n    " + (", ".join(f"{t.text} ({t.kind})" for t in tags) or "no tags"))


@cli.command()
@root_option
@as_json
def stores(root: str, as_json: bool) -> None:
    """The stores under a directory."""
    from tagstore.store import Store, store_names

    infos = [Store(root, name).snapshot().info() for name in store_names(root)]
    if as_json:
        click.echo(json.dumps([_info_json(info) for info in infos]))
    elif not infos:
        click.echo(f"no stores under {root}")
    else:
        _table(
            ("store", "version", "entries", "tags", "unique tags", "encoder", "created"),
            [(i.store, i.version, i.entries, i.tags, i.unique_tags, str(i.fingerprint), i.created) for i in infos],
        )


@cli.command()
@click.argument("url")
@as_json
def stats(url: str, as_json: bool) -> None:
    """What a store holds: counts, fingerprint, index."""
    from tagstore.client import connect

    with connect(url) as source:
        value = _info_json(source.info())
    if as_json:
        click.echo(json.dumps(value))
    else:
        _table(("", url), [(k, json.dumps(v) if isinstance(v, dict) else v) for k, v in value.items()])


def _retrieval_json(retrieval: Retrieval) -> dict[str, Any]:
    return {
        "store": retrieval.store,
        "version": retrieval.version,
        "neighbours": [{"key": n.key, "entry_id": n.entry_id, "similarity": round(n.similarity, 6)} for n in retrieval.neighbours],
        "tags": [
            {
                "tag": t.tag,
                "kind": t.kind,
                "similarity": round(t.similarity, 6),
                "votes": t.votes,
                "relevance": round(t.relevance, 6),
                "neighbours": list(t.neighbours),
            }
            for t in retrieval.tags
        ],
    }


def _info_json(info: StoreInfo) -> dict[str, Any]:
    return {**asdict(info), "fingerprint": {**asdict(info.fingerprint), "digest": info.fingerprint.digest}, "index": dict(info.index)}


def _print_report(report: Report) -> None:
    s = report.seconds
    click.echo(f"{report.store}@{report.version}: {report.entries} entries, {report.tags} tags, {report.unique_tags} unique tags")
    click.echo(f"read {report.pairs} pairs: {report.added} added, {report.unchanged} unchanged, {sum(report.reasons.values())} quarantined")
    for reason, count in sorted(report.reasons.items(), key=lambda item: -item[1])[:10]:
        example = next((r for r in report.quarantined if r.reason.startswith(reason)), None)
        click.echo(f"  {count} x {reason}" + (f", for example {example.key}: {example.reason}" if example else ""))
    click.echo("seconds: " + ", ".join(f"{stage} {spent:.1f}" for stage, spent in s.items()))


def _print_retrieval(image: str, retrieval: Retrieval) -> None:
    click.echo(f"{image}  ({retrieval.store}@{retrieval.version})")
    _table(("neighbour", "similarity"), [(n.key, f"{n.similarity:.3f}") for n in retrieval.neighbours])
    _table(
        ("tag", "kind", "votes", "similarity", "relevance"),
        [(t.tag, t.kind, t.votes, f"{t.similarity:.3f}", f"{t.relevance:.3f}") for t in retrieval.tags],
    )


def _table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row))
    Console(soft_wrap=False).print(table)


@contextmanager
def _progress(source: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=None, rate="")
            bar.advance(tasks[stage], done)
            task = bar.tasks[tasks[stage]]
            bar.update(tasks[stage], rate=f"{task.completed / max(task.elapsed or 0, 1e-6):.0f}/s")

        yield advance


def main() -> None:
    """Entry point: errors of ours are one line on stderr and exit code 1."""
    # idle OpenMP threads that spin take the cores from FAISS, torch and each other: on few cores that costs a factor of 7
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        cli()
    except TagstoreError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
