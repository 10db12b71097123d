"""What commands print: tables for people, JSON for programs, progress on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tagstore.client.admin import Ingested
    from tagstore.ingest import Advance, Report
    from tagstore.types import Retrieval, StoreInfo


def retrieval_json(retrieval: Retrieval) -> dict[str, Any]:
    return {
        "store": retrieval.store,
        "version": retrieval.version,
        "neighbours": [
            {"key": n.key, "entry_id": n.entry_id, "similarity": round(n.similarity, 6)}
            for n in retrieval.neighbours
        ],
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


def info_json(info: StoreInfo) -> dict[str, Any]:
    return {
        **asdict(info),
        "fingerprint": {**asdict(info.fingerprint), "digest": info.fingerprint.digest},
        "index": dict(info.index),
    }


def print_report(report: Report | Ingested) -> None:
    s = report.seconds
    click.echo(
        f"{report.store}@{report.version}: {report.entries} entries, {report.tags} tags, {report.unique_tags} unique tags"
    )
    click.echo(
        f"read {report.pairs} pairs: {report.added} added, {report.unchanged} unchanged, {sum(report.reasons.values())} quarantined"
    )
    for reason, count in sorted(report.reasons.items(), key=lambda item: -item[1])[:10]:
        example = next((r for r in report.quarantined if r.reason.startswith(reason)), None)
        click.echo(
            f"  {count} x {reason}" + (f", for example {example.key}: {example.reason}" if example else "")
        )
    if s:
        click.echo("seconds: " + ", ".join(f"{stage} {spent:.1f}" for stage, spent in s.items()))


def print_retrieval(asked: str, retrieval: Retrieval) -> None:
    click.echo(f"{asked}  ({retrieval.store}@{retrieval.version})")
    table(("neighbour", "similarity"), [(n.key, f"{n.similarity:.3f}") for n in retrieval.neighbours])
    table(
        ("tag", "kind", "votes", "similarity", "relevance"),
        [(t.tag, t.kind, t.votes, f"{t.similarity:.3f}", f"{t.relevance:.3f}") for t in retrieval.tags],
    )


def table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row))
    Console(soft_wrap=False).print(table)


@contextmanager
def progress() -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=None, rate="")
            bar.advance(tasks[stage], done)
            task = bar.tasks[tasks[stage]]
            bar.update(tasks[stage], rate=f"{task.completed / max(task.elapsed or 0, 1e-6):.0f}/s")

        yield advance
