"""Mixture of experts plus a bilinear term, as readers of arXiv 2603.04836 describe its fusion network."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmfusion.encoders.encoded import Encoded
from mmfusion.fusion.head import FusionHead, at_least, start_at_zero, unit_scale, views


class MoEBilinear(FusionHead):
    """g = softmax(Wg [t; v; t*v]); h = sum_m g_m Expert_m([t; v]); out = W [h; Bt t * Bv v].

    Expert_m is an MLP with one hidden layer, GELU. All experts are computed for all products, as two matrix products:
    the gate multiplies the experts' hidden layers, whose second layers then add up as one.

    Args:
        experts: number of experts.
        rank: of the bilinear term; 0 leaves it out.
        hidden: width of each expert's hidden layer, in multiples of dim.
        dropout: after the experts' hidden layers, a probability.
        residual: add to the masked sum of the views, starting from it.
    """

    def __init__(
        self,
        dim: int,
        *,
        experts: int = 4,
        rank: int = 64,
        hidden: float = 1.0,
        dropout: float = 0.1,
        residual: bool = True,
    ) -> None:
        super().__init__(dim)
        self.experts = at_least("MoEBilinear", "experts", experts, 1)
        width = at_least("MoEBilinear", "hidden * dim", int(hidden * dim), 1)
        self.residual = residual
        self.gate = nn.Linear(3 * dim, experts)
        self.first = nn.Linear(2 * dim, experts * width)
        self.second = nn.Parameter(torch.empty(experts, width, dim).uniform_(-(width**-0.5), width**-0.5))
        self.second_bias = nn.Parameter(torch.zeros(experts, dim))
        self.dropout = nn.Dropout(dropout)
        self.rank = at_least("MoEBilinear", "rank", rank, 0)
        if rank:
            self.bilinear_text = nn.Linear(dim, rank, bias=False)
            self.bilinear_image = nn.Linear(dim, rank, bias=False)
        self.out = nn.Linear(dim + rank, dim, bias=False)
        if residual:
            start_at_zero(self.out)

    def _weights(
        self, t: Float[Tensor, "product dim"], v: Float[Tensor, "product dim"]
    ) -> Float[Tensor, "product expert"]:
        return self.gate(torch.cat([t, v, t * v], 1)).softmax(1)

    def _mixture(
        self, t: Float[Tensor, "product dim"], v: Float[Tensor, "product dim"]
    ) -> Float[Tensor, "product dim"]:
        weights = self._weights(t, v)
        hidden = self.dropout(F.gelu(self.first(torch.cat([t, v], 1)))).unflatten(1, (self.experts, -1))
        return (hidden * weights[:, :, None]).flatten(1) @ self.second.flatten(0, 1) + weights @ self.second_bias

    def forward(
        self, text: Encoded, image: Encoded, present: Bool[Tensor, "product 2"]
    ) -> Float[Tensor, "product dim"]:
        t, v = views(text, image, present)
        a, b = unit_scale(t), unit_scale(v)
        parts = [self._mixture(a, b)]
        if self.rank:
            parts.append(self.bilinear_text(a) * self.bilinear_image(b))
        added = self.out(torch.cat(parts, 1)) / self.dim**0.5
        return t + v + added if self.residual else added

    def gates(
        self, text: Encoded, image: Encoded, present: Bool[Tensor, "product 2"]
    ) -> dict[str, Float[Tensor, "product"]]:
        t, v = views(text, image, present)
        weights = self._weights(unit_scale(t), unit_scale(v)).unbind(1)
        return {f"expert_{number}": weight for number, weight in enumerate(weights)}
