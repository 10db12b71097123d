"""What commands print: tables for people, JSON for programs, progress on stderr."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from tagstore.plain_text import one_line

if TYPE_CHECKING:
    from tagstore.client.admin import Ingested
    from tagstore.ingestion.preview import Preview
    from tagstore.ingestion.report import Advance, Report
    from tagstore.types import Retrieval, StoreInfo

_MAX_REASONS = 10
"""Reasons for quarantine that a report lists, the most frequent first."""


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
                **({"why": [asdict(place) for place in retrieval.why(t)]} if retrieval.miner else {}),
            }
            for t in retrieval.tags
        ],
    }


def info_json(info: StoreInfo) -> dict[str, Any]:
    fingerprint = {**asdict(info.fingerprint), "digest": info.fingerprint.digest}
    return {**asdict(info), "fingerprint": fingerprint, "index": dict(info.index)}


def print_report(report: Report | Ingested, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(report)))
        return
    place = f"{report.store}@{report.version}"
    click.echo(f"{place}: {report.entries} entries, {report.tags} tags, {report.unique_tags} unique tags")
    quarantined = sum(report.reasons.values())
    added = f"{report.added} added, {report.unchanged} unchanged"
    click.echo(f"read {report.pairs} pairs: {added}, {quarantined} quarantined")
    for reason, count in sorted(report.reasons.items(), key=lambda item: -item[1])[:_MAX_REASONS]:
        example = next((r for r in report.quarantined if r.reason.startswith(reason)), None)
        suffix = f", for example {example.key}: {example.reason}" if example else ""
        click.echo(f"  {count} x {reason}{suffix}")
    unread: dict[str, int] = getattr(report, "unread", {})
    if unread:
        captions: int = getattr(report, "captions", 0)
        count, languages = sum(unread.values()), ", ".join(f"{code} {n}" for code, n in unread.items())
        click.echo(
            f"no tags from {count} of {captions} captions ({count / captions:.0%}), which are "
            f"in other languages: {languages}; --miner rules+spacy:MODEL reads them"
        )
    if report.seconds:
        click.echo("seconds: " + ", ".join(f"{stage} {spent:.1f}" for stage, spent in report.seconds.items()))


def print_preview(preview: Preview, max_bad: float, as_json: bool) -> None:
    """Print what would be read; exit with 1 if a larger share than `max_bad` would be refused."""
    refused = sum(preview.reasons.values())
    if as_json:
        examples = [{"key": pair.key, "captions": list(pair.captions)} for pair in preview.examples]
        counts = {"pairs": preview.pairs, "captions": preview.captions, "refused": refused}
        click.echo(json.dumps({**counts, "reasons": preview.reasons, "examples": examples}))
    else:
        click.echo(f"would read {preview.pairs} pairs with {preview.captions} captions, and refuse {refused}")
        for reason, count in sorted(preview.reasons.items(), key=lambda item: -item[1])[:_MAX_REASONS]:
            example = preview.refused[reason]
            click.echo(f"  {count} x {reason}, for example {example.key}: {example.reason}")
        table(
            ("key", "captions", "metadata"),
            (
                (pair.key, one_line(" / ".join(pair.captions)), one_line(json.dumps(dict(pair.metadata))))
                for pair in preview.examples
            ),
        )
    if refused > max_bad * preview.pairs:
        raise SystemExit(1)


def print_retrieval(query: str, retrieval: Retrieval) -> None:
    click.echo(f"{query}  ({retrieval.store}@{retrieval.version})")
    table(("neighbour", "similarity"), ((n.key, f"{n.similarity:.3f}") for n in retrieval.neighbours))
    table(
        ("tag", "kind", "votes", "similarity", "relevance"),
        ((t.tag, t.kind, t.votes, f"{t.similarity:.3f}", f"{t.relevance:.3f}") for t in retrieval.tags),
    )
    if retrieval.miner:
        print_provenance(retrieval)


def print_provenance(retrieval: Retrieval) -> None:
    """Print where each tag came from, as far as the answer says."""
    rows = []
    for tag in retrieval.tags:
        for number, place in enumerate(retrieval.why(tag)):
            words = f"{place.words} ({place.caption})" if place.source == "caption" else place.source
            shown = tag.tag if number == 0 else ""
            rows.append((shown, place.key, one_line(words), f"{place.score:.2f}", place.miner))
    table(("tag", "neighbour", "words (caption)", "score", "miner"), rows)


def table(columns: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row))
    Console(soft_wrap=False).print(table)


@contextmanager
def progress() -> Iterator[Advance]:
    """Show a progress bar for each stage on stderr; yields a function of stage and further units done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    name, rate = TextColumn("{task.description}"), TextColumn("{task.fields[rate]}")
    columns = (name, BarColumn(), MofNCompleteColumn(), rate, TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=None, rate="")
            bar.advance(tasks[stage], done)
            task = bar.tasks[tasks[stage]]
            bar.update(tasks[stage], rate=f"{task.completed / max(task.elapsed or 0, 1e-6):.0f}/s")

        yield advance
