"""A multi-layer perceptron on both views."""

from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmfusion.encoders.encoded import Encoded
from mmfusion.fusion.head import FusionHead, at_least, start_at_zero, unit_scale, views


class ConcatMLP(FusionHead):
    """MLP([t; v]) with GELU, zeros in the place of an absent view.

    Args:
        hidden: width of the hidden layers, in multiples of dim.
        layers: number of hidden layers, at least 1.
        dropout: after each hidden layer, a probability.
        residual: add to the masked sum of the views, starting from it.
    """

    def __init__(
        self, dim: int, *, hidden: float = 2.0, layers: int = 1, dropout: float = 0.1, residual: bool = True
    ) -> None:
        super().__init__(dim)
        at_least("ConcatMLP", "layers", layers, 1)
        width = at_least("ConcatMLP", "hidden * dim", int(hidden * dim), 1)
        self.residual = residual
        sizes = [2 * dim, *[width] * layers]
        hidden_layers = [nn.Sequential(nn.Linear(a, b), nn.GELU(), nn.Dropout(dropout)) for a, b in pairwise(sizes)]
        self.hidden = nn.Sequential(*hidden_layers)
        self.out = nn.Linear(width, dim)
        if residual:
            start_at_zero(self.out)

    def forward(
        self, text: Encoded, image: Encoded, present: Bool[Tensor, "product 2"]
    ) -> Float[Tensor, "product dim"]:
        t, v = views(text, image, present)
        added = self.out(self.hidden(torch.cat([unit_scale(t), unit_scale(v)], 1))) / self.dim**0.5
        return t + v + added if self.residual else added
