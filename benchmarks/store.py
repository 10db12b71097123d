"""What a store costs: bytes an entry, memory of a long ingest, time to open, commits and rollbacks a second.

    python benchmarks/store.py [--entries 1000000] [--dimension 512]

Synthetic entries: clustered unit vectors are given, captions of 40 to 70 characters, five tags each from a Zipf distribution.
Correctness first: the store is verified, and sampled entries are compared with what was put in.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
from report import table, write

from tagstore import faiss_index
from tagstore.maintenance import Selection, delete, rollback
from tagstore.mining import MergedTag
from tagstore.staging import Draft
from tagstore.store import Store
from tagstore.types import Fingerprint
from tagstore.writer import Writer

BATCH = 4096
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
        vectors = centres[rng.integers(1000, size=size)] + 0.5 * rng.standard_normal((size, dimension), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        tags = rng.zipf(1.3, (size, 5)) % WORDS
        yield [draft(start + i, tags[i]) for i in range(size)], vectors


def memory() -> dict[str, int]:
    """Resident MiB of this process: its own (anonymous), and pages of files it has mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) // 1024 for line in lines if line.startswith(("RssAnon", "RssFile"))}
    return {"own": found["RssAnon"], "mapped": found["RssFile"]}


OPEN = """
import sys, time
start = time.perf_counter()
import numpy as np
from tagstore.engine import Engine
from tagstore.store import Store
imported = time.perf_counter()
engine = Engine(Store(sys.argv[1], "bench").snapshot())
opened = time.perf_counter()
engine.retrieve(np.ones((1, engine.fingerprint.dimension), np.float32))
print(imported - start, opened - imported, time.perf_counter() - opened)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--directory", type=Path, help="where to make it; a temporary folder if not given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        measure(Path(scratch), arguments.entries, arguments.dimension)


def measure(root: Path, n: int, dimension: int) -> None:
    fingerprint = Fingerprint("bench", "00", {}, False, True, dimension)
    peak = {"own": 0, "mapped": 0}
    captions = 0
    start = time.perf_counter()
    with Writer(root, "bench", fingerprint, sync="batch") as writer:
        for drafts, vectors in batches(n, dimension):
            writer.append(drafts, vectors)
            captions += sum(len(d.captions[0]) for d in drafts)
            peak = {k: max(v, memory()[k]) for k, v in peak.items()}
        while texts := writer.new_tags(limit=4096):
            writer.embed_tags(np.eye(1, dimension, dtype=np.float32).repeat(len(texts), 0))
        appended = time.perf_counter() - start
        before_index = memory()["own"]
        writer.commit(operation="ingest", indexer=faiss_index.extend)
    total = time.perf_counter() - start
    peak = {k: max(v, memory()[k]) for k, v in peak.items()}

    store = Store(root, "bench")
    snapshot = store.snapshot()
    index = sum(f["bytes"] for f in snapshot.version.index["files"])
    database = (store.generation / "data.mdb").stat().st_blocks * 512
    embeddings = snapshot.version.next_tag_id * dimension * 2
    state = (database - n * dimension * 2 - embeddings - captions) / n
    expected = next(batches(min(n, BATCH), dimension))[0]
    for i in (0, 17, min(n, BATCH) - 1):
        entry = snapshot.entry(i)
        assert (entry.key, entry.captions, entry.sha256) == (expected[i].key, expected[i].captions, expected[i].sha256)

    subprocess.run(["sync"], check=False)
    opens = [
        [
            float(x)
            for x in subprocess.run([sys.executable, "-c", OPEN, str(root)], check=True, capture_output=True, text=True).stdout.split()
        ]
        for _ in range(5)
    ]
    commits = []
    for i in range(5):
        begin = time.perf_counter()
        delete(root, "bench", Selection(keys=[f"{i:012d}"]))
        commits.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    rollback(root, "bench", 1)
    rolled = time.perf_counter() - begin

    write(
        "store",
        f"A store of {n:,} entries, {dimension} dimensions",
        table(
            ["figure", "value"],
            [
                ["appends", f"{n / appended:,.0f} entries/s"],
                ["whole ingest, index and checksums included", f"{total:.0f} s"],
                ["bytes on disk: database / index", f"{database:,} / {index:,}"],
                ["vector, float16", f"{dimension * 2} bytes an entry"],
                ["captions", f"{captions / n:.0f} bytes an entry"],
                [
                    "state beyond vector and caption",
                    f"{state:.0f} bytes an entry (sha256 and perceptual hash are 40 of them, the key twice 12)",
                ],
                ["peak memory of the process's own during appends", f"{before_index} MiB"],
                ["peak memory with the index built, own / mapped file pages", f"{peak['own']} / {peak['mapped']} MiB"],
                [
                    "import / open / first query, a fresh process, median of 5",
                    " / ".join(f"{median(c) * 1e3:.0f} ms" for c in zip(*opens, strict=True)),
                ],
                ["delete by key, committed, median of 5", f"{median(commits) * 1e3:.0f} ms"],
                ["rollback, committed", f"{rolled * 1e3:.0f} ms"],
            ],
        ),
        packages=("lmdb", "faiss-cpu", "numpy"),
    )


if __name__ == "__main__":
    main()
