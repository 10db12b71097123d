"""The promises of the retrieval client: equal answers, no hangs, counted outages, no leaks, no time lost.

    python -m benchmarks.client.promises [--data DIR] [--quick] [--rounds 50] [--only PART ...]

`--data` is the folder with Flickr8k's shards (train-*.tar, test-*.tar); `guard`, `record` and `same` need it
and are left out without it. Servers run in their own processes. Each part checks before it times, and ends
the run with an error if a check fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks import synthetic
from benchmarks.client import plain_grpc_forks
from benchmarks.processes import start_server
from benchmarks.report import arguments_parser, table, write
from tagstore.client import TagPrefetcher, connect
from tagstore.client.recording import record
from tagstore.errors import Unavailable
from tagstore.types import Exclude, Identity, Pair, Retrieval

ROOT = Path(__file__).parents[2]
# as many threads as this process has: on a CPU their number decides the last bits of a vector
ENV = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
OPTIONS: list[dict] = [
    {},
    {"k": 1, "max_tags": 3},
    {"k": 10, "order": "similarity", "exclude": "self"},
    {"min_similarity": 0.6, "order": "relevance", "exact": True},
    {
        "exclude": Exclude(key=True, sha256=True, hash_distance=10, entry_ids=(1, 2, 3)),
        "exclude_keys": ["nobody"],
    },
    {"with_neighbours": False, "with_texts": False, "nprobe": 4, "ef_search": 32},
    {"where": {"split": "train"}},
]


class Served:
    """`tagstore serve` in its own process, which can be killed and started again at the same address."""

    def __init__(self, root: Path) -> None:
        self.root, self.address = root, "127.0.0.1:0"
        self.start()

    def start(self) -> None:
        options = "--address", self.address
        self.process = start_server(self.root, *options, stderr=subprocess.DEVNULL, env=ENV)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().split()[-1]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def served(root: Path) -> Iterator[Served]:
    server = Served(root)
    try:
        yield server
    finally:
        server.kill()


def matrix(scratch: Path, quick: bool, rounds: int, data: Path | None) -> str:
    """All ways to start workers while the parent sends queries; beside it a plain gRPC client."""
    root = small_store(scratch)
    combinations = ["fork:0", "fork:2", "fork:8", "forkserver:2", "forkserver:8", "spawn:2", "spawn:8"]
    command = [sys.executable, str(ROOT / "tests" / "fork_matrix.py")]
    with served(root) as server:
        start = time.perf_counter()
        chosen = combinations[:4] if quick else combinations
        arguments = [
            f"grpc://{server.address}/{synthetic.STORE}",
            "--rounds",
            str(1 if quick else rounds),
            "--combinations",
            *chosen,
        ]
        result = subprocess.run(
            command + arguments,
            capture_output=True,
            text=True,
            check=False,
            env={**ENV, "OMP_NUM_THREADS": "1"},
        )
    lines = result.stdout.splitlines()
    if result.returncode:
        raise SystemExit(result.stdout[-2000:] + result.stderr[-4000:])
    times: dict[tuple[str, str], list[float]] = {}
    for line in lines[:-1]:
        _, method, workers, kept, seconds, _ = line.split()
        times.setdefault((method, f"{workers} {kept}"), []).append(float(seconds))
    rows = [
        [m, w, f"{len(t)} of {len(t)}", f"{median(t):.1f} s", f"{max(t):.1f} s"]
        for (m, w), t in times.items()
    ]
    naive = plain_grpc_forks.measure(8, 10.0)
    return "\n\n".join(
        [
            f"## DataLoader workers\n\n{lines[-1]}; {time.perf_counter() - start:.0f} s. Two epochs each.",
            table(["start method", "workers", "passed", "median", "longest"], rows),
            "A plain gRPC client in 8 forked workers (`plain_grpc_forks.py` explains the rows):",
            table(["client", "GRPC_ENABLE_FORK_SUPPORT", "answered", "failed", "hung"], naive),
        ]
    )


def outage(scratch: Path, quick: bool, rounds: int, data: Path | None) -> str:
    """A server killed in the middle of an epoch and started again."""
    down = 3.0 if quick else 30.0
    step = 0.05
    root = small_store(scratch)
    samples = int((1.5 * down + 30) / step)
    rows = synthetic.queries(samples, 20_000, 512)
    with served(root) as server:
        url = f"grpc://{server.address}/{synthetic.STORE}"
        with connect(f"{url}?on_failure=empty&timeout=1&retries=2&cooldown=1") as source:
            fingerprint = source.info().fingerprint
            killed = again = 0.0
            returned: Counter[bool] = Counter()
            slowest = 0.0
            start = time.perf_counter()
            for i, row in enumerate(rows):
                now = time.perf_counter() - start
                if not killed and i > samples // 10:
                    server.kill()
                    killed = now
                if killed and not again and now > killed + down:
                    again = now
                    starting = threading.Thread(target=server.start)
                    starting.start()
                begin = time.perf_counter()
                [answer] = source.retrieve(vectors=row[None], fingerprint=fingerprint)
                spent = time.perf_counter() - begin
                slowest = max(slowest, spent)
                returned[answer.degraded] += 1
                time.sleep(max(0.0, step - spent))
            stats = source.stats()
        starting.join()
        assert returned.total() == samples
        assert stats.degraded == returned[True] > 0, (stats, returned)
        assert not answer.degraded, "the server is back and nothing comes from it"
        server.kill()
        with connect(f"{url}?timeout=2") as strict:
            try:
                strict.retrieve(vectors=rows[:1], fingerprint=fingerprint)
                raise SystemExit("a dead server answered")
            except Unavailable as error:
                message = str(error)
    figures = [
        ["samples of the epoch, all with an answer", samples],
        ["server gone before it was started again", f"{again - killed:.1f} s"],
        ["answers without tags, returned / counted by `stats()`", f"{returned[True]} / {stats.degraded}"],
        ["slowest answer (`timeout=1`)", f"{slowest:.2f} s"],
        ["requests not sent while the circuit was open", stats.skipped],
    ]
    text = table(["", ""], figures)
    return (
        f"## A server killed in mid-epoch and started again\n\n{text}\n\nWith `on_failure=raise`: `{message}`"
    )


def overlap(scratch: Path, quick: bool, rounds: int, data: Path | None) -> str:
    """Step time with retrieval in the step, beside it, and without. A step waits, as for an accelerator."""
    steps, batch = (30, 32) if quick else (200, 32)
    root = small_store(scratch)
    rows = synthetic.queries(steps * batch, 20_000, 512)
    batches = [{"vectors": rows[i : i + batch]} for i in range(0, len(rows), batch)]
    lines = []
    with served(root) as server, connect(f"grpc://{server.address}/{synthetic.STORE}?k=10") as source:
        fingerprint = source.info().fingerprint
        expected = [source.retrieve(vectors=b["vectors"], fingerprint=fingerprint) for b in batches[:3]]

        def inline() -> Iterator[tuple[dict, list[Retrieval]]]:
            for b in batches:
                yield b, source.retrieve(vectors=b["vectors"], fingerprint=fingerprint)

        def beside() -> Iterator[tuple[dict, list[Retrieval]]]:
            return iter(
                TagPrefetcher(batches, source, vector="vectors", fingerprint=fingerprint, batched=True)
            )

        def without() -> Iterator[tuple[dict, list[Retrieval]]]:
            return ((b, []) for b in batches)

        for length in (0.05, 0.1, 0.2):
            taken = {}
            for name, loop in (("without", without), ("inline", inline), ("beside", beside)):
                times, answers = _stepped(loop(), length)
                if name != "without":
                    assert answers[:3] == expected, "other answers"
                taken[name] = times
            base = sum(taken["without"])
            lines.append(
                [f"{length * 1e3:.0f} ms"]
                + [f"{median(taken[n]) * 1e3:.2f} ms" for n in taken]
                + [f"{(sum(taken[n]) / base - 1) * 100:+.2f} %" for n in ("inline", "beside")]
            )
    header = [
        "step",
        "without retrieval",
        "retrieval in the step",
        "TagPrefetcher",
        "in the step costs",
        "TagPrefetcher costs",
    ]
    about = (
        f"{steps} steps of {batch} queries by vector, k = 10, 20,000 entries, server on the same machine; "
        "medians, and whole epochs."
    )
    return f"## Retrieval beside the step\n\n{about}\n\n{table(header, lines)}"


def _stepped(
    loop: Iterator[tuple[dict, list[Retrieval]]], length: float
) -> tuple[list[float], list[list[Retrieval]]]:
    """Seconds of each step, the first left out: nothing could be fetched before it."""
    times, answers = [], []
    last = 0.0
    for _, answer in loop:
        answers.append(answer)
        time.sleep(length)
        now = time.perf_counter()
        if last:
            times.append(now - last)
        last = now
    return times, answers


def cache(scratch: Path, quick: bool, rounds: int, data: Path | None) -> str:
    """Hit rates and times of both caches over three epochs."""
    n = 512 if quick else 4096
    root = small_store(scratch)
    rows = synthetic.queries(n, 20_000, 512)
    lines = []
    directory = tempfile.mkdtemp(dir=scratch)
    with served(root) as server:
        url = f"grpc://{server.address}/{synthetic.STORE}?k=5"
        with connect(url) as plain:
            fingerprint = plain.info().fingerprint
            expected = plain.retrieve(vectors=rows, fingerprint=fingerprint)
        with connect(url, cache=directory) as source:
            source.pin()
            for epoch in range(3):
                before, start = source.stats(), time.perf_counter()
                answers = [
                    a
                    for i in range(0, n, 32)
                    for a in source.retrieve(vectors=rows[i : i + 32], fingerprint=fingerprint)
                ]
                asked = time.perf_counter() - start
                start = time.perf_counter()
                for i in range(0, n, 32):
                    source.tags(list({t.tag_id for a in answers[i : i + 32] for t in a}), embeddings=True)
                embedded = time.perf_counter() - start
                assert answers == expected
                after = source.stats()
                hits, misses = after.cache_hits - before.cache_hits, after.cache_misses - before.cache_misses
                known, new = (
                    after.embedding_hits - before.embedding_hits,
                    after.embedding_misses - before.embedding_misses,
                )
                lines.append(
                    [
                        epoch + 1,
                        f"{hits / (hits + misses):.1%}",
                        f"{asked / n * 1e6:.0f} us a query",
                        f"{known / (known + new):.1%}",
                        f"{embedded / (n / 32) * 1e3:.2f} ms a batch",
                    ]
                )
    header = ["epoch", "answers from the node's cache", "time", "embeddings from memory", "time"]
    about = f"{n} queries by vector in batches of 32, and the embeddings of their tags."
    return f"## Caches\n\n{about}\n\n{table(header, lines)}"


def install(scratch: Path, quick: bool, rounds: int, data: Path | None) -> str:
    """The base install in an empty environment: size, import time, a query."""
    venv = scratch / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    subprocess.run(
        [str(venv / "bin/pip"), "install", "--quiet", "--disable-pip-version-check", str(ROOT)],
        check=True,
    )
    packages = next(venv.glob("lib/python*/site-packages"))
    sizes = {
        p.name: sum(f.stat().st_size for f in p.rglob("*") if f.is_file())
        for p in packages.iterdir()
        if p.is_dir()
    }
    given = {"pip", "setuptools", "_distutils_hack", "pkg_resources", "__pycache__"}
    theirs = {n: s for n, s in sizes.items() if n.split("-")[0].split(".")[0] not in given}
    # what numpy, grpcio and protobuf bring; grpcio needs typing_extensions
    named = ("numpy", "grpc", "google", "protobuf")
    beyond = {n: s for n, s in theirs.items() if not n.startswith(named)}
    total = sum(beyond.values()) + sum(f.stat().st_size for f in packages.glob("*.py"))
    assert total < 30e6, beyond
    program = "import time; t = time.perf_counter(), time.process_time(); import tagstore.client; "
    program += "print(time.perf_counter() - t[0], time.process_time() - t[1])"
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")}
    # somewhere else than the repository, or its own files would be imported
    python = {"cwd": scratch, "env": env, "capture_output": True, "text": True, "check": True}
    runs = [
        subprocess.run([str(venv / "bin/python"), "-c", program], **python).stdout.split() for _ in range(6)
    ]  # type: ignore[call-overload]
    wall, busy = (median(float(run[i]) for run in runs[1:]) for i in (0, 1))  # the first one compiles
    assert busy < 0.3, runs
    with served(small_store(scratch)) as server:
        query = f"""
import numpy as np
from tagstore.client import connect
with connect("grpc://{server.address}/{synthetic.STORE}") as source:
    f = source.info().fingerprint
    print(len(source.retrieve(vectors=np.ones((2, f.dimension), np.float32), fingerprint=f)[1]))
"""
        tags = int(subprocess.run([str(venv / "bin/python"), "-c", query], **python).stdout)  # type: ignore[call-overload]
    assert tags > 0
    rows = [
        [n, f"{s / 1e6:.2f} MB"] for n, s in sorted(beyond.items(), key=lambda item: -item[1]) if s > 1000
    ]
    text = (
        f"Beyond numpy, grpcio and protobuf: {total / 1e6:.1f} MB. `import tagstore.client`: "
        f"{wall * 1e3:.0f} ms, {busy * 1e3:.0f} ms of them CPU; medians of 5. "
        "A query by vector over gRPC was answered."
    )
    return f"## The base install\n\n{text}\n\n{table(['package', 'size'], rows)}"


def guard(scratch: Path, quick: bool, rounds: int, data: Path | None) -> str:
    """A store that holds the training images themselves, asked about each of them."""
    from tagstore.storage.store import Store

    root = photographs(scratch, data, quick)
    snapshot = Store(root, "train").snapshot()
    ids = snapshot.live()
    entries = [snapshot.entry(i) for i in ids.tolist()]
    vectors = snapshot.vectors(ids)
    identities = [Identity(e.key, e.sha256, e.perceptual_hash) for e in entries]
    hashes = {e.key: e.perceptual_hash for e in entries}
    lines = []
    with served(root) as server, connect(f"grpc://{server.address}/train?k=5") as source:
        fingerprint = source.info().fingerprint
        # a copy that was encoded again and named anew: only the perceptual hash knows it
        flips = np.random.default_rng(0)
        copies = [
            Identity(
                f"copy of {e.key}",
                bytes(32),
                e.perceptual_hash ^ sum(1 << int(b) for b in flips.choice(64, 4, replace=False)),
            )
            for e in entries
        ]
        cases: list[tuple[str, dict]] = [
            ("none", {}),
            ("own key", {"exclude": Exclude(key=True)}),
            ("key, sha256", {"exclude": Exclude(key=True, sha256=True)}),
            ("self (pHash within 4 bits)", {"exclude": "self"}),
            ("self (pHash within 10 bits)", {"exclude": "self", "exclude_distance": 10}),
            ("self, of copies (pHash 4 bits away)", {"exclude": "self"}),
        ]
        for name, options in cases:
            times, answers = [], []
            known = copies if "copies" in name else identities
            for i in range(0, len(entries), 32):
                part = slice(i, i + 32)
                start = time.perf_counter()
                answers += source.retrieve(
                    vectors=vectors[part], fingerprint=fingerprint, identities=known[part], **options
                )
                times.append(time.perf_counter() - start)
            pairs = list(zip(answers, entries, strict=True))
            own = sum(bool(a.neighbours) and a.neighbours[0].key == e.key for a, e in pairs)
            found = sum(e.key in [n.key for n in a.neighbours] for a, e in pairs)
            alike = sum(
                any((hashes[n.key] ^ e.perceptual_hash).bit_count() <= 4 for n in a.neighbours)
                for a, e in pairs
            )
            full = sum(len(a.neighbours) == 5 for a in answers)
            lines.append(
                [
                    name,
                    own,
                    found,
                    alike,
                    full,
                    sum(a.excluded for a in answers),
                    f"{median(times) * 1e3:.1f} ms",
                ]
            )
            if name == "none":
                assert own > 0.99 * len(entries), own
            else:
                assert found == 0, found
            if name.startswith("self ("):
                assert alike == 0, alike
    header = [
        "guard",
        "rank 1 is the image itself",
        "image itself found",
        "found within 4 bits",
        "with 5 neighbours",
        "excluded",
        "32 queries",
    ]
    about = f"{len(entries)} photographs, each a query by vector to a store of them."
    return f"## Leak guard\n\n{about}\n\n{table(header, lines)}"


def recording(scratch: Path, quick: bool, rounds: int, data: Path | None) -> str:
    """How fast a data set is recorded and replayed, and what a map weighs."""
    root, pairs = photographs(scratch, data, quick), test_photographs(data, quick)
    lines = []
    with served(root) as server:
        for workers in (1, 4):
            out = scratch / f"map-{workers}"
            with connect(f"grpc://{server.address}/train?k=5&exclude=self") as source:
                done = record(source, pairs, out, workers=workers)
            assert done.samples == len(pairs)
            lines.append(
                [f"record, {workers} requests at a time", f"{done.samples / done.seconds:.0f} samples/s"]
            )
    lines.append(
        ["a map", f"{done.bytes / done.samples:.0f} bytes a sample, vocabulary with embeddings included"]
    )
    with connect(f"replay://{out}") as replayed:
        keys, fingerprint = [p.key for p in pairs] * 10, replayed.info().fingerprint
        start = time.perf_counter()
        for i in range(0, len(keys), 32):
            some = keys[i : i + 32]
            replayed.retrieve(vectors=np.ones((len(some), 1), np.float32), fingerprint=fingerprint, keys=some)
        lines.append(
            ["replay by key, batches of 32", f"{len(keys) / (time.perf_counter() - start):.0f} samples/s"]
        )
    about = f"{len(pairs)} photographs, embedded by the server on this machine's CPU."
    return f"## Recording\n\n{about}\n\n{table(['', ''], lines)}"


def same(scratch: Path, quick: bool, rounds: int, data: Path | None) -> str:
    """live == file == replay for every option, byte for byte."""
    root, pairs = photographs(scratch, data, quick), test_photographs(data, quick)
    keys, images = [p.key for p in pairs], [p.image for p in pairs]
    lines = []
    with served(root) as server, connect(f"file://{root}/train") as local:
        for number, options in enumerate(OPTIONS):
            with connect(f"grpc://{server.address}/train", **options) as live:
                record(live, pairs, scratch / f"same-{number}")
                answers = [live.retrieve(images, keys=keys), local.retrieve(images, keys=keys, **options)]
            with connect(f"replay://{scratch / f'same-{number}'}") as replayed:
                answers.append(replayed.retrieve(images, keys=keys))
            assert len({_bytes(a) for a in answers}) == 1, options
            lines.append([f"`{options}`", len(images), sum(len(a) for a in answers[0]), "equal"])
    return f"## live == file == replay\n\n{table(['options', 'photographs', 'tags', 'bytes'], lines)}"


def _bytes(answers: list[Retrieval]) -> bytes:
    from tagstore.wire import convert

    lines = []
    for a in answers:
        message = convert.retrieval_to_proto(a).SerializeToString(deterministic=True)
        lines.append(f"{a.store}@{a.version} {a.fingerprint} {message.hex()}")
    return "\n".join(lines).encode()


def small_store(scratch: Path) -> Path:
    root = scratch / "synthetic"
    if not root.exists():
        synthetic.build(root, 20_000, 512)
    return root


def photographs(scratch: Path, data: Path | None, quick: bool) -> Path:
    """A store of the training photographs; of the first shard's for a quick run."""
    from tagstore.ingestion import ingest

    root = scratch / "photographs"
    if not root.exists():
        shards = "train-000.tar" if quick else "train-*.tar"
        ingest(str(data / shards), root=root, store="train", encoder="mini", device="cpu", sync="batch")  # type: ignore[operator]
    return root


def test_photographs(data: Path | None, quick: bool) -> list[Pair]:
    from tagstore.readers import read

    found = [pair for pair in read(str(data / "test-000.tar")) if isinstance(pair, Pair)]  # type: ignore[operator]
    return found[:64] if quick else found


PARTS: dict[str, Callable[[Path, bool, int, Path | None], str]] = {
    "matrix": matrix,
    "outage": outage,
    "overlap": overlap,
    "cache": cache,
    "install": install,
    "guard": guard,
    "record": recording,
    "same": same,
}
NEED_DATA = ("guard", "record", "same")


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--data", type=Path, help="folder with train-*.tar and test-*.tar")
    parser.add_argument(
        "--quick", action="store_true", help="small numbers, to see that it runs; nothing is written"
    )
    parser.add_argument("--rounds", type=int, default=50, help="of the matrix of workers")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    left_out = [name for name in arguments.only if name in NEED_DATA and arguments.data is None]
    parts = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.only:
            if name not in left_out:
                parts.append(PARTS[name](Path(scratch), arguments.quick, arguments.rounds, arguments.data))
                print(parts[-1], flush=True)
    if left_out:
        print(f"left out, they need --data: {', '.join(left_out)}")
    if not arguments.quick:
        write("client", "The retrieval client", *parts, packages=("grpcio", "numpy", "lmdb"))


if __name__ == "__main__":
    main()
