"""The ingest pipeline: pairs from a reader become a version of a store.

    read ─▶ decode + hash (threads) ─▶ admit ─▶ embed ─▶ mine ─▶ append ... ─▶ embed new tags ─▶ index ─▶ commit

One batch is decoded while the one before it is embedded; nothing else is in memory, whatever the length of the source.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from tagstore import faiss_index
from tagstore.encoder import Encoder, load_encoder
from tagstore.errors import BadImage, FingerprintMismatch, InvalidInput
from tagstore.images import decode, perceptual_hash
from tagstore.mining import Miner, load_miner, merge
from tagstore.readers import Columns, read
from tagstore.store import Store, check_name, store_names
from tagstore.types import Pair, Rejected
from tagstore.writer import Draft, Writer

log = logging.getLogger(__name__)

BATCH = 256
BATCH_BYTES = 128 << 20
"""A batch of huge photographs ends early, so that memory stays what it is with small ones."""
SHOWN = 1000
"""Quarantined pairs that a report holds; the file it names has them all."""

Progress = Callable[[str, int], None]
"""Called with the name of a stage and how many pairs (or tags) it has done since."""


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
    quarantine: str = ""
    """File that lists every quarantined pair, JSON Lines; empty if there is none."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of the pipeline by what it was spent on or waiting for, and "total"."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    pair: Pair
    sha256: bytes
    perceptual_hash: int
    pixels: NDArray[np.uint8]


def ingest(
    source: str,
    *,
    root: str | Path,
    store: str,
    format: str | None = None,
    columns: Columns = Columns(),  # noqa: B008  frozen
    encoder: str | Encoder | None = None,
    miner: str | Miner = "rules",
    device: str = "auto",
    progress: Progress = lambda stage, done: None,
) -> Report:
    """Read a source into a store, which is made if it isn't there, and commit the result as its next version.

    Args:
        source: file, folder, glob or brace pattern; see `readers`.
        root: directory of the stores.
        store: name of the store.
        format: of the source; found by looking if not given.
        columns: names of the source's columns, where they aren't the usual ones.
        encoder: spec or encoder; the store's own if not given, `mini` for a new store.
        miner: spec or miner.
        device: for an encoder given by spec.
        progress: called as work is done.

    Raises:
        InvalidInput, NotFound: a source that can't be read at all, or of which every pair was refused.
        FingerprintMismatch: the store holds vectors of another encoder.
        Busy: another process writes to the store.
    """
    check_name(store)
    clock = _Clock()
    pairs = _peeked(read(source, format=format, columns=columns))
    with clock("load"):
        if not isinstance(encoder, Encoder):
            encoder = _encoder_for(root, store, encoder, device)
        if isinstance(miner, str):
            miner = load_miner(miner)
    identity = {"name": miner.name, "version": miner.version, "settings": dict(miner.settings)}

    with Writer(root, store, encoder.fingerprint) as writer, ThreadPoolExecutor(os.cpu_count(), "decode") as pool:
        report = Report(store, writer.parent.number if writer.parent else 0)
        same_miner = writer.parent is not None and writer.parent.miner == identity
        with _Quarantine(writer.directory, report) as quarantine:
            for batch in _prepared(pairs, encoder, pool, clock, report):
                drafts: list[tuple[Draft, _Prepared]] = []
                for item in batch:
                    if isinstance(item, Rejected):
                        quarantine.add(item)
                    else:
                        drafts.append((_draft(item), item))
                with clock("store"):
                    admitted, rejected, unchanged = writer.admit([draft for draft, _ in drafts], same_miner=same_miner)
                for refused in rejected:
                    quarantine.add(refused)
                report.unchanged += unchanged
                kept = {id(draft) for draft in admitted}
                _append(writer, [(draft, item) for draft, item in drafts if id(draft) in kept], encoder, miner, clock)
                report.added += len(admitted)
                progress("pairs", len(batch))
            if not report.added and not writer.parent:
                raise InvalidInput(f"none of the {report.pairs} pairs of {source} can be used; the first: {_line(report.quarantined)}")
            if report.added:
                _embed_tags(writer, encoder, clock, progress)
                with clock("index"):
                    version = writer.commit(operation="ingest", source=source, miner=identity, indexer=faiss_index.build)
                report.version = version.number
            quarantine.settle(report.version)
        if writer.parent:
            report.entries, report.tags, report.unique_tags = writer.parent.entries, writer.parent.tags, writer.parent.unique_tags
    report.seconds = clock.seconds()
    return report


def _append(writer: Writer, drafts: list[tuple[Draft, _Prepared]], encoder: Encoder, miner: Miner, clock: _Clock) -> None:
    if not drafts:
        return
    with clock("embed"):
        vectors = encoder.encode_images(np.stack([item.pixels for _, item in drafts]))
    with clock("mine"):
        mined = [merge(tags) for tags in miner.mine(item.pair for _, item in drafts)]
    with clock("store"):
        tagged = [
            Draft(d.key, d.sha256, d.perceptual_hash, d.captions, tags, d.metadata, d.origin)
            for (d, _), tags in zip(drafts, mined, strict=True)
        ]
        writer.append(tagged, vectors)


def _embed_tags(writer: Writer, encoder: Encoder, clock: _Clock, progress: Progress) -> None:
    while texts := writer.new_tags(limit=4096):
        with clock("embed tags"):
            vectors = encoder.encode_texts(texts)
        with clock("store"):
            writer.embed_tags(vectors)
        progress("tags", len(texts))


def _draft(item: _Prepared) -> Draft:
    pair = item.pair
    return Draft(pair.key, item.sha256, item.perceptual_hash, pair.captions, (), pair.metadata, pair.origin)


def _prepared(
    pairs: Iterator[Pair | Rejected], encoder: Encoder, pool: ThreadPoolExecutor, clock: _Clock, report: Report
) -> Iterator[list[_Prepared | Rejected]]:
    """Batches in order, the next one in the making while the caller works on one."""

    def submit() -> list[Future[_Prepared | Rejected]]:
        with clock("read"):
            batch = list(_some(pairs))
        report.pairs += len(batch)
        return [pool.submit(_prepare, item, encoder) for item in batch]

    ahead = submit()
    while ahead:
        current, ahead = ahead, submit()
        with clock("decode"):
            batch = [future.result() for future in current]
        yield batch


def _some(pairs: Iterator[Pair | Rejected]) -> Iterator[Pair | Rejected]:
    size = 0
    for item in islice(pairs, BATCH):
        yield item
        size += len(item.image) if isinstance(item, Pair) else 0
        if size > BATCH_BYTES:
            return


def _prepare(item: Pair | Rejected, encoder: Encoder) -> _Prepared | Rejected:
    if isinstance(item, Rejected):
        return item
    try:
        image = decode(item.image)
    except BadImage as error:
        return Rejected(item.key, str(error), item.origin)
    return _Prepared(
        # the encoded bytes are done with: a batch in waiting holds pixels at the tower's size, not photographs
        Pair(item.key, b"", item.captions, item.metadata, item.origin),
        hashlib.sha256(item.image).digest(),
        perceptual_hash(image),
        encoder.prepare(image),
    )


def _encoder_for(root: str | Path, store: str, spec: str | None, device: str) -> Encoder:
    stored = None
    if store in store_names(root):
        opened = Store(root, store)
        if opened.state()["current"]:
            stored = opened.snapshot().version.fingerprint
    encoder = load_encoder(spec or (stored.model if stored else "mini"), device=device)
    if stored and encoder.fingerprint.digest != stored.digest:
        raise FingerprintMismatch.between(store, stored, encoder.fingerprint)
    return encoder


def _peeked(items: Iterable[Pair | Rejected]) -> Iterator[Pair | Rejected]:
    """The same items; but a source that can't be read at all raises now, before anything is made on disk."""
    iterator = iter(items)
    first = next(iterator, None)
    return iter(()) if first is None else chain([first], iterator)


def _line(rejected: list[Rejected]) -> str:
    return f"{rejected[0].key}: {rejected[0].reason}" if rejected else "the source is empty"


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


class _Quarantine:
    """Rejected pairs: all of them in a file beside the store, the first in the report."""

    def __init__(self, directory: Path, report: Report) -> None:
        self._path, self._report = directory / "quarantine.tmp", report
        self._exit = ExitStack()
        self._file: TextIO | None = None

    def __enter__(self) -> _Quarantine:
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()
        self._path.unlink(missing_ok=True)

    def add(self, rejected: Rejected) -> None:
        if self._file is None:
            self._file = self._exit.enter_context(self._path.open("w", encoding="utf-8"))
        record: Mapping[str, Any] = {"key": rejected.key, "reason": rejected.reason, "origin": rejected.origin}
        self._file.write(json.dumps(record, ensure_ascii=True) + "\n")
        reason = rejected.reason.split(":")[0]
        self._report.reasons[reason] = self._report.reasons.get(reason, 0) + 1
        if len(self._report.quarantined) < SHOWN:
            self._report.quarantined.append(rejected)
        log.info("quarantined %s: %s", rejected.key, rejected.reason)

    def settle(self, version: int) -> None:
        """Keep the file under the version's number."""
        if self._file is not None:
            self._file.close()
            kept = self._path.with_name(f"quarantine-{version:08d}.jsonl")
            self._path.replace(kept)
            self._report.quarantine = str(kept)
