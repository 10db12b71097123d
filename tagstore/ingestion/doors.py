"""The ways into a store: files, objects of a program, and pairs that somebody else reads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tagstore.encoding.decode_memory import SHARED, MemoryBudget
from tagstore.encoding.encoder import Encoder
from tagstore.errors import InvalidInput
from tagstore.ingestion.batches import BATCH, BATCH_BYTES, Pairs, peeked, skip
from tagstore.ingestion.objects import name_of, pairs_of
from tagstore.ingestion.pipeline import Run, TooManyBad
from tagstore.ingestion.report import Advance, Report, Settled
from tagstore.mining import Miner, Rules, load_miner, load_rules, reads_pictures
from tagstore.readers import Columns, Layout, read
from tagstore.readers.pair_check import MAX_NOTE_CHARS, checked
from tagstore.storage.environments import writing
from tagstore.storage.staging import Progress, Sync
from tagstore.storage.store import check_name
from tagstore.storage.writer import Writer
from tagstore.types import Pair, Rejected


def ingest(
    source: Any,
    *,
    root: str | Path,
    store: str,
    format: str | None = None,
    columns: Columns = Columns(),  # noqa: B008  frozen
    images: str | Path | None = None,
    layout: Layout = Layout(),  # noqa: B008  frozen
    allow_outside: bool = False,
    encoder: str | Encoder | None = None,
    miner: str | Miner = "rules",
    vocabulary: Rules | None = None,
    device: str = "auto",
    sync: Sync = "full",
    max_bad: float = 1.0,
    progress: Advance = lambda stage, done: None,
) -> Report:
    """Read a source into a store, which is made if it isn't there, and commit the result as its next version.

    If an ingest of the same files, encoder and miner was cut off before, its work is kept, unless they have
    changed.

    Args:
        source: path of a file or folder, glob or brace pattern (see `readers`); or an object: a pandas or
            Polars DataFrame, an Arrow table, a Hugging Face Dataset, or an iterable of `Pair` or of dicts
            (`ingestion.objects`). Their images are paths, bytes or PIL images.
        root: directory of the stores.
        store: name of the store.
        format: of the source; found by looking if not given.
        columns: names of the source's columns, where they aren't the usual ones.
        images: the folder that paths of images are relative to and may not leave. Without one it is the
            source file's own; paths in an object are relative to the working directory and may lead anywhere.
        layout: how a file is written, where looking does not tell.
        allow_outside: of files: follow image paths that lead out of the source's folder.
        encoder: spec or encoder; by default the store's own, `mini` for a new store.
        miner: spec or miner.
        vocabulary: stop list and synonyms; the shipped ones if not given.
        device: for an encoder given by spec.
        sync: when appends reach the disk: `full`, each at once; `batch`, all of them at the commit. The
            version is durable in both.
        max_bad: share of the pairs that may be refused, from 0 to 1; with more there is no new version.
        progress: called as work is done.

    Raises:
        InvalidInput, NotFound: a source that can't be read at all, or whose pairs were all refused.
        FingerprintMismatch: the store holds vectors of another encoder.
        Busy: another process writes to the store.
    """
    check_name(store)
    if not 0 <= max_bad <= 1:
        raise InvalidInput(f"max_bad is {max_bad}: it is a share, from 0 to 1")
    if not isinstance(source, str | os.PathLike):
        return _ingest_object(
            source, root, store, columns, images, encoder, miner, vocabulary, device, sync, max_bad, progress
        )
    source = os.fspath(source)
    where = {
        "path": os.path.abspath(source),
        "format": format,
        "columns": asdict(columns),
        "allow_outside": allow_outside,
    }
    where |= {"images": os.path.abspath(images)} if images is not None else {}
    where |= {"layout": asdict(layout)} if layout != Layout() else {}

    miner = load_miner(miner) if isinstance(miner, str) else miner
    optional = reads_pictures(miner)

    def read_source() -> Pairs:
        items = read(
            source,
            format=format,
            columns=columns,
            allow_outside=allow_outside,
            captions_optional=optional,
            images=images,
            layout=layout,
        )
        return peeked(checked(item, captions_optional=optional) for item in items)

    pairs = read_source()
    run = Run(root, store, where, encoder, miner, vocabulary or load_rules(), device, progress)
    run.max_bad = max_bad
    about = json.dumps([where, run.miner_identity, run.fingerprint.digest], sort_keys=True)
    mark = hashlib.sha256(about.encode()).hexdigest()
    with Writer(root, store, run.fingerprint, resume=mark, sync=sync) as writer:
        reached = writer.progress
        if reached is not None:
            with run.clock("read"):
                unchanged = skip(pairs, reached, writer)
            if unchanged:
                return run.finish(pairs, writer, reached)
            writer.discard()
            pairs = read_source()
        try:
            return run.finish(pairs, writer, Progress(mark))
        except TooManyBad:
            raise
        except InvalidInput:
            _remove_if_empty(writer)
            raise


def _ingest_object(
    source: Any,
    root: str | Path,
    store: str,
    columns: Columns,
    images: str | Path | None,
    encoder: str | Encoder | None,
    miner: str | Miner,
    vocabulary: Rules | None,
    device: str,
    sync: Sync,
    max_bad: float,
    progress: Advance,
) -> Report:
    miner = load_miner(miner) if isinstance(miner, str) else miner
    optional = reads_pictures(miner)
    items = pairs_of(source, columns=columns, images=images, captions_optional=optional)
    pairs = peeked(checked(item, captions_optional=optional) for item in items)
    where = {"stream": name_of(source), "columns": asdict(columns)}
    run = Run(root, store, where, encoder, miner, vocabulary or load_rules(), device, progress)
    run.max_bad = max_bad
    return _finish(run, pairs, root, store, sync)


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
    run = Run(root, store, {"stream": source}, encoder, miner, load_rules(), device, settled=settled)
    run.batch, run.batch_bytes, run.decode_memory, run.decoded = batch, batch_bytes, decode_memory, decoded
    good = (checked(pair, captions_optional=run.reads_pictures) for pair in pairs)
    return _finish(run, good, root, store, sync)


def _finish(run: Run, pairs: Pairs, root: str | Path, store: str, sync: Sync) -> Report:
    """Ingest pairs that cannot be read again: what is cut off is thrown away."""
    with Writer(root, store, run.fingerprint, sync=sync) as writer:
        try:
            return run.finish(pairs, writer, Progress(""))
        except Exception:
            _remove_if_empty(writer)
            raise


def _remove_if_empty(writer: Writer) -> None:
    """Leave no store behind to which nothing was ever committed."""
    if writer.parent is None:
        with writing(f"store '{writer.name}'"):
            shutil.rmtree(writer.directory)
