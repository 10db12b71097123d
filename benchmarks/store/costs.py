"""The costs of a store: bytes an entry and their use, memory of a long ingest, time to open and to commit.

    python -m benchmarks.store.costs [--entries 1000000] [--dimension 512] [--versions 10000] [--quick]

Entries are synthetic: clustered unit vectors, captions of 40 to 70 characters, five tags each from a Zipf
distribution. The store is verified in full, which compares every vector of the index, and sampled entries are
compared with the input.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import zstandard

from benchmarks.processes import drop_from_page_cache, memory_mib
from benchmarks.report import arguments_parser, table, write
from tagstore.indexing import faiss_index
from tagstore.mining import MergedTag
from tagstore.storage.codec import encode_entry
from tagstore.storage.environments import forget
from tagstore.storage.rows import BLOCK_ROWS
from tagstore.storage.staging import Draft
from tagstore.storage.store import Snapshot, Store
from tagstore.storage.tables import TABLES
from tagstore.storage.writer import Writer
from tagstore.types import Fingerprint
from tagstore.upkeep.edits import Selection, delete, rollback
from tagstore.upkeep.verify import verify

BATCH = 16384
WORDS = 200_000


def draft(i: int, tags: np.ndarray) -> Draft:
    words = [f"word{t}" for t in dict.fromkeys(tags.tolist())]
    caption = f"a picture with {' and '.join(words[:3])} taken at place {i}"
    merged = tuple(MergedTag(w, "object", w, 0.9, 1, ((0, 15, 15 + len(w)),)) for w in words)
    return Draft(f"{i:012d}", hashlib.sha256(str(i).encode()).digest(), i, (caption,), merged)


def batches(n: int, dimension: int) -> Iterator[tuple[list[Draft], np.ndarray]]:
    centres = np.random.default_rng(0).standard_normal((1000, dimension), dtype=np.float32)
    for start in range(0, n, BATCH):
        rng = np.random.default_rng(start)
        size = min(BATCH, n - start)
        vectors = centres[rng.integers(1000, size=size)] + 0.5 * rng.standard_normal(
            (size, dimension), dtype=np.float32
        )
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        tags = rng.zipf(1.3, (size, 5)) % WORDS
        yield [draft(start + i, tags[i]) for i in range(size)], vectors


OPEN = """
import sys, time
start = time.perf_counter()
import numpy as np
from tagstore.retrieval.engine import Engine
from tagstore.storage.store import Store
imported = time.perf_counter()
engine = Engine(Store(sys.argv[1], "bench").snapshot())
opened = time.perf_counter()
engine.retrieve(np.ones((1, engine.fingerprint.dimension), np.float32))
print(imported - start, opened - imported, time.perf_counter() - opened)
"""


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument(
        "--versions", type=int, default=10_000, help="commits after which a commit is timed again; 0 for none"
    )
    parser.add_argument(
        "--quick", action="store_true", help="20,000 entries and 200 versions: to see that it runs"
    )
    parser.add_argument("--directory", type=Path, help="where to make it; a temporary folder if not given")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.entries, arguments.versions = 20_000, 200
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        measure(Path(scratch), arguments.entries, arguments.dimension, arguments.versions)


def account(snapshot: Snapshot, captions: int) -> list[list[str]]:
    """Bytes of the database an entry, by use: tables by their pages, parts of a record by samples."""
    store, n = snapshot.store, snapshot.version.entries
    with store.env.begin() as txn:
        stats = {name: txn.stat(store.db[name]) for name in TABLES}
    pages = {
        name: s["psize"] * (s["branch_pages"] + s["leaf_pages"] + s["overflow_pages"]) / n
        for name, s in stats.items()
    }
    whole = (store.generation / "data.mdb").stat().st_blocks * 512 / n
    entries = list(snapshot.entries(np.arange(0, n, max(1, n // 10_000))[:10_000]))
    records = [encode_entry(entry) for entry in entries]
    mean = sum(map(len, records)) / len(records)
    tags = mean - sum(len(encode_entry(replace(entry, tags=()))) for entry in entries) / len(entries)
    key = sum(len(entry.key.encode()) for entry in entries) / len(entries) + 1
    text = sum(len(caption.encode()) for entry in entries for caption in entry.captions) / len(entries)
    block = [b"".join(records[i : i + 256]) for i in range(0, len(records), 256)]
    packed = sum(len(zstandard.compress(piece, 3)) for piece in block) / len(records)
    vector = snapshot.dimension * 2
    embeddings = snapshot.version.next_tag_id * vector / n
    rows = [
        ["**database file**", whole],
        ["vector, float16", vector],
        ["captions, as text", captions / n],
        ["text embeddings of the vocabulary", embeddings],
        ["**state: what is left**", whole - vector - captions / n - embeddings],
        ["sha256 and perceptual hash", 40],
        ["key, in the record", key],
        ["tags with score and provenance, in the record", tags],
        ["lengths, metadata, origin, in the record", mean - key - tags - 40 - text],
        ["LMDB's nodes and pages around the records", pages["entries"] - mean],
        ["table of keys", pages["keys"]],
        ["vocabulary and its table", pages["tags"] + pages["tag_ids"]],
        [
            f"what blocks of {BLOCK_ROWS} rows leave of their last page",
            pages["vectors"] - vector + pages["embeddings"] - embeddings,
        ],
        [
            "versions, their arrays and the rest",
            sum(pages[name] for name in ("versions", "pages", "meta", "quarantine", "sources")),
        ],
        ["free pages", whole - sum(pages.values())],
    ]
    note = f"A record has {mean:.0f} bytes; in zstd blocks of 256 records it would have {packed:.0f}."
    return [*([name, f"{value:.1f}"] for name, value in rows), ["", note]]


def opens(root: Path, *, cold: bool) -> str:
    """Milliseconds to import, open and answer a first query, each median of 5 fresh processes."""
    runs = []
    for _ in range(5):
        if cold:
            drop_from_page_cache(root)
        out = subprocess.run(
            [sys.executable, "-c", OPEN, str(root)], check=True, capture_output=True, text=True
        ).stdout
        runs.append([float(x) for x in out.split()])
    return " / ".join(f"{median(c) * 1e3:.0f} ms" for c in zip(*runs, strict=True))


def deletions(root: Path, first: int) -> float:
    """Milliseconds that a committed deletion by key takes, median of 5."""
    durations = []
    for i in range(first, first + 5):
        begin = time.perf_counter()
        delete(root, "bench", Selection(keys=[f"{i:012d}"]))
        durations.append(time.perf_counter() - begin)
    return median(durations) * 1e3


def measure(root: Path, n: int, dimension: int, versions: int) -> None:
    fingerprint = Fingerprint("bench", "00", {}, False, True, dimension)
    peak = np.zeros(2)  # MiB: private, mapped
    captions = 0
    load = os.getloadavg()[0]
    start = time.perf_counter()
    with Writer(root, "bench", fingerprint, sync="batch") as writer:
        for drafts, vectors in batches(n, dimension):
            writer.append(drafts, vectors)
            captions += sum(len(d.captions[0]) for d in drafts)
            peak = np.maximum(peak, memory_mib())
        while texts := writer.new_tags(limit=4096):
            writer.embed_tags(np.eye(1, dimension, dtype=np.float32).repeat(len(texts), 0))
        appended = time.perf_counter() - start
        before_index = round(memory_mib()[0])
        writer.commit(operation="ingest", indexer=faiss_index.extend)
    total = time.perf_counter() - start
    peak = np.maximum(peak, memory_mib())

    store = Store(root, "bench")
    snapshot = store.snapshot()
    index = sum(f["bytes"] for f in snapshot.version.index["files"])
    database = (store.generation / "data.mdb").stat().st_blocks * 512
    bytes_an_entry = account(snapshot, captions)
    expected = next(batches(min(n, BATCH), dimension))[0]
    for i in (0, 17, min(n, BATCH) - 1):
        entry = snapshot.entry(i)
        assert (entry.key, entry.captions, entry.sha256) == (
            expected[i].key,
            expected[i].captions,
            expected[i].sha256,
        )

    store.env.close()  # what a process has mapped stays in memory
    forget(store.generation)
    system = subprocess.run(
        ["stat", "-f", "-c", "%T", str(root)], capture_output=True, text=True, check=False
    ).stdout.strip()
    cold = "not taken: the files are in memory" if system == "tmpfs" else opens(root, cold=True)
    warm = opens(root, cold=False)
    problems = verify(root, "bench", full=True)
    assert not problems, problems
    commits = deletions(root, 0)
    begin = time.perf_counter()
    rollback(root, "bench", 1)
    rolled = time.perf_counter() - begin
    many = []
    if versions:
        with Writer(root, "bench") as writer:
            for _ in range(versions):
                writer.rollback(1)
        many = [
            [f"delete by key, committed, after {versions:,} versions more", f"{deletions(root, 10):.0f} ms"]
        ]

    write(
        f"store-{n // 1_000_000}m" if n % 1_000_000 == 0 else f"store-{n}",
        f"A store of {n:,} entries, {dimension} dimensions",
        table(
            ["figure", "value"],
            [
                ["file system", system],
                ["load of the machine, before and after", f"{load:.1f} / {os.getloadavg()[0]:.1f}"],
                ["appends", f"{n / appended:,.0f} entries/s"],
                ["whole ingest, index and checksums included", f"{total:.0f} s"],
                ["bytes on disk: database / index", f"{database:,} / {index:,}"],
                ["peak private memory during appends", f"{before_index} MiB"],
                [
                    "peak memory with the index built, private / mapped file pages",
                    f"{peak[0]:.0f} / {peak[1]:.0f} MiB",
                ],
                [
                    "import / open / first query, a fresh process, files out of the page cache, median of 5",
                    cold,
                ],
                ["the same, files in the page cache", warm],
                ["delete by key, committed, median of 5", f"{commits:.0f} ms"],
                ["rollback, committed", f"{rolled * 1e3:.0f} ms"],
                *many,
            ],
        ),
        table(["bytes of the database, an entry", ""], bytes_an_entry),
        packages=("lmdb", "faiss-cpu", "numpy"),
    )


if __name__ == "__main__":
    main()
