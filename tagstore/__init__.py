"""tagstore: a datastore that maps images to the tags of similar images. `connect(url)` is where a client starts."""

from tagstore.types import Fingerprint, Neighbour, Pair, Retrieval, RetrievedTag, StoreInfo, Tag, TagInfo

__all__ = ["Fingerprint", "Neighbour", "Pair", "Retrieval", "RetrievedTag", "StoreInfo", "Tag", "TagInfo"]
