"""Images and texts to unit vectors. Store and model share this room, so that both mean the same vector."""

from tagstore.encoding.encoder import Encoder, load_encoder

__all__ = ["Encoder", "load_encoder"]
