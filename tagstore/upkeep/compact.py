"""Compaction: a store is rewritten without slack and without old versions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tagstore.errors import InvalidInput
from tagstore.indexing import faiss_index
from tagstore.storage.rewrite import rewrite
from tagstore.storage.snapshot import Snapshot
from tagstore.storage.version import Version
from tagstore.storage.writer import Writer


def compact(root: str | Path, store: str, *, keep: int | None = None) -> Version:
    """Commit a version with the content of the current one, without slack and with one index file.

    Args:
        keep: drop all versions but the newest `keep`, the new one included; None keeps all.
    """
    if keep is not None and keep < 1:
        raise InvalidInput(f"keep is {keep}: at least the newest version stays, pass 1 or more")
    with Writer(root, store) as writer:
        kept = writer.store.versions()
        if keep is not None:
            kept = kept[max(0, len(kept) - (keep - 1)) :]
        return rewrite(writer, kept, "compact", index_copy)


def index_copy(snapshot: Snapshot, directory: Path) -> Mapping[str, Any]:
    """Build the index of a version that is being rewritten, of the kind that it had, in one file."""
    return faiss_index.extend(snapshot, None, directory, whole=True)
