"""The ingest pipeline: pairs from a reader become a version of a store.

    read ─▶ decode + hash (threads) ─▶ admit ─▶ embed ─▶ mine ─▶ append ... ─▶ embed new tags ─▶ index ─▶ commit

One batch is decoded while the one before it is embedded; nothing else is in memory, whatever the length of the source. Every
append says how far the source was consumed, so an ingest that was cut off is taken up where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tagstore.encoding.encoder import Encoder, load_encoder, load_encoder_of
from tagstore.encoding.images import decode, perceptual_hash
from tagstore.errors import BadImage, InvalidInput, NotFound
from tagstore.indexing import faiss_index
from tagstore.mining import Miner, Rules, identity, load_miner, load_rules, merge
from tagstore.readers import Columns, read
from tagstore.storage.lmdb_files import writing
from tagstore.storage.staging import Draft, Progress, Sync
from tagstore.storage.store import Store, check_name
from tagstore.storage.writer import Writer
from tagstore.types import Pair, Rejected

log = logging.getLogger(__name__)

BATCH = 256
BATCH_BYTES = 128 << 20
"""A batch of huge photographs ends early, so that memory stays what it is with small ones."""
SHOWN = 1000
"""Quarantined pairs that a report holds; the version, if one was made, has them all."""

Advance = Callable[[str, int], None]
"""Called with the name of a stage and how many pairs (or tags) it has done since."""


Outcome = Literal["added", "unchanged", "quarantined"]
Settled = Callable[[list[tuple[str, Outcome, str]]], None]
"""Called with (key, outcome, reason) of each pair of a batch, once what is to be written of it is."""


@dataclass(slots=True)
class Report:
    """What an ingest did."""

    store: str
    version: int
    pairs: int = 0
    """Read from the source, quarantined ones included."""
    added: int = 0
    """Entries written: new ones, and those that replaced an entry of the same key."""
    unchanged: int = 0
    """Pairs that the store already had as they are."""
    entries: int = 0
    """Of the version, as are the two below."""
    tags: int = 0
    unique_tags: int = 0
    quarantined: list[Rejected] = field(default_factory=list)
    """The first `SHOWN`."""
    reasons: dict[str, int] = field(default_factory=dict)
    """How many were quarantined for what, without the particulars."""
    resumed: int = 0
    """Pairs that an earlier run, cut off, had already done."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of the pipeline by what it was spent on or waiting for, and "total"."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    draft: Draft
    pair: Pair
    pixels: NDArray[np.uint8]


def ingest(
    source: str,
    *,
    root: str | Path,
    store: str,
    format: str | None = None,
    columns: Columns = Columns(),  # noqa: B008  frozen
    allow_outside: bool = False,
    encoder: str | Encoder | None = None,
    miner: str | Miner = "rules",
    vocabulary: Rules | None = None,
    device: str = "auto",
    sync: Sync = "full",
    progress: Advance = lambda stage, done: None,
) -> Report:
    """Read a source into a store, which is made if it isn't there, and commit the result as its next version.

    If an ingest of the same source, encoder and miner was cut off before, its work is kept as far as the source still reads the same.

    Args:
        source: file, folder, glob or brace pattern; see `readers`.
        root: directory of the stores.
        store: name of the store.
        format: of the source; found by looking if not given.
        columns: names of the source's columns, where they aren't the usual ones.
        allow_outside: follow image paths that lead out of the source's folder.
        encoder: spec or encoder; the store's own if not given, `mini` for a new store.
        miner: spec or miner.
        vocabulary: stop list and synonyms; the shipped ones if not given.
        device: for an encoder given by spec.
        sync: `full`: what an append has taken survives a power cut at once; `batch`: at the commit. The version does in both.
        progress: called as work is done.

    Raises:
        InvalidInput, NotFound: a source that can't be read at all, or of which every pair was refused.
        FingerprintMismatch: the store holds vectors of another encoder.
        Busy: another process writes to the store.
    """
    check_name(store)
    clock = _Clock()

    def pairs() -> Iterator[Pair | Rejected]:
        return _peeked(read(source, format=format, columns=columns, allow_outside=allow_outside))

    found = pairs()
    with clock("load"):
        if not isinstance(encoder, Encoder):
            encoder = _encoder_for(root, store, encoder, device)
        if isinstance(miner, str):
            miner = load_miner(miner)
    rules = vocabulary or load_rules()
    about = identity(miner, rules)
    where = {
        "path": os.path.abspath(source),
        "format": format,
        "columns": asdict(columns),
        "allow_outside": allow_outside,
    }
    same = json.dumps([where, about, encoder.fingerprint.digest], sort_keys=True)
    mark = hashlib.sha256(same.encode()).hexdigest()

    with Writer(root, store, encoder.fingerprint, resume=mark, sync=sync) as writer:
        reached = writer.progress
        with clock("read"):
            resumes = reached is not None and _consume(found, reached, writer)
        if resumes:
            return _Run(
                where, about, encoder, miner, rules, writer, reached or Progress(mark), clock, progress
            ).finish(found)
    # a fresh start, or another source than the one that was cut off: what that one staged is swept away
    with Writer(root, store, encoder.fingerprint, sync=sync) as writer:
        try:
            return _Run(where, about, encoder, miner, rules, writer, Progress(mark), clock, progress).finish(
                pairs() if reached else found
            )
        except InvalidInput:
            if writer.parent is None:
                with writing(f"store '{store}'"):
                    shutil.rmtree(
                        writer.directory
                    )  # a source of which nothing can be used leaves no empty store behind
            raise


def ingest_pairs(
    pairs: Iterable[Pair | Rejected],
    *,
    root: str | Path,
    store: str,
    source: str = "",
    encoder: str | Encoder | None = None,
    miner: str | Miner = "rules",
    device: str = "auto",
    sync: Sync = "full",
    settled: Settled = lambda results: None,
) -> Report:
    """As `ingest`, of pairs that come from elsewhere than a file; what was cut off is not taken up again.

    Pairs are consumed as they are worked on, two batches at most ahead. If their iterator raises, no version is made.

    Args:
        source: what to call where they come from.
        settled: called as batches are done.
    """
    check_name(store)
    clock = _Clock()
    with clock("load"):
        encoder = encoder if isinstance(encoder, Encoder) else _encoder_for(root, store, encoder, device)
        miner = load_miner(miner) if isinstance(miner, str) else miner
    rules = load_rules()
    where = {"stream": source}
    with Writer(root, store, encoder.fingerprint, sync=sync) as writer:
        try:
            run = _Run(
                where,
                identity(miner, rules),
                encoder,
                miner,
                rules,
                writer,
                Progress(""),
                clock,
                lambda stage, done: None,
                settled,
            )
            return run.finish(iter(pairs))
        except Exception:
            if writer.parent is None:
                with writing(f"store '{store}'"):
                    shutil.rmtree(writer.directory)  # nothing was ever committed to it
            raise


class _Run:
    """One ingest under way."""

    def __init__(
        self,
        source: Mapping[str, Any],
        about: Mapping[str, Any],
        encoder: Encoder,
        miner: Miner,
        rules: Rules,
        writer: Writer,
        progress: Progress,
        clock: _Clock,
        advance: Advance,
        settled: Settled = lambda results: None,
    ) -> None:
        self.source, self.about, self.encoder, self.miner, self.rules = source, about, encoder, miner, rules
        self.writer, self.progress, self.clock, self.advance = writer, progress, clock, advance
        self.settled = settled
        self.same_miner = writer.parent is not None and writer.parent.miner == about
        self.report = Report(
            writer.name, writer.parent.number if writer.parent else 0, resumed=progress.pairs
        )

    @property
    def _name(self) -> str:
        return str(self.source.get("path") or self.source.get("stream") or "the stream")

    def finish(self, pairs: Iterator[Pair | Rejected]) -> Report:
        """Consume the pairs, commit, and say what was done."""
        writer, report, progress = self.writer, self.report, self.progress
        for refused in writer.refused():
            self._note(refused)
        with ThreadPoolExecutor(os.cpu_count(), "decode") as pool:
            for batch in self._batches(pairs, pool):
                self._take(batch)
        report.pairs, report.added, report.unchanged = progress.pairs, progress.added, progress.unchanged
        if not report.added and not writer.parent:
            first = (
                f"{r.key}: {r.reason}"
                if (r := next(iter(report.quarantined), None))
                else "the source is empty"
            )
            raise InvalidInput(
                f"none of the {report.pairs} pairs of {self._name} can be used; the first: {first}"
            )
        if report.added:
            while texts := writer.new_tags(limit=4096):
                with self.clock("embed tags"):
                    vectors = self.encoder.encode_texts(texts)
                with self.clock("store"):
                    writer.embed_tags(vectors)
                self.advance("tags", len(texts))
            with self.clock("commit"):
                version = writer.commit(
                    operation="ingest", source=self.source, miner=self.about, indexer=faiss_index.extend
                )
            report.version = version.number
        if writer.parent:
            report.entries, report.tags, report.unique_tags = (
                writer.parent.entries,
                writer.parent.tags,
                writer.parent.unique_tags,
            )
        report.seconds = self.clock.seconds()
        return report

    def _take(self, batch: list[tuple[bytes, _Prepared | Rejected]]) -> None:
        rejected = [item for _, item in batch if isinstance(item, Rejected)]
        good = [item for _, item in batch if isinstance(item, _Prepared)]
        with self.clock("store"):
            admitted, duplicates, unchanged = self.writer.admit(
                [item.draft for item in good], same_miner=self.same_miner
            )
        rejected += duplicates
        kept = {id(draft) for draft in admitted}
        good = [item for item in good if id(item.draft) in kept]
        vectors, mined = None, []
        if good:
            with self.clock("embed"):
                vectors = self.encoder.encode_images(np.stack([item.pixels for item in good]))
            with self.clock("mine"):
                mined = [
                    self.rules.apply(merge(tags)) for tags in self.miner.mine(item.pair for item in good)
                ]
        progress = self.progress
        progress.pairs += len(batch)
        progress.added += len(good)
        progress.unchanged += unchanged
        progress.digest = _digest(progress.digest, (digest for digest, _ in batch))
        with self.clock("store"):
            drafts = [replace(item.draft, tags=tags) for item, tags in zip(good, mined, strict=True)]
            self.writer.append(drafts, vectors, rejected=rejected, progress=progress)
        for refused in rejected:
            self._note(refused)
        self.advance("pairs", len(batch))
        self._settle(
            batch, {item.draft.key for item in good}, {refused.key: refused.reason for refused in rejected}
        )

    def _settle(
        self, batch: list[tuple[bytes, _Prepared | Rejected]], new: set[str], refusals: Mapping[str, str]
    ) -> None:
        results: list[tuple[str, Outcome, str]] = []
        for _, item in batch:
            key = item.key if isinstance(item, Rejected) else item.draft.key
            if key in new and isinstance(item, _Prepared):
                new.remove(key)  # a second one of the same key is a duplicate
                results.append((key, "added", ""))
            elif key in refusals:
                results.append((key, "quarantined", refusals[key]))
            else:
                results.append((key, "unchanged", ""))
        self.settled(results)

    def _note(self, refused: Rejected) -> None:
        report = self.report
        reason = refused.reason.split(":")[0]
        report.reasons[reason] = report.reasons.get(reason, 0) + 1
        if len(report.quarantined) < SHOWN:
            report.quarantined.append(refused)
        log.info("quarantined %s: %s", refused.key, refused.reason)

    def _batches(
        self, pairs: Iterator[Pair | Rejected], pool: ThreadPoolExecutor
    ) -> Iterator[list[tuple[bytes, _Prepared | Rejected]]]:
        """Batches in order, the next one in the making while the caller works on one."""

        # an entry's origin is told from the source's folder on; the version says which that is
        folder = os.path.join(os.path.dirname(re.split(r"[*?\[{]", self.source.get("path", ""))[0]), "")

        def submit() -> list[Future[tuple[bytes, _Prepared | Rejected]]]:
            with self.clock("read"):
                return [pool.submit(_prepare, item, self.encoder, folder) for item in _some(pairs)]

        ahead = submit()
        while ahead:
            current, ahead = ahead, submit()
            with self.clock("decode"):
                batch = [future.result() for future in current]
            yield batch


def _some(pairs: Iterator[Pair | Rejected]) -> Iterator[Pair | Rejected]:
    size = 0
    for item in islice(pairs, BATCH):
        yield item
        size += len(item.image) + sum(map(len, item.captions)) if isinstance(item, Pair) else 0
        if size > BATCH_BYTES:
            return


def _prepare(item: Pair | Rejected, encoder: Encoder, folder: str) -> tuple[bytes, _Prepared | Rejected]:
    """What identifies an item of the source, and what became of it."""
    digest = hashlib.sha256(item.image).digest() if isinstance(item, Pair) else b""
    mark = _item_digest(item, digest)
    if isinstance(item, Rejected):
        return mark, item
    try:
        image = decode(item.image)
        pixels = encoder.prepare(image)
    except BadImage as error:
        return mark, Rejected(item.key, str(error), item.origin)
    draft = Draft(
        item.key,
        digest,
        perceptual_hash(image),
        item.captions,
        metadata=item.metadata,
        origin=item.origin.removeprefix(folder),
    )
    # the encoded bytes are done with: a batch in waiting holds pixels at the tower's size, not photographs
    return mark, _Prepared(draft, replace(item, image=b""), pixels)


def _item_digest(item: Pair | Rejected, image: bytes) -> bytes:
    """Of all that an ingest reads of an item; `image` is the sha256 of a pair's image."""
    if isinstance(item, Rejected):
        about = [item.key, item.reason]
    else:
        about = [item.key, image.hex(), *item.captions, json.dumps(dict(item.metadata), sort_keys=True)]
    return hashlib.sha256(json.dumps(about).encode()).digest()


def _digest(before: str, items: Iterable[bytes]) -> str:
    return hashlib.sha256(before.encode() + b"".join(items)).hexdigest()


def _consume(pairs: Iterator[Pair | Rejected], reached: Progress, writer: Writer) -> bool:
    """Skip what an interrupted run did, batch by batch as it did; false if the source reads differently now."""
    done, digest = 0, ""
    while done < reached.pairs:
        batch = list(_some(pairs))
        if not batch:
            return False
        done += len(batch)
        images = (hashlib.sha256(item.image).digest() if isinstance(item, Pair) else b"" for item in batch)
        digest = _digest(digest, map(_item_digest, batch, images))
        writer.confirm([item.key for item in batch])
    return done == reached.pairs and digest == reached.digest


def _encoder_for(root: str | Path, store: str, spec: str | None, device: str) -> Encoder:
    """The one asked for; the writer refuses it if the store has another."""
    if spec is not None:
        return load_encoder(spec, device=device)
    try:
        return load_encoder_of(Store(root, store).snapshot().version.fingerprint, device=device)
    except NotFound:
        return load_encoder(device=device)


def _peeked(items: Iterable[Pair | Rejected]) -> Iterator[Pair | Rejected]:
    """The same items; but a source that can't be read at all raises now, before anything is made on disk."""
    iterator = iter(items)
    first = next(iterator, None)
    return iter(()) if first is None else chain([first], iterator)


class _Clock:
    """Wall seconds by stage."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent[stage] = self._spent.get(stage, 0.0) + time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        total = time.perf_counter() - self._start
        return {**{stage: round(spent, 3) for stage, spent in self._spent.items()}, "total": round(total, 3)}
