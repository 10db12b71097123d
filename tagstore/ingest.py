"""The ingest pipeline: pairs from a reader become a version of a store.

    read ─▶ decode + hash (threads) ─▶ admit ─▶ embed ─▶ mine ─▶ append ... ─▶ embed tags ─▶ index ─▶ commit

One batch is decoded while the one before it is embedded; nothing else is in memory, whatever the length of
the source. Every append says how far the source was read, so an ingest that was cut off is resumed there.
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

from tagstore.encoding.decode_memory import SHARED, MemoryBudget
from tagstore.encoding.encoder import Encoder, load_encoder, load_encoder_of
from tagstore.encoding.images import decoding, perceptual_hash
from tagstore.errors import BadImage, InvalidInput, NotFound
from tagstore.indexing import faiss_index
from tagstore.mining import (
    Miner,
    Pictures,
    Rules,
    identity,
    load_miner,
    load_rules,
    merge,
    mine_seen,
    reads_pictures,
    unread_captions,
)
from tagstore.readers import Columns, read
from tagstore.readers.pair_check import MAX_NOTE_CHARS, checked
from tagstore.storage.environments import writing
from tagstore.storage.grounding import ground
from tagstore.storage.staging import Draft, Progress, Sync
from tagstore.storage.store import Store, check_name
from tagstore.storage.writer import Writer
from tagstore.types import Pair, Rejected, Vectors

log = logging.getLogger(__name__)

BATCH = 256
"""Pairs of a batch at most."""
BATCH_BYTES = 128 << 20
"""Bytes of images and captions after which a batch ends early, so that memory stays bounded."""
TEXT_BYTES, VALUE_COPIES = 64, 20
"""Bytes of a text in memory beside its characters; how much larger than JSON its values may be."""
MAX_REPORTED_REJECTS = 1000
"""Quarantined pairs that a report holds; the version, if one was made, has them all."""
TAG_BATCH = 4096
"""Tags embedded at a time."""

Advance = Callable[[str, int], None]
"""Called with the name of a stage and how many pairs (or tags) it has done since."""
Outcome = Literal["added", "unchanged", "quarantined"]
Settled = Callable[[list[tuple[str, Outcome, str]]], None]
"""Called with (key, outcome, reason) of each pair of a batch, once its entries are written."""
Pairs = Iterator[Pair | Rejected]


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
    """Entries of the version."""
    tags: int = 0
    """Tags of the version, over all entries."""
    unique_tags: int = 0
    """Different tags of the version."""
    quarantined: list[Rejected] = field(default_factory=list)
    """The first `MAX_REPORTED_REJECTS`."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Pairs quarantined, by reason without its particulars."""
    captions: int = 0
    """Captions that were mined in this run, if the miner counts them."""
    unread: dict[str, int] = field(default_factory=dict)
    """Those in languages that the miner does not read, by ISO 639-1 code."""
    resumed: int = 0
    """Pairs that an earlier run, cut off, had already done."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of the pipeline by what it was spent on or waiting for, and "total"."""


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

    If an ingest of the same source, encoder and miner was cut off before, its work is kept, unless the source
    has changed.

    Args:
        source: file, folder, glob or brace pattern; see `readers`.
        root: directory of the stores.
        store: name of the store.
        format: of the source; found by looking if not given.
        columns: names of the source's columns, where they aren't the usual ones.
        allow_outside: follow image paths that lead out of the source's folder.
        encoder: spec or encoder; by default the store's own, `mini` for a new store.
        miner: spec or miner.
        vocabulary: stop list and synonyms; the shipped ones if not given.
        device: for an encoder given by spec.
        sync: when appends reach the disk: `full`, each at once; `batch`, all of them at the commit. The
            version is durable in both.
        progress: called as work is done.

    Raises:
        InvalidInput, NotFound: a source that can't be read at all, or whose pairs were all refused.
        FingerprintMismatch: the store holds vectors of another encoder.
        Busy: another process writes to the store.
    """
    check_name(store)
    where = {
        "path": os.path.abspath(source),
        "format": format,
        "columns": asdict(columns),
        "allow_outside": allow_outside,
    }

    miner = load_miner(miner) if isinstance(miner, str) else miner
    optional = reads_pictures(miner)

    def read_source() -> Pairs:
        items = read(
            source,
            format=format,
            columns=columns,
            allow_outside=allow_outside,
            captions_optional=optional,
        )
        return _peeked(checked(item, captions_optional=optional) for item in items)

    pairs = read_source()
    run = _Run(root, store, where, encoder, miner, vocabulary or load_rules(), device, progress)
    about = json.dumps([where, run.miner_identity, run.encoder.fingerprint.digest], sort_keys=True)
    mark = hashlib.sha256(about.encode()).hexdigest()
    with Writer(root, store, run.encoder.fingerprint, resume=mark, sync=sync) as writer:
        reached = writer.progress
        if reached is not None:
            with run.clock("read"):
                unchanged = _skip(pairs, reached, writer)
            if unchanged:
                return run.finish(pairs, writer, reached)
            writer.discard()
            pairs = read_source()
        try:
            return run.finish(pairs, writer, Progress(mark))
        except InvalidInput:
            _remove_if_empty(writer)
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
    batch: int = BATCH,
    batch_bytes: int = BATCH_BYTES,
    decode_memory: MemoryBudget = SHARED,
    decoded: Callable[[Pair], None] = lambda pair: None,
) -> Report:
    """As `ingest`, of pairs that come from elsewhere than a file; what was cut off is not resumed.

    Pairs are read at most two batches ahead. If their iterator raises, no version is made.

    Args:
        source: what to call where they come from, at most `MAX_NOTE_CHARS` characters.
        settled: called as batches are done.
        batch, batch_bytes: as `BATCH`, `BATCH_BYTES`.
        decode_memory: of which images take what they need while they are decoded.
        decoded: called in some thread when the image of a pair is needed no longer.

    Raises:
        InvalidInput: such a name is too long; or as `ingest`.
    """
    check_name(store)
    if len(source) > MAX_NOTE_CHARS:
        raise InvalidInput(
            f"the name of the source has {len(source)} characters, {MAX_NOTE_CHARS} is the most: shorten it"
        )
    run = _Run(root, store, {"stream": source}, encoder, miner, load_rules(), device, settled=settled)
    run.batch, run.batch_bytes, run.decode_memory, run.decoded = batch, batch_bytes, decode_memory, decoded
    with Writer(root, store, run.encoder.fingerprint, sync=sync) as writer:
        try:
            good = (checked(pair, captions_optional=run.reads_pictures) for pair in pairs)
            return run.finish(good, writer, Progress(""))
        except Exception:
            _remove_if_empty(writer)
            raise


def _remove_if_empty(writer: Writer) -> None:
    """Leave no store behind to which nothing was ever committed."""
    if writer.parent is None:
        with writing(f"store '{writer.name}'"):
            shutil.rmtree(writer.directory)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A pair whose image is decoded."""

    draft: Draft
    pair: Pair
    pixels: NDArray[np.uint8]


Batch = list[tuple[bytes, _Prepared | Rejected]]
"""Items of the source, each with the digest of what was read of it."""


class _Run:
    """One ingest under way.

    Args:
        source: where the pairs come from, as the version records it.
    """

    def __init__(
        self,
        root: str | Path,
        store: str,
        source: Mapping[str, Any],
        encoder: str | Encoder | None,
        miner: str | Miner,
        rules: Rules,
        device: str,
        advance: Advance = lambda stage, done: None,
        settled: Settled = lambda results: None,
    ) -> None:
        self.clock = _Clock()
        with self.clock("load"):
            self.encoder = (
                encoder if isinstance(encoder, Encoder) else _encoder_for(root, store, encoder, device)
            )
            self._miner = load_miner(miner) if isinstance(miner, str) else miner
        self.reads_pictures = reads_pictures(self._miner)
        self.miner_identity = identity(self._miner, rules)
        self._captions_before = unread_captions(self._miner)
        self._source, self._rules, self._advance, self._settled = source, rules, advance, settled
        self._report = Report(store, 0)
        self.batch, self.batch_bytes, self.decode_memory = BATCH, BATCH_BYTES, SHARED
        self.decoded: Callable[[Pair], None] = lambda pair: None

    def finish(self, pairs: Pairs, writer: Writer, progress: Progress) -> Report:
        """Read the pairs, commit, and report. Raises `InvalidInput` if a new store would be empty."""
        report = self._report
        report.resumed = progress.pairs
        for refused in writer.refused():
            self._note(refused)
        same_miner = writer.parent is not None and writer.parent.miner == self.miner_identity
        with ThreadPoolExecutor(os.cpu_count(), "decode") as pool:
            for batch in self._batches(pairs, pool):
                self._process(batch, writer, progress, same_miner)
        report.pairs, report.added, report.unchanged = progress.pairs, progress.added, progress.unchanged
        if not report.added and not writer.parent:
            first = next((f"{r.key}: {r.reason}" for r in report.quarantined), "the source is empty")
            name = self._source.get("path") or self._source.get("stream") or "the stream"
            raise InvalidInput(f"none of the {report.pairs} pairs of {name} can be used; the first: {first}")
        if report.added:
            if writer.tag_embeddings:
                with self.clock("embed tags"):
                    ground(writer)
            while texts := writer.new_tags(limit=TAG_BATCH):
                with self.clock("embed tags"):
                    vectors = self.encoder.encode_texts(texts)
                with self.clock("store"):
                    writer.embed_tags(vectors)
                self._advance("tags", len(texts))
            with self.clock("commit"):
                writer.commit(
                    operation="ingest",
                    source=self._source,
                    miner=self.miner_identity,
                    indexer=faiss_index.extend,
                )
        unread = unread_captions(self._miner) - self._captions_before
        report.captions, report.unread = unread.pop("", 0), dict(unread.most_common())
        if version := writer.parent:
            report.version, report.entries = version.number, version.entries
            report.tags, report.unique_tags = version.tags, version.unique_tags
        report.seconds = self.clock.seconds()
        return report

    def _process(self, batch: Batch, writer: Writer, progress: Progress, same_miner: bool) -> None:
        """Embed, mine and stage a batch."""
        rejected = [item for _, item in batch if isinstance(item, Rejected)]
        good = [item for _, item in batch if isinstance(item, _Prepared)]
        with self.clock("store"):
            admitted, duplicates, unchanged = writer.admit(
                [item.draft for item in good], same_miner=same_miner
            )
        rejected += duplicates
        kept = {id(draft) for draft in admitted}
        good = [item for item in good if id(item.draft) in kept]
        vectors, mined = None, []
        if good:
            pixels = np.stack([item.pixels for item in good])
            with self.clock("embed"):
                vectors, pictures = self._embedded(pixels)
            with self.clock("mine"):
                tags_of_each = mine_seen(self._miner, [item.pair for item in good], pictures)
                mined = [self._rules.apply(merge(tags)) for tags in tags_of_each]
        progress.pairs += len(batch)
        progress.added += len(good)
        progress.unchanged += unchanged
        progress.digest = _running_digest(progress.digest, (digest for digest, _ in batch))
        with self.clock("store"):
            drafts = [replace(item.draft, tags=tags) for item, tags in zip(good, mined, strict=True)]
            writer.append(drafts, vectors, rejected=rejected, progress=progress)
        for refused in rejected:
            self._note(refused)
        self._advance("pairs", len(batch))
        self._settled(_outcomes(batch, {draft.key for draft in drafts}, duplicates))

    def _embedded(self, pixels: NDArray[np.uint8]) -> tuple[Vectors, Pictures]:
        """The vectors of a batch, and what a miner of pictures needs of it: one forward for both."""
        name = self.encoder.fingerprint.model
        if self.reads_pictures and name == "mini":
            pooled, vectors = self.encoder.encode_pooled(pixels)
            return vectors, Pictures(pixels, name, pooled)
        return self.encoder.encode_images(pixels), Pictures(pixels, name)

    def _note(self, refused: Rejected) -> None:
        report = self._report
        reason = refused.reason.split(":")[0]
        report.reasons[reason] = report.reasons.get(reason, 0) + 1
        if len(report.quarantined) < MAX_REPORTED_REJECTS:
            report.quarantined.append(refused)
        log.info("quarantined %s: %s", refused.key, refused.reason)

    def _batches(self, pairs: Pairs, pool: ThreadPoolExecutor) -> Iterator[Batch]:
        """Batches in order; the next one is decoded while the caller works on one."""
        # an entry's origin begins at the source's folder, which the version names
        folder = os.path.join(os.path.dirname(re.split(r"[*?\[{]", self._source.get("path", ""))[0]), "")

        def submit() -> list[Future[tuple[bytes, _Prepared | Rejected]]]:
            with self.clock("read"):
                batch = _next_batch(pairs, self.batch, self.batch_bytes)
                return [pool.submit(self._prepared, item, folder) for item in batch]

        ahead = submit()
        while ahead:
            current, ahead = ahead, submit()
            with self.clock("decode"):
                batch = [future.result() for future in current]
            yield batch

    def _prepared(self, item: Pair | Rejected, folder: str) -> tuple[bytes, _Prepared | Rejected]:
        try:
            return _prepare(item, self.encoder, folder, self.decode_memory)
        finally:
            if isinstance(item, Pair):
                self.decoded(item)


def _outcomes(batch: Batch, added: set[str], duplicates: list[Rejected]) -> list[tuple[str, Outcome, str]]:
    """What became of each item of a batch: (key, outcome, reason)."""
    reasons = {refused.key: refused.reason for refused in duplicates}
    outcomes: list[tuple[str, Outcome, str]] = []
    for _, item in batch:
        if isinstance(item, Rejected):
            outcomes.append((item.key, "quarantined", item.reason))
            continue
        key = item.draft.key
        if key in added:
            added.remove(key)  # a second one of the same key is a duplicate
            outcomes.append((key, "added", ""))
        elif key in reasons:
            outcomes.append((key, "quarantined", reasons[key]))
        else:
            outcomes.append((key, "unchanged", ""))
    return outcomes


def _next_batch(pairs: Pairs, most: int, most_bytes: int) -> Pairs:
    size = 0
    for item in islice(pairs, most):
        yield item
        size += _size(item) if isinstance(item, Pair) else 0
        if size > most_bytes:
            return


def _size(pair: Pair) -> int:
    """Estimate the memory of a pair."""
    metadata = len(json.dumps(dict(pair.metadata))) if pair.metadata else 0
    return len(pair.image) + sum(len(c) + TEXT_BYTES for c in pair.captions) + VALUE_COPIES * metadata


def _prepare(
    item: Pair | Rejected, encoder: Encoder, folder: str, memory: MemoryBudget
) -> tuple[bytes, _Prepared | Rejected]:
    """The digest of an item of the source, and the item with its image decoded, or why it was refused."""
    digest = hashlib.sha256(item.image).digest() if isinstance(item, Pair) else b""
    mark = _item_digest(item, digest)
    if isinstance(item, Rejected):
        return mark, item
    try:
        with decoding(item.image, memory=memory) as image:
            pixels, near = encoder.prepare(image), perceptual_hash(image)
    except BadImage as error:
        return mark, Rejected(item.key, str(error), item.origin)
    draft = Draft(
        item.key,
        digest,
        near,
        item.captions,
        metadata=item.metadata,
        origin=item.origin.removeprefix(folder),
    )
    # without the encoded image: a batch that waits holds pixels at the tower's size, not photographs
    return mark, _Prepared(draft, replace(item, image=b""), pixels)


def _item_digest(item: Pair | Rejected, image: bytes) -> bytes:
    """sha256 of all that an ingest reads of an item; `image` is that of a pair's image."""
    if isinstance(item, Rejected):
        about = [item.key, item.reason]
    else:
        about = [item.key, image.hex(), *item.captions, json.dumps(dict(item.metadata), sort_keys=True)]
    return hashlib.sha256(json.dumps(about).encode()).digest()


def _running_digest(before: str, items: Iterable[bytes]) -> str:
    return hashlib.sha256(before.encode() + b"".join(items)).hexdigest()


def _skip(pairs: Pairs, reached: Progress, writer: Writer) -> bool:
    """Read again what an interrupted run read; false if the source reads differently now."""
    done, digest = 0, ""
    while done < reached.pairs:
        batch = list(_next_batch(pairs, BATCH, BATCH_BYTES))
        if not batch:
            return False
        done += len(batch)
        images = (hashlib.sha256(item.image).digest() if isinstance(item, Pair) else b"" for item in batch)
        digest = _running_digest(digest, map(_item_digest, batch, images))
        writer.confirm([item.key for item in batch])
    return done == reached.pairs and digest == reached.digest


def _encoder_for(root: str | Path, store: str, spec: str | None, device: str) -> Encoder:
    """The encoder of a spec, or without one the store's. The writer refuses another than the store has."""
    if spec is not None:
        return load_encoder(spec, device=device)
    try:
        return load_encoder_of(Store(root, store).snapshot().version.fingerprint, device=device)
    except NotFound:
        return load_encoder(device=device)


def _peeked(items: Iterable[Pair | Rejected]) -> Pairs:
    """The same items; a source that can't be read at all raises now, before anything is made on disk."""
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
