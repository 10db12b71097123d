"""Attention from few tags to many image patches, ragged over images."""

from .op import tag_attention

__all__ = ["tag_attention"]
