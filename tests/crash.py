"""The crash harness: a child that writes dies at a random instant; all that it acknowledged must be there.

The parent draws the operations from a seed, sends them to the child one by one, and keeps a plain model of
what was acknowledged. The child dies by SIGKILL at a random time, by SIGKILL at or within the n-th write, or
by a power cut (writes that were not synced are lost at random); or its disk is full or broken for a while
(ENOSPC, EIO), and it goes on. All but the first need `crash_shim.c` and a C compiler. After each round the
store is opened, verified and compared with the model: the operation in flight may be there or not, nothing
else may differ.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from tagstore.bundles import export
from tagstore.errors import NotFound, TagstoreError
from tagstore.indexing import faiss_index
from tagstore.mining import MergedTag
from tagstore.storage.environments import forget
from tagstore.storage.grounding import ground as learn_tags
from tagstore.storage.staging import Draft, Progress
from tagstore.storage.store import Snapshot, Store
from tagstore.storage.writer import Writer
from tagstore.types import Fingerprint, Vectors
from tagstore.upkeep.compact import compact
from tagstore.upkeep.edits import Selection
from tagstore.upkeep.reprocessing import ground
from tagstore.upkeep.takedown import purge
from tagstore.upkeep.verify import _problems

D = 8
NAME = os.environ.get("CRASH_STORE", "toy")
"""Name of the store; a process has one."""
SPACES = {name: Fingerprint(name, name, {"size": [8, 8]}, False, True, D) for name in ("first", "second")}
WAYS = ("clock", "KILL", "TORN", "POWER", "ENOSPC", "EIO")
_MODES = {"KILL": 1, "TORN": 2, "ENOSPC": 3, "EIO": 3, "POWER": 4}

Operation = dict[str, Any]


# 1. The content of an entry follows from its key and a serial number.


def unit(*seed: Any) -> Vectors:
    """A unit vector `[D]` that depends only on its seed, with the precision of float16."""
    rng = np.random.default_rng(list(sha256(repr(seed).encode()).digest()))
    vector = rng.standard_normal(D).astype(np.float32)
    return (vector / np.linalg.norm(vector)).astype(np.float16).astype(np.float32)


def draft(key: str, serial: int) -> Draft:
    texts = sorted({f"tag {serial % 7}", f"tag {serial % 31}", f"rare {serial // 3}"})
    tags = tuple(MergedTag(t, "object", t, 1.0, 1, ((0, 0, 4),)) for t in texts)
    digest = sha256(f"{serial}".encode()).digest()
    return Draft(
        key, digest, serial, (f"picture {serial:08d}",), tags, {"serial": serial}, f"file {serial:08d}"
    )


def vectors_of(space: str, serials: list[int]) -> Vectors:
    return np.stack([unit(space, serial) for serial in serials]) if serials else np.zeros((0, D), np.float32)


# 2. The operations, as the child does them.


def ingest(root: Path, operation: Operation) -> dict[str, Any]:
    space = operation["space"]
    with Writer(root, NAME, SPACES[space], resume=operation["identity"], sync=operation["sync"]) as writer:
        progress = writer.progress or Progress(operation["identity"])
        resumed, done = progress.pairs, 0
        for batch in operation["batches"]:
            done += len(batch)
            if done <= resumed:
                continue
            drafts = [draft(key, serial) for key, serial in batch]
            admitted, rejected, unchanged = writer.admit(drafts, same_miner=True)
            progress.pairs += len(batch)
            progress.added += len(admitted)
            progress.unchanged += unchanged
            vectors = vectors_of(space, [d.perceptual_hash for d in admitted])
            writer.append(admitted, vectors, rejected=rejected, progress=progress)
        if progress.added:
            _embed_tags(writer, space)
            source, miner = {"identity": operation["identity"]}, {"name": "toy"}
            writer.commit(operation="ingest", source=source, miner=miner, indexer=faiss_index.extend)
        return {"version": writer.parent.number if writer.parent else 0, "resumed": resumed}


def delete(root: Path, operation: Operation) -> dict[str, Any]:
    with Writer(root, NAME) as writer:
        writer.delete([e.entry_id for e in Selection(keys=operation["keys"]).find(writer.store.snapshot())])
        _embed_tags(writer, writer.fingerprint.model)
        return {"version": writer.commit(operation="delete", indexer=faiss_index.extend).number}


def reembed(root: Path, operation: Operation) -> dict[str, Any]:
    space = operation["space"]
    with Writer(root, NAME, SPACES[space], new_space=True) as writer:
        entries = list(writer.store.snapshot().entries())
        random.Random(len(entries)).shuffle(entries)
        for start in range(0, len(entries), 16):
            batch = entries[start : start + 16]
            vectors = vectors_of(space, [e.perceptual_hash for e in batch])
            writer.put_vectors([e.entry_id for e in batch], vectors)
        _embed_tags(writer, space)
        return {"version": writer.commit(operation="reembed", indexer=faiss_index.extend).number}


def learn(root: Path, operation: Operation) -> dict[str, Any]:
    return {"version": ground(root, NAME).number}


def _embed_tags(writer: Writer, space: str) -> None:
    if writer.tag_embeddings and writer.new_tags(limit=1):  # as `tagstore ingest` and `delete` do
        learn_tags(writer)
    while texts := writer.new_tags(limit=16):
        writer.embed_tags(np.stack([unit(space, text) for text in texts]))


def rollback(root: Path, operation: Operation) -> dict[str, Any]:
    with Writer(root, NAME) as writer:
        return {"version": writer.rollback(operation["to"]).number}


def shrink(root: Path, operation: Operation) -> dict[str, Any]:
    return {"version": compact(root, NAME, keep=operation["keep"]).number}


def take_down(root: Path, operation: Operation) -> dict[str, Any]:
    return {"version": purge(root, NAME, Selection(keys=operation["keys"]), reason="asked for").version}


def bundle(root: Path, operation: Operation) -> dict[str, Any]:
    info = export(root, NAME, operation["path"], version=operation["of"])
    return {"version": Store(root, NAME).state()["current"], "sha256": info.sha256}


OPERATIONS = {"ingest": ingest, "delete": delete, "reembed": reembed, "rollback": rollback}
OPERATIONS |= {"ground": learn, "compact": shrink, "purge": take_down, "export": bundle}


def child() -> None:
    """Do the operations that come as lines of JSON on standard input; acknowledge them on standard output."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        message = json.loads(line)
        if "arm" in message:
            ctypes.CDLL(None).crash_arm(*(ctypes.c_long(value) for value in message["arm"]))
            continue
        try:
            answer = OPERATIONS[message["operation"]](Path(message["root"]), message)
        except Exception as error:  # noqa: BLE001  the answer is whatever a failed write raises
            answer = {"failed": f"{type(error).__name__}: {error}"}
            if "LD_PRELOAD" in os.environ:
                ctypes.CDLL(None).crash_disarm()
        print(json.dumps(answer), flush=True)


# 3. The model of a store.

Content = dict[str, int]
"""key -> serial"""


@dataclass(frozen=True)
class Model:
    """The content that a store must have: its versions, each with space and content."""

    versions: dict[int, tuple[str, Content]] = field(default_factory=dict)

    @property
    def current(self) -> int:
        return max(self.versions, default=0)

    @property
    def content(self) -> tuple[str, Content]:
        return self.versions.get(self.current, ("first", {}))

    def after(self, operation: Operation) -> Model:
        """The model once an operation is done."""
        space, content = self.content
        new = dict(content)
        keep = None
        versions = self.versions
        if operation["operation"] == "ingest":
            taken: Content = {}
            for key, serial in (item for batch in operation["batches"] for item in batch):
                taken.setdefault(key, serial)
            new.update(taken)
            if new == content:
                return self
        elif operation["operation"] in ("delete", "purge"):
            new = {key: serial for key, serial in content.items() if key not in operation["keys"]}
        elif operation["operation"] == "reembed":
            space = operation["space"]
        elif operation["operation"] == "export":
            return self
        elif operation["operation"] == "ground":
            pass
        elif operation["operation"] == "rollback":
            space, new = self.versions[operation["to"]]
        else:
            keep = operation["keep"]
        if operation["operation"] == "purge":  # the versions that held it go too
            versions = {n: v for n, v in versions.items() if not v[1].keys() & set(operation["keys"])}
        versions = {**versions, self.current + 1: (space, new)}
        return Model({n: versions[n] for n in sorted(versions)[-keep if keep else 0 :]})


def draw(rng: random.Random, model: Model, serial: Iterator[int], bundles: Path) -> Operation:
    """The next operation; bundles are written to a directory."""
    space, content = model.content
    weights = {"ingest": 10, "delete": 3, "rollback": 2, "reembed": 1, "compact": 2, "purge": 1, "export": 2}
    weights["ground"] = 2 if len(content) > 1 else 0
    kind = rng.choices(list(weights), list(weights.values()))[0] if content else "ingest"
    if kind in ("delete", "purge"):
        keys = rng.sample(sorted(content), min(len(content), rng.randint(1, 8)))
        return {"operation": kind, "keys": keys}
    if kind == "rollback":
        return {"operation": "rollback", "to": rng.choice(sorted(model.versions))}
    if kind == "reembed":
        return {"operation": "reembed", "space": "second" if space == "first" else "first"}
    if kind == "ground":
        return {"operation": "ground"}
    if kind == "export":
        version, path = rng.choice(sorted(model.versions)), str(bundles / f"{next(serial)}.bundle")
        return {"operation": "export", "of": version, "path": path}
    if kind == "compact":
        return {"operation": "compact", "keep": rng.choice([None, 1, 2, 5])}
    batches = [
        [(f"key-{rng.randrange(400):05d}", next(serial)) for _ in range(rng.randint(1, 24))]
        for _ in range(rng.randint(1, 4))
    ]
    return ingest_of(space, f"source {next(serial)}", batches, rng.choice(["full", "batch"]))


def ingest_of(
    space: str, identity: str, batches: list[list[tuple[str, int]]], sync: str = "full"
) -> Operation:
    operation = {"operation": "ingest", "space": space, "identity": identity}
    return {**operation, "batches": batches, "sync": sync}


# 4. Reading the store after a death.


def look(root: Path, *, close: bool) -> tuple[Model, list[str]]:
    """Read what a store holds, and all that is wrong with it; both empty if nothing was ever committed."""
    try:
        store = Store(root, NAME)
        store.snapshot()
    except NotFound:
        return Model(), []
    except TagstoreError as error:
        return Model(), [f"cannot be opened: {error}"]
    versions, wrong = {}, [f"verify: {p.file}: {p.what}" for p in _problems(str(root), NAME, True)]
    for version in store.versions():
        snapshot = Snapshot(store, version)
        entries = list(snapshot.entries())
        space = version.fingerprint.model
        versions[version.number] = (space, {e.key: e.perceptual_hash for e in entries})
        tags = snapshot.vocabulary()
        texts = {i: text for i, (text, _, _) in zip(tags, snapshot.tags(tags), strict=True)}
        for entry in entries:
            expected = draft(entry.key, entry.perceptual_hash)
            carried = sorted(texts[t.tag_id] for t in entry.tags)
            fields = ("sha256", "captions", "metadata", "origin")
            same = all(getattr(entry, name) == getattr(expected, name) for name in fields)
            same = same and carried == [t.text for t in expected.tags]
            if not same or snapshot.find(entry.key) != entry.entry_id:
                wrong.append(f"version {version.number}: entry {entry.entry_id} is not what was put in")
        ids = snapshot.live()
        expected_vectors = vectors_of(space, [e.perceptual_hash for e in entries])
        if not np.array_equal(snapshot.vectors(ids), expected_vectors):
            wrong.append(f"version {version.number}: vectors are not those put in")
        if tags:
            kept = snapshot.embeddings(np.array(tags))
            if version.tag_embeddings:  # learnt from pictures that may be gone; checksums tell the rest
                same = np.allclose(np.linalg.norm(kept, axis=1), 1, atol=1e-3)
            else:
                same = np.array_equal(kept, np.stack([unit(space, texts[i]) for i in tags]))
        if tags and not same:
            wrong.append(f"version {version.number}: tag embeddings are not those put in")
        nearest = faiss_index.FaissIndex(snapshot).search(expected_vectors, 1) if entries else ids[:, None]
        if not np.array_equal(nearest[:, 0], ids):
            wrong.append(f"version {version.number}: the index does not find every entry by its own vector")
    if close:
        store.env.close()
        forget(store.generation)
    return Model(versions), wrong


def orphans(root: Path) -> list[str]:
    """Files that no version needs, after another writer has swept."""
    with Writer(root, NAME, SPACES["first"], new_space=True) as writer:
        store = writer.store
        needed = {store.generation / "data.mdb", store.generation / "lock.mdb"}
        needed |= {root / NAME / "CURRENT", root / NAME / "writer.lock"}
        needed |= {store.index_directory / f["file"] for v in store.versions() for f in v.index["files"]}
        return [str(path) for path in (root / NAME).rglob("*") if path.is_file() and path not in needed]


# 5. The rounds.


@dataclass
class Figures:
    """Counts of a run."""

    ends: Counter[str] = field(default_factory=Counter)
    """Rounds by the way of dying."""
    acknowledged: Counter[str] = field(default_factory=Counter)
    """Operations by kind."""
    in_flight: Counter[str] = field(default_factory=Counter)
    """Interrupted operations, by whether they were committed."""
    refused: Counter[str] = field(default_factory=Counter)
    """Operations that raised under ENOSPC or EIO, by error."""
    went_on: int = 0
    """Operations acknowledged by a process in which one had failed before."""
    resumed_pairs: int = 0
    checks: int = 0
    """Times that a store was opened, verified and compared."""
    versions_compared: int = 0
    orphans: int = 0
    lost: list[str] = field(default_factory=list)
    """Every difference between a store and what was acknowledged, and everything that `verify` says."""


class _Child:
    def __init__(self, shim: Path | None) -> None:
        env = {**os.environ, **({"LD_PRELOAD": str(shim)} if shim else {})}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        self.process = subprocess.Popen([sys.executable, __file__], env=env, **pipes)
        self._buffer = b""

    def send(self, message: Operation) -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError):  # it died: `receive` will say so
            self.process.stdin.write(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """Wait for the next answer; None if the child died or did not answer in time."""
        assert self.process.stdout
        end = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            if not select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                return None
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return dict(json.loads(line))

    def end(self) -> dict[str, Any] | None:
        """Kill the child; returns an answer that it gave before it died."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.kill()
        code = self.process.wait()
        assert code == -signal.SIGKILL, f"the child ended by itself, with {code}"
        last = self.receive(0.0)
        self.process.stdin.close()
        self.process.stdout.close()
        return last


class Harness:
    """Rounds on stores under a directory, each until the child's death."""

    def __init__(
        self, directory: Path, seed: int, *, ways: tuple[str, ...] = WAYS, rounds_per_store: int = 10
    ) -> None:
        self.directory, self.rng, self.rounds_per_store = directory, random.Random(seed), rounds_per_store
        self.shim = build_shim(directory) if set(ways) & set(_MODES) else None
        self.ways = tuple(way for way in ways if way not in _MODES or self.shim)
        self.serial = iter(range(1, 1 << 40))
        self.figures = Figures()
        self._spare: _Child | None = None
        self._new_store()

    def _new_store(self) -> None:
        self.root = self.directory / f"root-{next(self.serial)}"
        self.bundles = self.directory / f"bundles-{self.root.name}"
        self.bundles.mkdir()
        self.bundle_sha256: dict[int, str] = {}
        self.model = Model()
        self.interrupted: Operation | None = None

    def run(self, rounds: int) -> Figures:
        try:
            for number in range(1, rounds + 1):
                self._round()
                if number % self.rounds_per_store == 0 or self.figures.lost:
                    if self.model.versions:
                        paths = orphans(self.root)
                        self.figures.orphans += len(paths)
                        self.figures.lost += [f"an orphan: {path}" for path in paths]
                        look(self.root, close=True)
                    if self.figures.lost:
                        break  # the store stays for inspection
                    shutil.rmtree(self.root, ignore_errors=True)
                    shutil.rmtree(self.bundles)
                    self._new_store()
        finally:
            if self._spare:
                self._spare.end()
        return self.figures

    def _round(self) -> None:
        figures, way = self.figures, self.rng.choice(self.ways)
        current, self._spare = self._spare or _Child(self.shim), None
        assert current.receive(60), "the child did not start"
        if way in _MODES:
            current.send({"arm": self._arm(way)})
        seconds = self.rng.uniform(0.0, 0.4) if way == "clock" else 2.5
        end, failed, after_failure = time.monotonic() + seconds, False, self.rng.randint(1, 3)
        while True:
            # the user repeats the interrupted operation, or does something else
            again, self.interrupted = self.interrupted, None
            repeated = again and self.rng.random() < 0.6
            operation = again if repeated else draw(self.rng, self.model, self.serial, self.bundles)
            self.began(operation)
            current.send({**operation, "root": str(self.root)})
            answer = current.receive(end - time.monotonic())
            if answer is None:
                answer = current.end()
                self._spare = _Child(self.shim)  # it starts while the store is read
                if answer is None:
                    figures.ends[way] += 1
                    self._resolve(operation, close=way == "POWER" or self.rng.random() < 0.5)
                    return
            if "failed" in answer:
                kind = answer["failed"].partition(":")[0]
                message = f"{operation['operation']} failed: {answer['failed']}"
                if failed or way not in ("ENOSPC", "EIO"):
                    figures.lost.append(f"though the disk was sound, {message}")
                if kind != "WriteFailed":
                    figures.lost.append(f"not with WriteFailed, {message}")
                failed = True
                figures.refused[f"{way}: {kind}"] += 1
                self._resolve(operation, close=False)
            else:
                self.settled(self.model.after(operation))
                figures.acknowledged[operation["operation"]] += 1
                figures.resumed_pairs += answer.get("resumed", 0)
                if "sha256" in answer:
                    self._compare_bundle(operation, answer["sha256"])
                figures.went_on += failed
                after_failure -= failed
                if answer["version"] != self.model.current:
                    acknowledged = f"{operation['operation']} was acknowledged as {answer['version']}"
                    figures.lost.append(f"{acknowledged}, not {self.model.current}")
            if self._spare or figures.lost or not after_failure:
                current.end() if not self._spare else None
                self._spare = self._spare or _Child(self.shim)
                figures.ends[way] += 1
                self._resolve(None, close=self.rng.random() < 0.5)
                return

    def _compare_bundle(self, operation: Operation, acknowledged: str | None) -> None:
        """Check that a bundle is complete or not there, and that a version always gives the same bytes."""
        path, number = Path(operation["path"]), operation["of"]
        if acknowledged is None and not path.exists():
            return
        digest = sha256(path.read_bytes()).hexdigest()
        if number not in self.bundle_sha256:
            again = self.bundles / "again.bundle"
            self.bundle_sha256[number] = acknowledged or export(self.root, NAME, again, version=number).sha256
        if digest != self.bundle_sha256[number] or acknowledged not in (None, digest):
            self.figures.lost.append(f"the bundle of version {number} is not what it was: {path}")

    def _arm(self, way: str) -> list[int]:
        code = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}.get(way, 0)
        first, count = self.rng.randrange(160), self.rng.choice([1, 1, 3, 10_000])
        return [_MODES[way], first, count, code, self.rng.randrange(1 << 30)]

    def _resolve(self, operation: Operation | None, *, close: bool) -> None:
        """Compare the store with what was acknowledged, with or without the operation in flight."""
        if operation and operation["operation"] == "export":
            self._compare_bundle(operation, None)
        actual, wrong = look(self.root, close=close)
        self.figures.checks += 1
        self.figures.versions_compared += len(actual.versions)
        self.figures.lost += wrong
        candidate = self.model.after(operation) if operation else self.model
        if operation:
            committed = actual == candidate != self.model
            # nothing fits a purge that was done: it would be told so
            self.interrupted = None if committed and operation["operation"] == "purge" else operation
            self.figures.in_flight["committed" if committed else "not there"] += 1
        if actual not in (self.model, candidate):
            expected = f"acknowledged is {_brief(self.model)}, in flight was {operation}"
            self.figures.lost.append(f"the store holds {_brief(actual)}, {expected}")
        self.settled(actual)

    def began(self, operation: Operation) -> None:
        """Called before the child gets an operation."""

    def settled(self, model: Model) -> None:
        """Called when it is known what the store holds: when it was acknowledged, or read."""
        self.model = model


def _brief(model: Model) -> dict[int, tuple[str, int]]:
    return {number: (space, len(content)) for number, (space, content) in model.versions.items()}


def build_shim(directory: Path) -> Path | None:
    """Compile the fault injection; None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    target, source = directory / "crash_shim.so", Path(__file__).with_name("crash_shim.c")
    options = ["-O1", "-shared", "-fPIC", "-o", target, source, "-ldl", "-lpthread"]
    subprocess.run([compiler, *options], check=True)
    return target


if __name__ == "__main__":
    child()
