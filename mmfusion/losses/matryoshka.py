"""Vectors whose leading coordinates do alone: a catalogue can be searched at any of several sizes."""

from itertools import pairwise
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from mmfusion.losses.functional import widened
from mmfusion.losses.modules import Loss
from mmfusion.losses.pairs import Pairs

LEAST = 1e-3  # of the norm of a part that is made unit-norm: a random part of 64 of 256 dimensions has .5


class Matryoshka(Loss):
    """The mean of a loss over several sizes of the vectors, each their leading coordinates, made unit-norm again.

    Matryoshka representation learning (Kusupati 2022, arXiv 2205.13147, equation 1). The whole vectors are trained too,
    whether or not `dims` lists their size. Temperature and bias are the one inner loss's, the same at all sizes.

    Args:
        loss: the loss at each size; its label is this one's.
        dims: the sizes, ascending; the evaluation ranks at each.
        weights: one per size in `dims`, above 0; None: 1 each. A size that is not listed, the whole, has 1. They are
            divided by their sum, so that the loss is as large as at one size.
    """

    def __init__(self, loss: Loss, dims: list[int], weights: list[float] | None = None) -> None:
        super().__init__(loss.label)
        if isinstance(loss, Matryoshka):
            raise ValueError("a Matryoshka around another one; expected one, with all the sizes in its dims")
        if not dims or dims[0] < 1 or any(a >= b for a, b in pairwise(dims)):
            raise ValueError(f"dims is {dims}; expected different sizes, at least 1, ascending")
        if weights is not None and (len(weights) != len(dims) or not all(weight > 0 for weight in weights)):
            raise ValueError(
                f"weights is {weights}; expected {len(dims)} numbers above 0, one for each of dims, {dims}"
            )
        self.loss, self.dims = loss, tuple(dims)
        self.weights = dict(zip(dims, weights or [1.0] * len(dims), strict=True))

    @property
    def scale(self) -> Float[Tensor, ""]:
        """The inner loss's; AttributeError when it has none."""
        return cast(Tensor, self.loss.scale)

    def forward(
        self,
        left: Float[Tensor, "query dim"],
        right: Float[Tensor, "product dim"],
        pairs: Pairs,
        left_valid: Bool[Tensor, "query"],
        right_valid: Bool[Tensor, "product"],
    ) -> Float[Tensor, ""]:
        whole = left.shape[1]
        if self.dims[-1] > whole:
            raise ValueError(
                f"dims is {list(self.dims)}, but the vectors have {whole} dimensions; leave out the larger"
            )
        weights = {**self.weights, whole: self.weights.get(whole, 1.0)}
        losses = [
            weight * self.loss(_leading(left, dim), _leading(right, dim), pairs, left_valid, right_valid)
            for dim, weight in weights.items()
        ]
        return torch.stack(losses).sum() / sum(weights.values())


def _leading(rows: Float[Tensor, "rows dim"], dim: int) -> Float[Tensor, "rows {dim}"]:
    """The whole rows are unit-norm as they are. LEAST bounds the gradient of a row whose leading part is next to 0."""
    return rows if dim == rows.shape[1] else normalize(widened(rows[:, :dim]), dim=1, eps=LEAST)
