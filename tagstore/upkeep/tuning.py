"""Tuning of an index to a budget: kinds and parameters are tried in turn until one holds it.

Recall is measured against exact search, with queries that no index has learned from. They come from a file,
or from stored vectors that are moved as far from their own entry as entries are from their nearest
neighbours; lists and codes are learned without these entries.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagstore.errors import BadVector, InvalidInput
from tagstore.indexing import exact, faiss_index, plans
from tagstore.indexing.gpu import device_number
from tagstore.indexing.plans import INDEX_KINDS, Advance, IndexKind, Plan
from tagstore.retrieval.engine import Engine
from tagstore.storage.rows import Allowed
from tagstore.storage.snapshot import Snapshot
from tagstore.storage.version import Version
from tagstore.storage.writer import Writer
from tagstore.types import Search, Vectors
from tagstore.upkeep.reprocessing import embed_rest

MAX_QUERIES = 1000
"""Queries made of stored vectors at most."""
TIMED_QUERIES = 200
"""Queries that are timed, one at a time."""
ADDED_PER_SECOND = {"flat": 200_000, "flat32": 200_000, "hnsw": 1500, "ivf": 20_000, "ivfpq": 10_000}
"""Vectors of 512 dimensions that one core adds to an index, roughly: to announce how long a build takes."""
SEARCH_STEPS = {
    "hnsw": ("ef_search", (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)),
    "ivf": ("nprobe", (1, 2, 4, 8, 16, 32, 64, 128, 256)),
}


@dataclass(frozen=True, slots=True)
class Budget:
    """What an index must achieve."""

    recall: float = 0.95
    """Share of the true `k` nearest entries that it must find at least."""
    k: int = 5
    memory: int | None = None
    """Bytes of the index at most, which a busy server has in memory."""
    latency: float | None = None
    """Seconds at most, median, of one query by itself: search, and similarities from the stored vectors."""

    def __post_init__(self) -> None:
        if not 0 < self.recall <= 1:
            raise InvalidInput(f"recall is {self.recall}: a share, above 0 and at most 1")
        if not 1 <= self.k <= 100:
            raise InvalidInput(f"k is {self.k}: 1 to 100")
        if (self.memory is not None and self.memory <= 0) or (self.latency is not None and self.latency <= 0):
            raise InvalidInput("memory and latency must be more than 0")

    def verdict(self, trial: Trial) -> str:
        """Return "chosen" if a trial holds the budget, else why it does not."""
        if trial.recall < self.recall:
            return f"recall {trial.recall:.3f} is less than {self.recall:g}"
        if self.latency is not None and trial.latency > self.latency:
            return f"{trial.latency * 1e3:.2f} ms are more than {self.latency * 1e3:g}"
        if self.memory is not None and trial.bytes > self.memory:
            return f"{trial.bytes:,} bytes are more than {self.memory:,}"
        return "chosen"


@dataclass(frozen=True, slots=True)
class Trial:
    """One kind of index that was tried, or why it was not."""

    plan: Plan
    bytes: int
    recall: float = 0.0
    latency: float = 0.0
    """Seconds, median."""
    seconds: float = 0.0
    """Seconds that building it took."""
    verdict: str = ""
    """"chosen", or why it was not."""

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "plan": self.plan.as_json()}


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of tuning."""

    version: Version
    trials: Sequence[Trial]
    chosen: Trial
    queries: str
    """Where the queries came from."""

    def report(self) -> dict[str, Any]:
        """As JSON: version, kind with its parameters, measured recall, and what else was tried."""
        index = {name: value for name, value in self.version.index.items() if name != "files"}
        return {
            "version": self.version.number,
            "index": index,
            "trials": [trial.as_json() for trial in self.trials],
        }


class OverBudget(InvalidInput):
    """No kind of index holds the budget; `trials` has what each achieved."""

    def __init__(self, message: str, trials: Sequence[Trial]) -> None:
        super().__init__(message)
        self.trials = trials


def build_index(
    root: str | Path,
    store: str,
    budget: Budget = Budget(),
    *,
    kind: IndexKind | str = "auto",
    queries: str | Path | None = None,
    device: str = "auto",
    advance: Advance = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Commit a version with the content of the current one and the first index that holds a budget.

    The same store gives the same bytes.

    Args:
        kind: one of `INDEX_KINDS`; "auto" tries flat, hnsw, ivf and ivfpq, in this order.
        queries: .npy file of vectors `[N, D]` of the store's encoder, like real queries; by default made of
            stored vectors.
        device: "cpu", "cuda", "cuda:N" or "auto": where lists are learned and searches measured.
        advance: called with (stage, rows) as work is done.
        say: called with what is about to be done and how long it may take.

    Raises:
        OverBudget: nothing holds the budget; the store is as it was.
        InvalidInput, BadVector: an impossible budget, kind or file.
        MissingExtra: a GPU is asked for that FAISS cannot use.
    """
    gpu = device_number(device)
    if kind != "auto" and kind not in INDEX_KINDS:
        raise InvalidInput(f"kind is '{kind}': it is auto or one of {', '.join(INDEX_KINDS)}")
    with Writer(root, store) as writer:
        assert writer.parent is not None
        embed_rest(writer)
        current = Snapshot(writer.store, writer.parent)
        live = current.live()
        if not len(live):
            raise InvalidInput(f"store '{store}' has no entries to index")
        held_out, vectors, source = _queries(current, live, queries)
        say(f"exact search for {len(vectors)} queries ({source}) ...")
        allowed = Allowed(current.array("live", np.uint8), len(live))
        truth = exact.search(current, vectors, min(budget.k, len(live)), allowed)[0]
        bench = _Bench(writer, current, live, held_out, vectors, truth, budget, gpu, advance, say)
        kinds: Sequence[IndexKind | str] = ("flat", "hnsw", "ivf", "ivfpq") if kind == "auto" else (kind,)
        trials: list[Trial] = []
        for name in kinds:
            files, trial = bench.try_kind(name)
            trials.append(trial)
            if trial.verdict == "chosen":
                about = _index_record(trial, budget, len(vectors), source, writer.parent.number + 1)
                index = faiss_index.record(about, files, live)
                version = writer.commit(operation="build-index", indexer=lambda *_, index=index: index)
                return Outcome(version, trials, trial, source)
        best = max(trials, key=lambda t: (t.recall, -t.latency))
        limits = f"recall@{budget.k} {budget.recall:g}"
        limits += f", {budget.memory:,} bytes" if budget.memory else ""
        limits += f", {budget.latency * 1e3:g} ms" if budget.latency else ""
        raise OverBudget(
            f"no index of store '{store}' holds the budget ({limits}); nothing was changed. The best found "
            f"is {_describe(best.plan)}: recall {best.recall:.3f}, {best.latency * 1e3:.2f} ms, "
            f"{best.bytes:,} bytes. Allow more, or take another kind",
            trials,
        )


def _index_record(trial: Trial, budget: Budget, queries: int, source: str, version: int) -> dict[str, Any]:
    """What a version says of an index that was tuned."""
    codes = {"flat32": "float32", "ivfpq": "one byte for eight dimensions"}.get(trial.plan.kind, "float16")
    return {
        "kind": trial.plan.kind,
        "codes": codes,
        "metric": "inner product",
        "tuned": trial.plan.as_json(),
        "recall": {
            "k": budget.k,
            "recall": round(trial.recall, 4),
            "latency_ms": round(trial.latency * 1e3, 3),
            "queries": queries,
            "source": source,
            "version": version,
        },
    }


@dataclass(frozen=True, slots=True)
class _Bench:
    """Builds indexes beside the committed one and measures them; those that are not chosen are removed."""

    writer: Writer
    current: Snapshot
    live: NDArray[np.int64]
    """Ids of the entries to index."""
    held_out: NDArray[np.int64]
    """Ids that nothing is learned from."""
    queries: Vectors
    truth: NDArray[np.float32]
    """Similarities of the true neighbours of each query, best first."""
    budget: Budget
    gpu: int | None
    advance: Advance
    say: Callable[[str], None]

    def try_kind(self, name: IndexKind | str) -> tuple[list[dict[str, Any]], Trial]:
        """Build a kind and find the least search effort that reaches the recall; returns its files."""
        rows, d, budget = len(self.live), self.current.dimension, self.budget
        try:
            plan = plans.plan_for(name, rows, d)  # type: ignore[arg-type]
        except InvalidInput as error:
            return [], Trial(Plan(name), 0, verdict=str(error))  # type: ignore[arg-type]
        size = plans.file_bytes(plan, rows, d)
        if budget.memory is not None and size > budget.memory:
            return [], Trial(plan, size, verdict=f"not built: {size:,} bytes are more than {budget.memory:,}")
        seconds = rows / ADDED_PER_SECOND[plan.kind] * d / 512
        self.say(f"{_describe(plan)}: building for {rows:,} entries takes about {_spell(seconds)} ...")
        start = time.perf_counter()
        version = replace(self.current.version, number=self.current.version.number + 1, index={})
        snapshot = Snapshot(self.writer.store, version)
        files = self._build(snapshot, plan)
        trial = Trial(plan, sum(f["bytes"] for f in files), seconds=time.perf_counter() - start)
        for step in _search_steps(plan):
            if plan != Plan("flat"):
                files[0] = {**files[0], "plan": step.as_json()}
            trial = self._measure(snapshot, replace(trial, plan=step), files)
            late = budget.latency is not None and trial.latency > budget.latency
            if trial.recall >= budget.recall or late:
                break
        trial = replace(trial, verdict=budget.verdict(trial))
        if trial.verdict != "chosen":
            for file in files:
                (self.writer.store.index_directory / file["file"]).unlink()
        return files, trial

    def _build(self, snapshot: Snapshot, plan: Plan) -> list[dict[str, Any]]:
        directory = self.writer.store.index_directory
        if plan == Plan("flat"):
            index = faiss_index.extend(snapshot, None, directory, whole=True, advance=self.advance)
            return list(index["files"])
        file = faiss_index.write(
            snapshot,
            plan,
            self.live,
            0,
            self.writer.next_entry_id,
            directory,
            advance=self.advance,
            held_out=self.held_out,
            name=f"-{plan.kind}",
            gpu=self.gpu,
        )
        return [file]

    def _measure(self, snapshot: Snapshot, trial: Trial, files: Sequence[Mapping[str, Any]]) -> Trial:
        index = {**_index_record(trial, self.budget, 0, "", 0), "files": files}
        device = "cpu" if self.gpu is None else f"cuda:{self.gpu}"
        engine = Engine(Snapshot(snapshot.store, replace(snapshot.version, index=index)), device=device)
        search = Search(k=self.truth.shape[1])
        neighbours = [engine.nearest(query[None], search)[0] for query in self.queries]
        # entries of equal similarity count alike; the tolerance is for exact search's other order of summing
        hits = [
            np.count_nonzero(np.array(similarities) >= true[-1] - 1e-5)
            for (_, similarities, _), true in zip(neighbours, self.truth, strict=True)
        ]
        recall = float(np.minimum(hits, self.truth.shape[1]).sum() / self.truth.size)
        times = []
        for query in self.queries[:TIMED_QUERIES]:
            start = time.perf_counter()
            engine.nearest(query[None], search)
            times.append(time.perf_counter() - start)
        return replace(trial, recall=recall, latency=float(np.median(times)))


def _search_steps(plan: Plan) -> Iterator[Plan]:
    """Yield the plan with more and more search effort."""
    if plan.exact:
        yield plan
        return
    name, steps = SEARCH_STEPS["hnsw" if plan.kind == "hnsw" else "ivf"]
    for step in steps:
        if name == "nprobe" and step > plan.build["lists"]:
            return
        yield replace(plan, search={**plan.search, name: step})
    if "refine" in plan.search:
        for refine in (16, 32, 64):
            yield replace(plan, search={name: min(steps[-1], plan.build["lists"]), "refine": refine})


def _queries(
    snapshot: Snapshot, live: NDArray[np.int64], path: str | Path | None
) -> tuple[NDArray[np.int64], Vectors, str]:
    """The entries to hold out, unit queries, and where these come from."""
    d = snapshot.dimension
    if path is not None:
        try:
            given = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InvalidInput(f"{path} is no .npy file of vectors: {error}") from error
        if given.ndim != 2 or given.shape[1] != d or not len(given):
            raise BadVector(
                f"{path} holds an array of shape {list(given.shape)}, the store's vectors are [N, {d}]"
            )
        rows = given.astype(np.float32)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        if not (np.isfinite(norms) & (norms > 0)).all():
            raise BadVector(f"{path} holds a vector without a direction: NaN, infinite or only zeros")
        return np.zeros(0, np.int64), rows / norms, f"{len(rows)} of {Path(path).name}"
    rng = np.random.default_rng(plans.SEED)
    # at most a tenth of the entries: the rest is there to learn from
    chosen = np.sort(rng.choice(live, min(-(-len(live) // 10), MAX_QUERIES), replace=False))
    stored = snapshot.vectors(chosen)
    allowed = Allowed(snapshot.array("live", np.uint8), len(live))
    probe = stored[:: max(1, len(stored) // 100)]
    nearest = exact.search(snapshot, probe, min(2, len(live)), allowed)[0][:, -1]
    cosine = float(np.clip(np.median(nearest), 0.5, 0.98))
    noise = rng.standard_normal(stored.shape, dtype=np.float32)
    noise -= (noise * stored).sum(axis=1, keepdims=True) * stored
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    moved: Vectors = np.float32(cosine) * stored + np.float32(np.sqrt(1 - cosine**2)) * noise
    moved /= np.linalg.norm(moved, axis=1, keepdims=True)
    return chosen, moved, f"{len(chosen)} stored vectors, moved to cosine {cosine:.2f} of themselves"


def _describe(plan: Plan) -> str:
    numbers = ", ".join(f"{name} {value}" for name, value in {**plan.build, **plan.search}.items())
    return f"{plan.kind} ({numbers})" if numbers else plan.kind


def _spell(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
