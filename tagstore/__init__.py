"""A datastore that maps images to the tags of similar images.

import tagstore

tagstore.ingest(frame, root="stores", store="mine")     # a DataFrame, a folder, a table, a dataset ...
with tagstore.connect("file://stores/mine") as source:
    [answer] = source.retrieve(["photo.jpg"])
"""

from typing import Any

from tagstore.types import Fingerprint, Neighbour, Pair, Retrieval, RetrievedTag, StoreInfo, Tag, TagInfo

__all__ = [
    "Fingerprint", "Neighbour", "Pair", "Retrieval", "RetrievedTag", "StoreInfo", "Tag", "TagInfo", "connect",
    "ingest",
]  # fmt: skip

_LATER = {"connect": "tagstore.client", "ingest": "tagstore.ingestion"}
"""Functions whose modules are loaded when they are first named: the engine takes seconds."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'tagstore' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_LATER[name]), name)
