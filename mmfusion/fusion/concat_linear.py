"""A linear map of both views: 2 dim^2 parameters, the strong baseline on frozen features."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmfusion.encoders.encoded import Encoded
from mmfusion.fusion.head import FusionHead, at_least, start_at_zero, unit_scale, views


class ConcatLinear(FusionHead):
    """W [t; v] + b, zeros in the place of an absent view.

    Args:
        hidden: width, in multiples of dim, of a layer in between without activation: the same functions from 1 on, with
            the number of parameters of another head. None: without it.
        residual: add to the masked sum of the views, starting from it.
    """

    def __init__(self, dim: int, *, hidden: float | None = None, residual: bool = True) -> None:
        super().__init__(dim)
        self.residual = residual
        width = 2 * dim if hidden is None else at_least("ConcatLinear", "hidden * dim", int(hidden * dim), dim)
        self.first = nn.Identity() if hidden is None else nn.Linear(2 * dim, width, bias=False)
        self.out = nn.Linear(width, dim)
        if residual:
            start_at_zero(self.out)

    def forward(
        self, text: Encoded, image: Encoded, present: Bool[Tensor, "product 2"]
    ) -> Float[Tensor, "product dim"]:
        t, v = views(text, image, present)
        added = self.out(self.first(torch.cat([unit_scale(t), unit_scale(v)], 1))) / self.dim**0.5
        return t + v + added if self.residual else added
