"""The image-aware tag encoder: each tag attends to the patches of its image, Z_vt = attention(Q_t, Z_v, Z_v).

Section 3 of the paper. It leaves open how deep the encoder is and whether it has projections of its own: see
`TunaConfig.tag_encoder_layers`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from tuna_kernels import tag_attention
from tuna_model.modeling.config import TunaConfig


class TagEncoder(nn.Module):
    """Tags to features like the grid's, which the grid's connector takes too."""

    def __init__(self, config: TunaConfig) -> None:
        super().__init__()
        self.impl = config.kernels
        self.max_tags = config.max_tags if config.tag_queries == "tag" else None
        self.gate = nn.Parameter(torch.zeros(1)) if config.tag_gate else None
        """Factor of H_vt, applied behind the connector."""
        self.layers: nn.ModuleList | None = None
        if config.tag_encoder_layers == 0:
            # into the space of image vectors and tags; `TunaForConditionalGeneration.join_encoder` fills it
            self.register_buffer("projection", torch.zeros(config.grid_channels, config.tag_dimension))
            return
        width = config.tag_encoder_width
        self.from_tag = nn.Linear(config.tag_dimension, width)
        hidden, of_words = config.text_config.hidden_size, config.tag_queries == "token"
        self.from_word = nn.Linear(hidden, width, bias=False) if of_words else None
        self.grid_norm = nn.LayerNorm(config.grid_channels)
        self.layers = nn.ModuleList(TagEncoderLayer(config) for _ in range(config.tag_encoder_layers))
        self.to_grid = nn.Linear(width, config.grid_channels)

    def forward(
        self,
        embeddings: Tensor,
        words: Tensor | None,
        grid: Tensor,
        cu_tags: Tensor,
        *,
        return_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            embeddings: `[M, D]` text embeddings, one for each query (a tag, or a word of a tag).
            words: `[M, hidden]` word embeddings of the decoder where queries are words, else None.
            grid: `[N, P, C]`.
            cu_tags: int32 `[N + 1]`: image n owns the queries cu_tags[n]:cu_tags[n + 1].

        Returns:
            Z_vt `[M, C]`, and with `return_attention` the attention over the patches `[M, P]` (last layer,
            mean over its heads).
        """
        if self.layers is None:
            return project_and_attend(embeddings, grid, cu_tags, cast(Tensor, self.projection))
        queries = self.from_tag(embeddings)
        if self.from_word is not None and words is not None:
            queries = queries + self.from_word(words)
        keys, attention = self.grid_norm(grid), None
        for layer in self.layers:
            queries, attention = layer(queries, keys, cu_tags, self.impl, self.max_tags, return_attention)
        return self.to_grid(queries), None if attention is None else attention.float().mean(1)


class TagEncoderLayer(nn.Module):
    """Cross-attention and MLP, each after a LayerNorm and beside a residual.

    Tags do not attend to each other: they are a set of any size.
    """

    def __init__(self, config: TunaConfig) -> None:
        super().__init__()
        width, self.heads = config.tag_encoder_width, config.tag_encoder_heads
        self.query_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(config.grid_channels, width, bias=False)
        self.value = nn.Linear(config.grid_channels, width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(
        self,
        x: Tensor,
        grid: Tensor,
        cu_tags: Tensor,
        impl: str,
        max_tags: int | None,
        return_attention: bool,
    ) -> tuple[Tensor, Tensor | None]:
        images, points, _ = grid.shape
        q = self.query(self.query_norm(x)).view(len(x), self.heads, -1)
        k = self.key(grid).view(images, points, self.heads, -1)
        v = self.value(grid).view(images, points, self.heads, -1)
        attention = None
        if return_attention:
            values, attention = tag_attention(
                q, k, v, cu_tags, impl=impl, max_tags=max_tags, return_attention=True
            )
        else:
            values = tag_attention(q, k, v, cu_tags, impl=impl, max_tags=max_tags)
        x = x + self.out(values.flatten(1))
        return x + self.mlp(self.mlp_norm(x)), attention


def project_and_attend(
    tags: Tensor, grid: Tensor, cu_tags: Tensor, projection: Tensor
) -> tuple[Tensor, Tensor]:
    """Attend without parameters: logits are 100 x cosines (CLIP's temperature) of tag and projected patch,
    values Z_v.

    Keys and values differ in width, so the kernels do not apply; nothing is learned, and two small products
    are cheap.

    Args:
        tags: `[T, D]`.
        grid: `[N, P, C]`.
        cu_tags: int32 `[N + 1]`.
        projection: `[C, D]`.

    Returns:
        `[T, C]`, and the attention `[T, P]`.
    """
    image = torch.searchsorted(
        cu_tags[1:].contiguous(), torch.arange(len(tags), device=tags.device, dtype=cu_tags.dtype), right=True
    )
    normalise = nn.functional.normalize
    keys = normalise((grid.float() @ projection.float()), dim=-1)
    logits = 100 * torch.einsum("td,tpd->tp", normalise(tags.float(), dim=-1), keys[image])
    attention = logits.softmax(-1)
    return torch.einsum("tp,tpc->tc", attention, grid.float()[image]).to(grid.dtype), attention
