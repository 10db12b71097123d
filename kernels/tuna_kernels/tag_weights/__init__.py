"""The adaptive weight tuner: how much each retrieved tag says about its image."""

from .op import COUPLINGS, score_weights, tag_weights

__all__ = ["COUPLINGS", "score_weights", "tag_weights"]
