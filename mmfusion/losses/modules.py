"""What all losses share: how they are called, and the learnable scale."""

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmfusion.losses.functional import widened
from mmfusion.losses.pairs import Pairs


class Loss(nn.Module, ABC):
    """The loss of one term, from two sides' local rows and the pairs of all ranks' rows.

    Args:
        label: what lists the pairs: a label column, or a table of a teacher's scores; null: the primary label column.
    """

    reads: Literal["judgments", "scores"] = "judgments"  # whose pairs: of a label column, or a teacher's (data.scores)
    dims: tuple[int, ...] = ()  # the leading dimensions that are trained to do alone (matryoshka.py)

    def __init__(self, label: str | None = None) -> None:
        super().__init__()
        self.label = label

    @abstractmethod
    def forward(
        self,
        left: Float[Tensor, "query dim"],
        right: Float[Tensor, "product dim"],
        pairs: Pairs,
        left_valid: Bool[Tensor, "query"],
        right_valid: Bool[Tensor, "product"],
    ) -> Float[Tensor, ""]:
        """This rank's loss. Its mean over ranks is the loss of one process on the whole batch, and so is its gradient.

        left, right: this rank's unit-norm rows, as many on each rank; those not valid take no part, if they are finite.
        Row i of both is one tuple; left may have more rows, extra queries, and so may right, hard negatives.
        pairs: of global rows, the same on all ranks. DDP must wrap this module too, to average its own parameters.
        """


class Scaled(Loss):
    """A loss whose similarities are multiplied by a learnable scale, 1 / temperature.

    Args:
        label: what lists the pairs: a label column, or a table of a teacher's scores; null: the primary label column.
        temperature: where the temperature starts; similarities are divided by it.
        learnable: whether the temperature is trained (its logarithm is, as in CLIP, Radford 2021, section 2.5).
        max_scale: the largest 1 / temperature; training is held there.
    """

    log_scale: Tensor

    def __init__(
        self,
        label: str | None = None,
        *,
        temperature: float = 0.07,
        learnable: bool = True,
        max_scale: float = 100.0,
    ) -> None:
        super().__init__(label)
        if not (temperature > 0 and temperature * max_scale >= 1):
            raise ValueError(
                f"temperature={temperature} with max_scale={max_scale}; expected a temperature above 0 whose scale, "
                "1 / temperature, is at most max_scale: raise one of the two"
            )
        log_scale = torch.tensor(-math.log(temperature))
        if learnable:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)
        self.max_scale = max_scale

    @property
    def scale(self) -> Float[Tensor, ""]:
        """1 / temperature, at most max_scale; its gradient is that of exp() there too, which clamp() would stop."""
        log_scale = widened(self.log_scale)
        excess = (log_scale.detach() - math.log(self.max_scale)).clamp(min=0)
        return (log_scale - excess).exp()

    @torch.no_grad()
    def clip_scale(self) -> None:
        """Brings back a parameter that a step took past the maximum, so that it need not come back step by step."""
        if self.training and self.log_scale.requires_grad:
            self.log_scale.data.clamp_(max=math.log(self.max_scale))


class Listing(Scaled):
    """A loss that compares all rows, and goes by the judgments of the batch where it masks false negatives.

    Options as in InfoNCE and Sigmoid; those of Scaled are passed on.
    """

    def __init__(
        self,
        label: str | None,
        *,
        mask_false_negatives: bool = True,
        hard_up_to: float,
        chunk: int | None,
        **scaled: Any,
    ) -> None:
        super().__init__(label, **scaled)
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk is {chunk}; expected a number of rows, at least 1, or null")
        if hard_up_to and not mask_false_negatives:
            raise ValueError(
                f"hard_up_to={hard_up_to} with mask_false_negatives=false: without judgments all pairs but the tuples' "
                "own are negatives already; leave out one of the two"
            )
        self.mask_false_negatives, self.hard_up_to, self.chunk = mask_false_negatives, hard_up_to, chunk

    def listed(self, pairs: Pairs, left: int, right: int) -> Pairs:
        """The pairs that are no negatives. left, right: rows per rank."""
        return pairs.above(self.hard_up_to) if self.mask_false_negatives else pairs.own(left, right)
