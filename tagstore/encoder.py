"""Deprecated name of `tagstore.encoding`."""

from warnings import warn

from tagstore.encoding.encoder import Encoder, load_encoder

warn("tagstore.encoder is now tagstore.encoding", DeprecationWarning, stacklevel=2)

__all__ = ["Encoder", "load_encoder"]
