"""Embeddings of a batch's tags, with a deterministic backward."""

from .op import gather_tags

__all__ = ["gather_tags"]
