"""A datastore that maps images to the tags of similar images. A client starts with `connect(url)`."""

from tagstore.types import Fingerprint, Neighbour, Pair, Retrieval, RetrievedTag, StoreInfo, Tag, TagInfo

__all__ = ["Fingerprint", "Neighbour", "Pair", "Retrieval", "RetrievedTag", "StoreInfo", "Tag", "TagInfo"]
