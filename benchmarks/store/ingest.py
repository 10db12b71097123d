"""An ingest beside its parts alone: the work of the towers, and spaCy's.

    python -m benchmarks.store.ingest --data DIR_WITH_SHARDS

Ingests the training shards twice in their own processes, with and without mining, and times `nlp.pipe` with
the miner's own pipeline on the same captions. Every pair must be in, none quarantined.
"""

from __future__ import annotations

import json
import resource
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.processes import tagstore
from benchmarks.report import arguments_parser, table, write


def ingest(source: str, root: Path, miner: str) -> tuple[dict, int]:
    """Report of `tagstore ingest` in a fresh process, and its peak resident memory in MiB."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    command = tagstore("ingest", source, "--root", root, "--store", miner, "--miner", miner, "--json")
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return report, max(peak, before) // 1024


def raw_spacy(source: str) -> tuple[int, float]:
    """Number of captions of a source, and seconds of the miner's pipeline for them without our rules."""
    from tagstore.mining.parse import load_pipeline
    from tagstore.readers import read
    from tagstore.types import Pair

    captions = [c for pair in read(source) if isinstance(pair, Pair) for c in pair.captions]
    nlp = load_pipeline()
    list(nlp.pipe(captions[:200]))
    start = time.perf_counter()
    for _ in nlp.pipe(captions):
        pass
    return len(captions), time.perf_counter() - start


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with train-*.tar")
    parser.add_argument("--shards", default="train-*.tar")
    arguments = parser.parse_args()
    source = str(arguments.data / arguments.shards)

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        plain, plain_peak = ingest(source, root, "none")
        mined, mined_peak = ingest(source, root, "rules")
        size = sum(f.stat().st_size for f in (root / "rules").rglob("*") if f.is_file())
    captions, spacy_seconds = raw_spacy(source)
    for report in (plain, mined):
        assert report["entries"] == report["pairs"], "pairs were lost"
        assert not report["quarantined"], report["quarantined"][:3]

    stages = sorted(set(plain["seconds"]) | set(mined["seconds"]), key=lambda s: (s == "total", s))
    rows = []
    for stage in stages:
        cells = [(r["seconds"].get(stage, 0.0), r["pairs"]) for r in (plain, mined)]
        rows.append(
            [stage, *(f"{s:.1f} s ({n / s:.0f} pairs/s)" if s > 0.05 else f"{s:.2f} s" for s, n in cells)]
        )
    work = plain["seconds"]["decode"] + plain["seconds"]["embed"]
    share = work / plain["seconds"]["total"]
    mining = spacy_seconds / mined["seconds"]["mine"]
    write(
        "ingest",
        f"Ingest of {plain['pairs']} pairs with {captions} captions, encoder mini",
        table(["stage", "without mining", "with mining"], rows),
        table(
            ["figure", "value"],
            [
                ["decoding + embedding, share of the whole without mining", f"{share:.1%}"],
                ["raw nlp.pipe on the same captions", f"{captions / spacy_seconds:.0f} captions/s"],
                ["mining in the pipeline", f"{captions / mined['seconds']['mine']:.0f} captions/s"],
                ["mining, share of raw nlp.pipe's speed", f"{mining:.1%}"],
                ["peak memory without / with mining", f"{plain_peak} / {mined_peak} MiB"],
                ["bytes on disk with mining", f"{size:,} ({size / mined['entries']:.0f} an entry)"],
                [
                    "entries, tags, unique tags",
                    f"{mined['entries']}, {mined['tags']}, {mined['unique_tags']}",
                ],
            ],
        ),
        packages=("torch", "open-clip-torch", "spacy", "lmdb", "faiss-cpu"),
    )


if __name__ == "__main__":
    main()
