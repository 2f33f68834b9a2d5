"""The one call that all fusion heads share: (text, image, present) -> (product, dim)."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmfusion.encoders.encoded import Encoded


class FusionHead(nn.Module, ABC):
    """Fuses the two views of a product.

    What comes in is already in the shared space: `pooled` are the unit-norm view vectors (product, dim), `tokens` are
    projected to dim and not normalised. `present` has text in column 0 and image in column 1. What comes out is not
    normalised, does not depend on what fills an absent modality (NaN included) and is finite even when both are absent.

    A learned head with `residual` adds to the masked sum of the views and starts from it: its last layer starts at
    zero, so that at step 0 the fused vector is the masked sum.
    """

    needs_tokens: ClassVar[bool] = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    @abstractmethod
    def forward(
        self, text: Encoded, image: Encoded, present: Bool[Tensor, "product 2"]
    ) -> Float[Tensor, "product dim"]:
        """The fused vectors, not normalised."""

    def gates(
        self, text: Encoded, image: Encoded, present: Bool[Tensor, "product 2"]
    ) -> dict[str, Float[Tensor, "product"]]:
        """The weight of each modality or expert in each product, by name; empty for a head that weighs nothing.

        Weights of experts sum to 1; weights of modalities too, or are both 0 for a product that has neither.
        """
        return {}


def views(
    text: Encoded, image: Encoded, present: Bool[Tensor, "product 2"]
) -> tuple[Float[Tensor, "product dim"], Float[Tensor, "product dim"]]:
    """Both pooled vectors, zeros where absent."""
    gap = text.pooled.new_zeros(())
    return torch.where(present[:, :1], text.pooled, gap), torch.where(present[:, 1:], image.pooled, gap)


def softmax_over_present(
    logits: Float[Tensor, "product 2 *entry"], present: Bool[Tensor, "product 2"]
) -> Float[Tensor, "product 2 *entry"]:
    """Weights of the two modalities: they sum to 1, an absent one has 0; both are 0 where neither is there."""
    there = present.reshape(*present.shape, *[1] * (logits.ndim - 2))
    return logits.masked_fill(~there, torch.finfo(logits.dtype).min).softmax(1) * there


def unit_scale(vectors: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
    """Unit-norm rows times sqrt(dim): entries of size 1, which is what a layer's ordinary initial weights are made for.

    Heads compute on these and divide what they add to the views by sqrt(dim) again.
    """
    return vectors * vectors.shape[-1] ** 0.5


def start_at_zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def at_least(head: str, option: str, value: int, least: int) -> int:
    """The value; raises ValueError, naming the option, when it is under the least that makes sense."""
    if value < least:
        raise ValueError(f"{head}: {option} is {value}; it must be at least {least}")
    return value
