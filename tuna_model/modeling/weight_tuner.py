"""The adaptive weight tuner: how much each tag of an image counts, w = softmax(signal / temperature), and what the weights do.

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

import torch
from torch import Tensor, nn

from tuna_kernels import score_weights, tag_weights
from tuna_model.modeling.config import TunaConfig


class WeightTuner(nn.Module):
    """Weights of the tags of a batch, in float32."""

    def __init__(self, config: TunaConfig) -> None:
        super().__init__()
        self.config = config
        if config.learn_temperature:
            # its logarithm, so that it stays positive
            self.log_temperature = nn.Parameter(torch.tensor([math.log(config.tag_temperature)]))

    @property
    def temperature(self) -> float | Tensor:
        """Of the softmax; a tensor of one element where it is learned."""
        return (
            self.log_temperature.float().exp()
            if self.config.learn_temperature
            else self.config.tag_temperature
        )

    def forward(
        self, embeddings: Tensor, image_vectors: Tensor | None, signals: Tensor, cu_tags: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """
        Args:
            embeddings: `[T, D]` of the tags.
            image_vectors: `[N, D]`; only the signal `relevance` needs them.
            signals: `[T, 2]`, similarity and share of votes.
            cu_tags: int32 `[N + 1]`.

        Returns:
            Weights `[T]` as people read them (over an image they sum to 1 under `multiply`, `log_bias` and `none`; the best tag has 1 under
            the others), factors `[T]`, and biases `[T]` (minus infinity: not seen) or None.

        Raises:
            ValueError: `relevance` without image vectors.
        """
        config = self.config
        # without a coupling they are still shown
        coupling = "multiply" if config.tag_coupling == "none" else config.tag_coupling
        threshold = config.tag_threshold if coupling == "drop" else 0.0
        temperature, impl = self.temperature, config.kernels
        if config.tag_signal == "relevance":
            if image_vectors is None:
                raise ValueError(
                    "tag_signal 'relevance' needs image vectors in the tags' space, and this checkpoint's own tower has none: "
                    "call join_encoder(), pass image_vectors, or take another tag_signal"
                )
            found = tag_weights(
                embeddings.float(), image_vectors.float(), cu_tags,
                temperature=temperature, coupling=coupling, threshold=threshold, impl=impl,
            )  # fmt: skip
        else:
            column = {
                "similarity": signals[:, 0],
                "votes": signals[:, 1],
                "uniform": torch.zeros_like(signals[:, 0]),
            }[config.tag_signal]
            found = score_weights(
                column.float(),
                cu_tags,
                temperature=temperature,
                coupling=coupling,
                threshold=threshold,
                impl=impl,
            )
        if config.tag_coupling == "none":
            return found, torch.ones_like(found), None
        if config.tag_coupling == "log_bias":
            return found.exp(), torch.ones_like(found), found
        if config.tag_coupling == "drop":
            return found, found, torch.zeros_like(found).masked_fill(found == 0, -torch.inf)
        return found, found, None
