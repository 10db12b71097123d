"""The record of a version, and its encoding."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from tagstore.errors import Damaged
from tagstore.types import Fingerprint


@dataclass(frozen=True, slots=True)
class Range:
    """The checksum of a run of records at the commit of a version."""

    first: int
    end: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable state of a store, as it is written at its commit."""

    number: int
    parent: int
    created: str
    """UTC, ISO 8601."""
    operation: str
    """What made it: "ingest", "delete", "rollback to 3" and so on."""
    source: Mapping[str, Any]
    """Where an ingest read: path, format and columns."""
    entries: int
    tags: int
    unique_tags: int
    next_entry_id: int
    next_tag_id: int
    space: int
    fingerprint: Fingerprint
    miner: Mapping[str, Any]
    """Identity and settings of the miner."""
    pages: Mapping[str, list[int]] = field(default_factory=dict)
    """Page ids of the arrays "live" and "counts"."""
    tag_embeddings: Mapping[str, Any] = field(default_factory=dict)
    """How the tags' embeddings were learnt from pictures; empty where the text tower made them."""
    index: Mapping[str, Any] = field(default_factory=dict)
    """Kind and parameters of the index, and its files with their checksums."""
    ranges: Mapping[str, list[Range]] = field(default_factory=dict)
    """Checksums of "entries", "vectors", "tags" and "embeddings", and one each over "live" and "counts"."""

    def to_json(self) -> str:
        """JSON with a checksum of its own."""
        fields = asdict(self)
        if not self.tag_embeddings:
            del fields["tag_embeddings"]  # so that releases that do not know it can read the store
        body = json.dumps(fields, sort_keys=True)
        return json.dumps({"version": body, "sha256": sha256(body.encode()).hexdigest()})

    @classmethod
    def from_json(cls, data: bytes | str) -> Version:
        """Raises `Damaged` if the record is not what was written."""
        try:
            outer = json.loads(data)
            body = outer["version"]
            if sha256(body.encode()).hexdigest() != outer["sha256"]:
                raise Damaged(
                    "a version's record does not fit its checksum: run `tagstore verify`, restore the store "
                    "from a copy"
                )
            value = json.loads(body)
        except (ValueError, TypeError, KeyError) as error:
            raise Damaged(f"a version's record cannot be read: {error}") from error
        value["fingerprint"] = Fingerprint(**value["fingerprint"])
        value["ranges"] = {name: [Range(**r) for r in ranges] for name, ranges in value["ranges"].items()}
        return cls(**value)


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
