"""One ingest under way: batches of pairs become a version of a store.

    read ─▶ decode + hash (threads) ─▶ admit ─▶ embed ─▶ mine ─▶ append ... ─▶ embed tags ─▶ index ─▶ commit

One batch is decoded while the one before it is embedded; nothing else is in memory, whatever the length of
the source. Every append says how far the source was read, so an ingest that was cut off is resumed there.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagstore.encoding.decode_memory import SHARED
from tagstore.encoding.encoder import Encoder, load_encoder, load_encoder_of
from tagstore.errors import InvalidInput, NotFound
from tagstore.indexing import faiss_index
from tagstore.ingestion.batches import (
    BATCH,
    BATCH_BYTES,
    Batch,
    Pairs,
    Prepared,
    next_batch,
    outcomes,
    prepare,
    running_digest,
)
from tagstore.ingestion.report import MAX_REPORTED_REJECTS, Advance, Report, Settled
from tagstore.mining import (
    Miner,
    Pictures,
    Rules,
    identity,
    load_miner,
    merge,
    mine_seen,
    reads_pictures,
    unread_captions,
)
from tagstore.storage.grounding import ground
from tagstore.storage.staging import Draft, Progress
from tagstore.storage.store import Store
from tagstore.storage.writer import Writer
from tagstore.types import Fingerprint, Pair, Rejected, Vectors

log = logging.getLogger(__name__)


class TooManyBad(InvalidInput):
    """More pairs were refused than `max_bad` permits."""


TAG_BATCH = 4096
"""Tags embedded at a time."""


class Run:
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
            self._encoder: Encoder | Fingerprint = (
                encoder if isinstance(encoder, Encoder) else _encoder_for(root, store, encoder, device)
            )
            self._miner = load_miner(miner) if isinstance(miner, str) else miner
        self.reads_pictures = reads_pictures(self._miner)
        self.miner_identity = identity(self._miner, rules)
        self._captions_before = unread_captions(self._miner)
        self._device, self._loading = device, Lock()
        self._holds: Callable[[Draft], bool] = lambda draft: False
        self._source, self._rules, self._advance, self._settled = source, rules, advance, settled
        self._report = Report(store, 0)
        self.max_bad: float | None = None
        """Share of the pairs that may be quarantined; with more of them no version is made."""
        self.batch, self.batch_bytes, self.decode_memory = BATCH, BATCH_BYTES, SHARED
        self.decoded: Callable[[Pair], None] = lambda pair: None

    @property
    def fingerprint(self) -> Fingerprint:
        """Of the encoder, which need not be loaded for it."""
        return self._encoder if isinstance(self._encoder, Fingerprint) else self._encoder.fingerprint

    @property
    def encoder(self) -> Encoder:
        """The encoder. A store's own is loaded when the first pair needs it; safe in any thread."""
        with self._loading:
            if isinstance(self._encoder, Fingerprint):
                self._encoder = load_encoder_of(self._encoder, device=self._device)
            return self._encoder

    def finish(self, pairs: Pairs, writer: Writer, progress: Progress) -> Report:
        """Read the pairs, commit, and report. Raises `InvalidInput` if a new store would be empty."""
        report = self._report
        report.resumed = progress.pairs
        for refused in writer.refused():
            self._note(refused)
        same_miner = writer.parent is not None and writer.parent.miner == self.miner_identity
        if same_miner:
            self._holds = writer.holds
        with ThreadPoolExecutor(os.cpu_count(), "decode") as pool:
            for batch in self._batches(pairs, pool):
                self._process(batch, writer, progress, same_miner)
        report.pairs, report.added, report.unchanged = progress.pairs, progress.added, progress.unchanged
        if not report.added and not writer.parent:
            first = next((f"{r.key}: {r.reason}" for r in report.quarantined), "the source is empty")
            name = self._source.get("path") or self._source.get("stream") or "the stream"
            raise InvalidInput(f"none of the {report.pairs} pairs of {name} can be used; the first: {first}")
        self._check_share()
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

    def _check_share(self) -> None:
        report, refused = self._report, sum(self._report.reasons.values())
        if self.max_bad is None or refused <= self.max_bad * report.pairs:
            return
        reason, count = max(report.reasons.items(), key=lambda item: item[1])
        raise TooManyBad(
            f"{refused} of {report.pairs} pairs ({refused / report.pairs:.1%}) were refused, and max_bad is "
            f"{self.max_bad:.1%}, so there is no new version. Most often ({count}): {reason}. Mend the "
            "source, or run again with a larger share: what was read is kept"
        )

    def _process(self, batch: Batch, writer: Writer, progress: Progress, same_miner: bool) -> None:
        """Embed, mine and stage a batch."""
        rejected = [item for _, item in batch if isinstance(item, Rejected)]
        good = [item for _, item in batch if isinstance(item, Prepared)]
        with self.clock("store"):
            admitted, duplicates, unchanged = writer.admit(
                [item.draft for item in good], same_miner=same_miner
            )
        rejected += duplicates
        kept = {id(draft) for draft in admitted}
        good = [item for item in good if id(item.draft) in kept]
        vectors, mined = None, []
        if good:
            pixels = np.stack([item.pixels for item in good if item.pixels is not None])
            with self.clock("embed"):
                vectors, pictures = self._embedded(pixels)
            with self.clock("mine"):
                tags_of_each = mine_seen(self._miner, [item.pair for item in good], pictures)
                mined = [self._rules.apply(merge(tags)) for tags in tags_of_each]
        progress.pairs += len(batch)
        progress.added += len(good)
        progress.unchanged += unchanged
        progress.digest = running_digest(progress.digest, (digest for digest, _ in batch))
        with self.clock("store"):
            drafts = [replace(item.draft, tags=tags) for item, tags in zip(good, mined, strict=True)]
            writer.append(drafts, vectors, rejected=rejected, progress=progress)
        for refused in rejected:
            self._note(refused)
        self._advance("pairs", len(batch))
        self._settled(outcomes(batch, {draft.key for draft in drafts}, duplicates))

    def _embedded(self, pixels: NDArray[np.uint8]) -> tuple[Vectors, Pictures]:
        """The vectors of a batch, and what a miner of pictures needs of it: one forward for both."""
        name = self.fingerprint.model
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

        def submit() -> list[Future[tuple[bytes, Prepared | Rejected]]]:
            with self.clock("read"):
                batch = next_batch(pairs, self.batch, self.batch_bytes)
                return [pool.submit(self._prepared, item, folder) for item in batch]

        ahead = submit()
        while ahead:
            current, ahead = ahead, submit()
            with self.clock("decode"):
                batch = [future.result() for future in current]
            yield batch

    def _prepared(self, item: Pair | Rejected, folder: str) -> tuple[bytes, Prepared | Rejected]:
        try:
            return prepare(
                item, lambda image: self.encoder.prepare(image), folder, self.decode_memory, self._holds
            )
        finally:
            if isinstance(item, Pair):
                self.decoded(item)


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


def _encoder_for(root: str | Path, store: str, spec: str | None, device: str) -> Encoder | Fingerprint:
    """The encoder of a spec, or without one the fingerprint of the store's, which is loaded if a pair needs
    it. The writer refuses another than the store has."""
    if spec is not None:
        return load_encoder(spec, device=device)
    try:
        return Store(root, store).snapshot().version.fingerprint
    except NotFound:
        return load_encoder(device=device)
