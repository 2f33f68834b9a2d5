"""What an encoder gives: one pooled vector per product or query, and the tokens that it was pooled from."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass
class Encoded:
    """`mask` is True on real tokens; the token axis is 0 long where nobody needs tokens.

    Tokens may be of another width than the pooled vector (a convolutional map before its head).
    """

    pooled: Float[Tensor, "product width"]
    tokens: Float[Tensor, "product token token_width"]
    mask: Bool[Tensor, "product token"]

    @classmethod
    def pooled_only(cls, pooled: Float[Tensor, "product width"]) -> "Encoded":
        """The pooled vectors with a token axis of length 0."""
        tokens = pooled.new_zeros(len(pooled), 0, pooled.shape[1])
        return cls(pooled, tokens, tokens.new_zeros(tokens.shape[:2], dtype=torch.bool))

    @classmethod
    def unpadded(
        cls, pooled: Float[Tensor, "product width"], tokens: Float[Tensor, "product token token_width"]
    ) -> "Encoded":
        """With tokens that are all real."""
        return cls(pooled, tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device))
