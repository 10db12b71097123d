"""The command for preference data: pairs."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from tagstore.cli import options, output


@click.command()
@click.argument("url")
@click.option(
    "--data", required=True, metavar="SAMPLES", help="What `tuna train` reads: JSON, JSON Lines, shards."
)
@click.option(
    "--out", required=True, type=click.Path(dir_okay=False), metavar="FILE", help="The Parquet file to write."
)
@click.option("--images", metavar="DIR", help="Folder of the images of JSON or JSON Lines, if not its own.")
@click.option("--split", default="", metavar="S", help="Only samples whose field `split` is this.")
@options.number("--limit", 0, "Only so many samples, the first; 0 for all.", least=0)
@click.option(
    "--prompt",
    default="Describe the image.",
    show_default=True,
    metavar="TEXT",
    help="What asks for a caption.",
)
@options.number("--seed", 0, "Of the choice among tags that fit.", least=0)
@options.miner
@click.option(
    "--allow-outside",
    is_flag=True,
    help="Read images whose path leads out of SAMPLES' folder, or of --images.",
)
@options.as_json
def pairs(
    url: str,
    data: str,
    out: str,
    images: str | None,
    split: str,
    limit: int,
    prompt: str,
    seed: int,
    miner: str,
    allow_outside: bool,
    as_json: bool,
) -> None:
    """Write preference data: answers, and what would be wrong in them.

    In the answer of a sample one tag is exchanged for a tag of similar pictures that this picture does not
    show. FILE is Parquet as TRL's DPOTrainer reads it: images, prompt, chosen, rejected. A sample in which
    nothing can be exchanged gives no pair, and is counted. More neighbours (?k=10 in the URL) give more
    tags to choose from.
    """
    from tagstore.client import connect
    from tagstore.mining import load_miner, load_rules
    from tagstore.preferences import NO_PAIR, write_pairs
    from tagstore.readers.samples import read_samples

    samples = read_samples(data, images=images, split=split, limit=limit, allow_outside=allow_outside)
    with output.progress() as progress, connect(url, retries=20) as source:
        report = write_pairs(
            source, samples, out, miner=load_miner(miner), rules=load_rules(), prompt=prompt, seed=seed,
            progress=progress,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(asdict(report)))
        return
    kinds = ", ".join(f"{number} of kind {kind}" for kind, number in report.kinds.items())
    store = f"{report.store}@{report.version}"
    click.echo(f"{report.path}: {report.pairs} pairs of {report.samples} samples with {store}")
    if kinds:
        click.echo(f"exchanged tags: {kinds}")
    for reason, number in report.without.items():
        click.echo(f"{number} samples give no pair: {NO_PAIR[reason]}")
