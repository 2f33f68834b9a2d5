"""One linear layer on both views: 2 dim^2 parameters, the strong baseline on frozen features."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmfusion.encoders.encoded import Encoded
from mmfusion.fusion.head import FusionHead, start_at_zero, unit_scale, views


class ConcatLinear(FusionHead):
    """W [t; v] + b, zeros in the place of an absent view.

    Args:
        residual: add to the masked sum of the views, starting from it.
    """

    def __init__(self, dim: int, *, residual: bool = True) -> None:
        super().__init__(dim)
        self.residual = residual
        self.out = nn.Linear(2 * dim, dim)
        if residual:
            start_at_zero(self.out)

    def forward(
        self, text: Encoded, image: Encoded, present: Bool[Tensor, "product 2"]
    ) -> Float[Tensor, "product dim"]:
        t, v = views(text, image, present)
        added = self.out(torch.cat([unit_scale(t), unit_scale(v)], 1)) / self.dim**0.5
        return t + v + added if self.residual else added
