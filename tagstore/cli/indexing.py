"""The command that chooses and builds the index of a store: build-index."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Any

import click

from tagstore.cli import options, output
from tagstore.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tagstore.upkeep.tuning import Trial


@click.command("build-index")
@click.argument("url")
@click.option("--recall", default=0.95, show_default=True, help="Least share of the true neighbours found.")
@click.option("--k", default=5, show_default=True, help="Neighbours that recall is measured for.")
@click.option("--memory", metavar="SIZE", help="Most memory of the index: 500M, 4G.")
@click.option("--latency", metavar="TIME", help="Most time of one search, median: 5ms, 0.2s.")
@click.option(
    "--kind",
    type=click.Choice(["auto", "flat", "flat32", "hnsw", "ivf", "ivfpq"]),
    default="auto",
    show_default=True,
    help="Build this kind, if it fits the budget.",
)
@click.option(
    "--queries",
    type=options.existing_file,
    metavar="NPY",
    help="Vectors to measure with; by default made of stored ones.",
)
@click.option("--explain", is_flag=True, help="Show every alternative that was tried, and its verdict.")
@options.device
@options.as_json
def build_index(
    url: str,
    recall: float,
    k: int,
    memory: str | None,
    latency: str | None,
    kind: str,
    queries: str | None,
    explain: bool,
    device: str,
    as_json: bool,
) -> None:
    """Build the index that fits a budget.

    Kinds are tried from the simplest to the smallest: flat, hnsw, ivf, ivfpq. The first that fits is measured
    and committed as a new version. If none fits, nothing is changed.
    """
    size, seconds = _bytes(memory), _seconds(latency)
    if options.remote(url):
        from tagstore.client.admin import administer

        if queries or k != 5 or device != "auto":
            raise InvalidInput(
                "--queries, --k and --device are for a store of this machine: run it where the store is, with file://"
            )
        budget: dict[str, Any] = {"recall": recall, "kind": "" if kind == "auto" else kind}
        budget |= {"memory_bytes": size or 0, "latency_ms": (seconds or 0) * 1e3}
        with administer(url) as admin:
            version, report = admin.build_index(progress=_say, **budget)
        click.echo(
            json.dumps(report) if as_json else f"version {version.number}: {_sentence(report['index'])}"
        )
        return
    from tagstore.upkeep.tuning import Budget, OverBudget
    from tagstore.upkeep.tuning import build_index as run

    root, store, _ = options.local(url)
    limits = Budget(recall, k, size, seconds)
    try:
        with output.progress() as advance:
            outcome = run(
                root, store, limits, kind=kind, queries=queries, device=device, advance=advance, say=_say
            )
    except OverBudget as error:
        if as_json:
            click.echo(json.dumps({"error": str(error), "trials": [t.as_json() for t in error.trials]}))
            sys.exit(1)
        if explain:
            _print_trials(error.trials)
        raise
    if as_json:
        click.echo(json.dumps(outcome.report()))
        return
    if explain:
        _print_trials(outcome.trials)
    click.echo(f"{store}@{outcome.version.number}: {_sentence(outcome.version.index)}")


def _say(message: str) -> None:
    click.echo(message, err=True)


def _sentence(index: Any) -> str:
    measured = index["recall"]
    parameters = {**index["tuned"]["build"], **index["tuned"]["search"]}
    listed = ", ".join(f"{name} {value}" for name, value in parameters.items())
    kind = f"{index['kind']} ({listed})" if listed else index["kind"]
    return (
        f"{kind}, recall@{measured['k']} {measured['recall']:.3f} on {measured['queries']} queries "
        f"({measured['source']}), {measured['latency_ms']:.2f} ms a query"
    )


def _print_trials(trials: Sequence[Trial]) -> None:
    output.table(
        ("kind", "built with", "searched with", "MB", "recall", "ms", "built in", "verdict"),
        (
            (
                t.plan.kind,
                " ".join(f"{name}={value}" for name, value in t.plan.build.items()),
                " ".join(f"{name}={value}" for name, value in t.plan.search.items()),
                f"{t.bytes / 1e6:.0f}",
                f"{t.recall:.3f}" if t.seconds else "",
                f"{t.latency * 1e3:.2f}" if t.seconds else "",
                f"{t.seconds:.0f} s" if t.seconds else "",
                t.verdict,
            )
            for t in trials
        ),
    )


def _bytes(text: str | None) -> int | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)i?B?", text)
    if not match or not float(match[1]):
        raise InvalidInput(f"memory is '{text}': write a number with K, M, G or T behind it, as in 4G")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(us|ms|s)", text)
    if not match or not float(match[1]):
        raise InvalidInput(f"latency is '{text}': write a number with us, ms or s behind it, as in 5ms")
    return float(match[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1}[match[2]]
