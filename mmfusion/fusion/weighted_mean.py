"""Weighted mean of the two views: one number for the whole catalogue, fixed or learned."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmfusion.encoders.encoded import Encoded
from mmfusion.fusion.head import FusionHead, softmax_over_present, views


class WeightedMean(FusionHead):
    """w t + (1 - w) v; with one modality absent, the other view alone.

    Args:
        weight: w, the share of the text, above 0 and below 1; the starting point when learned.
        learned: train w (as the logit of a sigmoid).
    """

    def __init__(self, dim: int, *, weight: float = 0.5, learned: bool = False) -> None:
        super().__init__(dim)
        if not 0 < weight < 1:
            raise ValueError(
                f"WeightedMean: weight is {weight}; it must be above 0 and below 1 (the share of the text)"
            )
        logit = torch.tensor(math.log(weight / (1 - weight)))
        if learned:
            self.logit = nn.Parameter(logit)
        else:
            self.register_buffer("logit", logit)

    def _weights(self, present: Bool[Tensor, "product 2"]) -> Float[Tensor, "product 2"]:
        logits = torch.stack([self.logit, torch.zeros_like(self.logit)])
        return softmax_over_present(logits.expand(len(present), 2), present)

    def forward(
        self, text: Encoded, image: Encoded, present: Bool[Tensor, "product 2"]
    ) -> Float[Tensor, "product dim"]:
        weights = self._weights(present)
        t, v = views(text, image, present)
        return weights[:, :1] * t + weights[:, 1:] * v

    def gates(
        self, text: Encoded, image: Encoded, present: Bool[Tensor, "product 2"]
    ) -> dict[str, Float[Tensor, "product"]]:
        return dict(zip(("text", "image"), self._weights(present).unbind(1), strict=True))
