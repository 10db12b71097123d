"""The adaptive weight tuner: how much each tag of an image counts, w = softmax(signal / temperature).

What the weights do is `TunaConfig.tag_coupling`:

| coupling | factor of H_vt and H_t | added to the decoder's attention logits of the tag's tokens |
| --- | --- | --- |
| `multiply` | w | |
| `multiply_max` | w / max w | |
| `log_bias` | 1 | log w |
| `drop` | w / max w | minus infinity where that is below the threshold |
| `none` | 1 | |
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tuna_kernels import score_weights, tag_weights
from tuna_model.modeling.config import TunaConfig


class WeightTuner(nn.Module):
    """Weights of the tags of a batch, in float32."""

    def __init__(self, config: TunaConfig) -> None:
        super().__init__()
        self.config = config
        self.grounded = False
        """Whether tag embeddings are learnt from pictures (`tagstore ground`): `mixed` then takes
        `tag_mix_grounded`. Said by the store that is asked, so no part of the configuration."""
        if config.learn_temperature:
            # its logarithm, so that it stays positive
            self.log_temperature = nn.Parameter(torch.tensor([math.log(config.tag_temperature)]))

    @property
    def temperature(self) -> float | Tensor:
        """Of the softmax; a tensor of one element where it is learned."""
        learned = self.config.learn_temperature
        return self.log_temperature.float().exp() if learned else self.config.tag_temperature

    def forward(
        self, embeddings: Tensor, image_vectors: Tensor | None, signals: Tensor, cu_tags: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """
        Args:
            embeddings: `[T, D]` of the tags.
            image_vectors: `[N, D]`; only the signals `relevance` and `mixed` need them.
            signals: `[T, 2]`, similarity and vote share.
            cu_tags: int32 `[N + 1]`.

        Returns:
            Weights `[T]` for people to read (under `multiply`, `log_bias` and `none` those of an image sum to
            1; under the others its best tag has 1), factors `[T]`, and biases `[T]` (minus infinity: hidden)
            or None.

        Raises:
            ValueError: `relevance` or `mixed` without image vectors.
        """
        config = self.config
        # without a coupling the weights are still reported
        coupling = "multiply" if config.tag_coupling == "none" else config.tag_coupling
        options: Any = {
            "temperature": self.temperature,
            "coupling": coupling,
            "threshold": config.tag_threshold if coupling == "drop" else 0.0,
            "impl": config.kernels,
        }
        if config.tag_signal in ("relevance", "mixed") and image_vectors is None:
            raise ValueError(
                f"tag_signal '{config.tag_signal}' needs image vectors in the tags' space, and this "
                "checkpoint's own tower has none: call join_encoder(), pass image_vectors, or take another "
                "tag_signal"
            )
        if config.tag_signal == "relevance":
            assert image_vectors is not None
            weights = tag_weights(embeddings.float(), image_vectors.float(), cu_tags, **options)
        else:
            weights = score_weights(
                self._score(embeddings, image_vectors, signals, cu_tags), cu_tags, **options
            )
        if config.tag_coupling == "none":
            return weights, torch.ones_like(weights), None
        if config.tag_coupling == "log_bias":
            return weights.exp(), torch.ones_like(weights), weights
        if config.tag_coupling == "drop":
            return weights, weights, torch.zeros_like(weights).masked_fill(weights == 0, -torch.inf)
        return weights, weights, None

    def _score(
        self, embeddings: Tensor, image_vectors: Tensor | None, signals: Tensor, cu_tags: Tensor
    ) -> Tensor:
        """`[T]`, the signal of each tag."""
        similarity, vote_share = signals.float().unbind(1)
        if self.config.tag_signal == "similarity":
            return similarity
        if self.config.tag_signal == "vote_share":
            return vote_share
        if image_vectors is None or self.config.tag_signal == "uniform":
            return torch.zeros_like(similarity)
        image = torch.arange(len(image_vectors), device=cu_tags.device)
        image = torch.repeat_interleave(image, cu_tags.diff(), output_size=len(embeddings))
        relevance = (embeddings.float() * image_vectors.float()[image]).sum(1)
        mix = self.config.tag_mix_grounded if self.grounded else self.config.tag_mix
        of_relevance, of_similarity, of_votes = mix
        return of_relevance * relevance + of_similarity * similarity + of_votes * vote_share
