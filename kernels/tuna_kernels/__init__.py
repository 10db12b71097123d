"""Kernels for a model that reads retrieved tags: attention of ragged tags over image patches, tag weights, tag gathering.

Imports only torch, Triton (where it is installed) and the standard library; without Triton or without a GPU every operator
runs its plain torch reference. See `backend.py` for how that is chosen, and the README beside each operator.
"""

from .gather_tags import gather_tags
from .tag_attention import tag_attention
from .tag_weights import score_weights, tag_weights

__all__ = ["gather_tags", "score_weights", "tag_attention", "tag_weights"]
