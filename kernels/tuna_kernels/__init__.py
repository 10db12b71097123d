"""Kernels for a model that reads retrieved tags: tag attention, tag weights, tag gathering.

Imports only torch, Triton (where it is installed) and the standard library. Without Triton or a GPU every
operator runs its plain torch reference; `backend.py` chooses. Each operator has a README beside it.
"""

from .gather_tags import gather_tags
from .tag_attention import tag_attention
from .tag_weights import score_weights, tag_weights

__all__ = ["gather_tags", "score_weights", "tag_attention", "tag_weights"]
