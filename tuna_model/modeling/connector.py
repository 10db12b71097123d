"""Features of the image tower to tokens of the decoder: H_v = connector(Z_v), H_vt = connector(Z_vt)."""

from __future__ import annotations

import math

from torch import Tensor, nn
from transformers.activations import ACT2FN

from tuna_model.modeling.config import TunaConfig


class Connector(nn.Module):
    """LLaVA-1.5's two-layer MLP or one linear layer, `[..., C]` to `[..., hidden]`.

    The names of the MLP's weights are those of transformers' Llava.
    """

    def __init__(self, config: TunaConfig) -> None:
        super().__init__()
        hidden, bias = config.text_config.hidden_size, config.connector_bias
        linear = config.connector == "linear"
        self.linear_1 = nn.Linear(config.grid_channels, hidden, bias=bias)
        self.act = nn.Identity() if linear else ACT2FN[config.connector_act]
        self.linear_2 = nn.Identity() if linear else nn.Linear(hidden, hidden, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        tokens: Tensor = self.linear_2(self.act(self.linear_1(features)))
        return tokens


def pool_grid(grid: Tensor, side: int) -> Tensor:
    """Average over a `side` x `side` raster: `[N, P, C]` to `[N, side^2, C]`.

    Where `side` does not divide the grid's, neighbouring fields share a row or column of points.
    """
    images, points, channels = grid.shape
    square = grid.transpose(1, 2).reshape(images, channels, math.isqrt(points), -1)
    return nn.functional.adaptive_avg_pool2d(square, side).flatten(2).transpose(1, 2)
