"""Pictures and words to unit vectors; shared by the store and the model, so that both mean the same vector."""

from tagstore.encoding.encoder import Encoder, load_encoder

__all__ = ["Encoder", "load_encoder"]
