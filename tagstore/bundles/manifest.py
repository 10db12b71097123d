"""The manifest of a bundle, and the shapes and checks of the records in it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagstore.errors import InvalidInput
from tagstore.types import KINDS, Fingerprint

FORMAT = 2
MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
TAGS, EMBEDDINGS, ENTRIES, VECTORS = FILES = ("tags.jsonl", "embeddings.f16", "entries.jsonl", "vectors.f16")
MAX_MANIFEST = 4 << 20
BATCH = 4096
"""Records or rows that are in memory at a time."""

_MAX_SPARSITY = 4096
"""Ids per record at most, beyond `_MIN_ID_ROOM`."""
_MIN_ID_ROOM = 1 << 24
"""Ids that a bundle may span whatever its number of records."""

MAX_DEPTH = 128
"""Levels of nesting that JSON may have: every part of the code can walk it without running out of stack."""

_WHOLE, _SMALL = range(1 << 62), range(1 << 31)
_SHA256 = re.compile("[0-9a-f]{64}")
TAG = {
    "id": _WHOLE,
    "text": str,
    "kind": re.compile("|".join(KINDS)),
    "canonical": re.compile(".+", re.DOTALL),
}
ENTRY = {
    "id": _WHOLE,
    "key": str,
    "sha256": _SHA256,
    "perceptual_hash": re.compile("[0-9a-f]{16}"),
    "captions": [str],
    "tags": [(_WHOLE, range(256), [(range(-1, 1 << 31), _SMALL, _SMALL)])],
    "metadata": dict,
    "origin": str,
}
_MANIFEST: dict[str, Any] = {
    "store": str,
    "version": range(1, 1 << 62),
    "created": str,
    "operation": str,
    "entries": _WHOLE,
    "tags": _WHOLE,
    "unique_tags": _WHOLE,
    "next_entry_id": _WHOLE,
    "next_tag_id": _WHOLE,
    "fingerprint": {
        "model": str,
        "weights": str,
        "preprocess": dict,
        "quick_gelu": bool,
        "normalised": bool,
        "dimension": range(1, 1 << 16),
    },
    "miner": dict,
    "tag_embeddings": dict,
    "licence": str,
    "note": str,
    "sources": [dict],
    "bundles": [dict],
    "signer": re.compile("([0-9a-f]{64})?"),
    "images": bool,
    "image_bytes": _WHOLE,
    "files": {name: {"bytes": _WHOLE, "sha256": _SHA256} for name in FILES},
}


@dataclass(frozen=True, slots=True)
class BundleInfo:
    """What the manifest of a bundle says."""

    store: str
    """Name of the exported store; the fields from here to `miner` describe its version."""
    version: int
    created: str
    """When the version was committed: UTC, ISO 8601."""
    operation: str
    entries: int
    tags: int
    """Tags over all entries."""
    unique_tags: int
    next_entry_id: int
    next_tag_id: int
    fingerprint: Fingerprint
    miner: Mapping[str, Any]
    licence: str
    """Licence of the content, as the exporter gave it."""
    note: str
    sources: Sequence[Mapping[str, Any]]
    """Where the store's ingests read: path, format, columns."""
    bundles: Sequence[Mapping[str, Any]]
    """Bundles that the exported store was itself imported from, with their licences."""
    signer: str
    """Public key of the signer (32 bytes, hex), empty if there is none.

    Only an import that demands a key proves it.
    """
    images: bool
    """Whether it holds the images too."""
    image_bytes: int
    """Bytes of all images."""
    files: Mapping[str, Mapping[str, Any]]
    """"bytes" and "sha256" of each file."""
    tag_embeddings: Mapping[str, Any] = field(default_factory=dict)
    """See `Version.tag_embeddings`; left out of the manifest if it is empty."""
    sha256: str = ""
    """sha256 of the bundle itself; empty if only its manifest was read."""

    def manifest(self) -> bytes:
        """The bytes of `manifest.json`, the same for the same content.

        Raises `InvalidInput` for what `from_manifest` would refuse.
        """
        self._check()
        value = {name: value for name, value in asdict(self).items() if name != "sha256"}
        if not self.tag_embeddings:
            del value["tag_embeddings"]
        data = to_json({"bundle": "tagstore", "format": FORMAT, **value}, MANIFEST)
        if len(data) > MAX_MANIFEST:
            raise InvalidInput(
                f"the manifest would have {len(data)} bytes, {MAX_MANIFEST} is the most: shorten licence or "
                "note"
            )
        return data

    @classmethod
    def from_manifest(cls, data: bytes) -> BundleInfo:
        """Read a manifest. Raises `InvalidInput`, naming what is wrong, if it is none."""
        value = from_json(data, MANIFEST)
        if type(value) is not dict or value.pop("bundle", None) != "tagstore":
            raise InvalidInput(f"{MANIFEST} is not that of a bundle of tagstore")
        if (number := value.pop("format", None)) != FORMAT:
            raise InvalidInput(
                f"the bundle has format {number}, this release reads {FORMAT}: use the release that wrote it"
            )
        value.setdefault("tag_embeddings", {})
        for name in sorted(value.keys() ^ _MANIFEST.keys()):
            raise InvalidInput(
                f"{MANIFEST} {'lacks' if name in _MANIFEST else 'has the unknown field'} '{name[:100]}'"
            )
        for name, shape in _MANIFEST.items():
            if not fits(value[name], shape):
                raise InvalidInput(f"{MANIFEST}: '{name}' is not what it should be: {str(value[name])[:100]}")
        info = cls(**{**value, "fingerprint": Fingerprint(**value["fingerprint"])})
        info._check()
        return info

    def _check(self) -> None:
        if self.image_bytes and not self.images:
            raise InvalidInput(f"{MANIFEST}: 'image_bytes' is {self.image_bytes} in a bundle without images")
        width = 2 * self.fingerprint.dimension
        for ids, n, rows in (
            ("next_entry_id", self.entries, VECTORS),
            ("next_tag_id", self.unique_tags, EMBEDDINGS),
        ):
            # an open version holds a bit or a count for every id: a small file must not take much memory
            if not n <= getattr(self, ids) <= n * _MAX_SPARSITY + _MIN_ID_ROOM:
                raise InvalidInput(
                    f"{MANIFEST}: '{ids}' is {getattr(self, ids)} for {n} records: out of all proportion"
                )
            if self.files[rows]["bytes"] != n * width:
                raise InvalidInput(
                    f"{MANIFEST}: '{rows}' has {self.files[rows]['bytes']} bytes, {n} rows have {n * width}"
                )


def check_rows(rows: NDArray[Any], ids: NDArray[np.int64], fingerprint: Fingerprint, name: str) -> None:
    """Raises `InvalidInput` unless an encoder of the fingerprint could have made all rows `[n, D]`."""
    with np.errstate(invalid="ignore"):
        norms = np.linalg.norm(rows.astype(np.float32), axis=1)
    valid = np.abs(norms - 1) < 0.01 if fingerprint.normalised else np.isfinite(norms)
    if not valid.all():
        bad = int(np.flatnonzero(~valid)[0])
        raise InvalidInput(
            f"{name}: the row of id {ids[bad]} has length {norms[bad]:g}, which no vector of {fingerprint} "
            "has"
        )


def fits(value: Any, shape: Any) -> bool:
    """Whether a JSON value has a shape.

    Shapes: a type, a range of integers, a pattern, [shape of all items], (shape of each item), {name: shape}.
    """
    match shape:
        case range():
            return type(value) is int and value in shape
        case re.Pattern():
            return type(value) is str and shape.fullmatch(value) is not None
        case list():
            return type(value) is list and all(fits(item, shape[0]) for item in value)
        case tuple():
            return type(value) is list and len(value) == len(shape) and all(map(fits, value, shape))
        case dict():
            return (
                type(value) is dict
                and value.keys() == shape.keys()
                and all(fits(value[name], s) for name, s in shape.items())
            )
        case _:
            return type(value) is shape


def to_json(value: Mapping[str, Any], what: str) -> bytes:
    """Encode JSON in one form: UTF-8, sorted names, no spaces.

    Raises `InvalidInput` for what a reader refuses: NaN, infinity, more than `MAX_DEPTH` levels, and half a
    surrogate pair.
    """
    try:
        data = json.dumps(
            value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False
        ).encode()
        _check_depth(value, data)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{what} holds what JSON cannot: {error}") from error
    return data


def from_json(data: bytes, what: str) -> Any:
    """Decode JSON in strict UTF-8: each name once in its object, numbers finite, at most `MAX_DEPTH` levels.

    Raises `InvalidInput`.
    """
    try:
        value = json.loads(
            data.decode(), parse_constant=_refused, parse_float=_finite, object_pairs_hook=_named_once
        )
        _check_depth(value, data)
        if b"\\u" in data:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{what} is no JSON that can be read: {str(error)[:200]}") from error
    return value


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _finite(text: str) -> float:
    if not isfinite(number := float(text)):
        raise ValueError(f"{text[:40]} is more than a number can hold")
    return number


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"the name '{twice[:100]}' is there twice in one object")
    return value


def _check_depth(value: Any, data: bytes) -> None:
    """Raises `ValueError` if a value, whose JSON is `data`, has more than `MAX_DEPTH` levels."""
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for parent in level
            for item in (parent.values() if isinstance(parent, Mapping) else parent)
            if isinstance(item, list | tuple | Mapping)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
