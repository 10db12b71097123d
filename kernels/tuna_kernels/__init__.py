"""Kernels for a model that reads retrieved tags: attention of ragged tags over image patches, tag weights, tag gathering.

Imports only torch, Triton (where it is installed) and the standard library; without Triton or without a GPU every operator
runs its plain torch reference. See `backend.py` for how that is chosen, and the README beside each operator.
"""

from .tag_attention import tag_attention

__all__ = ["tag_attention"]
