"""What an ingest would read, without a store: counts, reasons, and a few pairs as they were understood."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tagstore.encoding.images import decode
from tagstore.errors import BadImage
from tagstore.readers import read
from tagstore.readers.pair_check import checked
from tagstore.types import Pair, Rejected

EXAMPLES = 5
"""Pairs that a preview holds."""


@dataclass(slots=True)
class Preview:
    """What a source has."""

    pairs: int = 0
    """Read, refused ones included."""
    captions: int = 0
    examples: list[Pair] = field(default_factory=list)
    """The first `EXAMPLES`, without their images."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Pairs refused, by reason without its particulars."""
    refused: dict[str, Rejected] = field(default_factory=dict)
    """The first pair of each reason."""


def preview(source: str, **options: Any) -> Preview:
    """Read all of a source and decode its images. Keys are not compared.

    Args:
        options: those of `readers.read`.

    Raises:
        InvalidInput, NotFound: as `readers.read`.
    """
    result = Preview()
    optional = bool(options.get("captions_optional"))
    for item in read(source, **options):
        item = checked(item, captions_optional=optional)
        result.pairs += 1
        if isinstance(item, Pair):
            try:
                decode(item.image)
            except BadImage as error:
                item = Rejected(item.key, str(error), item.origin)
        if isinstance(item, Rejected):
            reason = item.reason.split(":")[0]
            result.reasons[reason] = result.reasons.get(reason, 0) + 1
            result.refused.setdefault(reason, item)
            continue
        result.captions += len(item.captions)
        if len(result.examples) < EXAMPLES:
            result.examples.append(replace(item, image=b""))
    return result
