"""Losses as modules: they hold options and the learnable scale, and put functional.py together with gather.py."""

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmfusion.losses.functional import Positives, info_nce, widened
from mmfusion.losses.gather import gather_rows, own_rows, share_of_mean
from mmfusion.losses.pairs import Pairs


class Loss(nn.Module, ABC):
    """The loss of one term, from two sides' local rows and the pairs of all ranks' rows.

    Args:
        label: the label column whose judgments say which pairs are positive and which ignored.
    """

    def __init__(self, label: str = "relevance") -> None:
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
        pairs: of global rows, the same on all ranks. DDP must wrap this module too, to average its own parameters.
        """


class InfoNCE(Loss):
    """Contrastive loss over the batch of all ranks, with several positives per row (functional.info_nce).

    The mean is over the rows of all ranks that are valid and have a valid positive; without any, the loss is 0, with
    zero gradients to all that it depends on.

    Args:
        label: the label column whose judgments say which pairs are positive and which ignored.
        temperature: where the temperature starts; similarities are divided by it.
        learnable: whether the temperature is trained (its logarithm is, as in CLIP, Radford 2021, section 2.5).
        max_scale: the largest 1 / temperature; training is held there.
        symmetric: the mean of both directions, left to right and right to left; else left to right alone.
        positives: any: a row's positives share its probability. each: every positive must beat the negatives.
        mask_false_negatives: go by the judgments of all pairs in the batch. Without, only the positives of row i with
            row i count, the tuples' own, and all other pairs are negative, as where judgments are unknown.
    """

    log_scale: Tensor

    def __init__(
        self,
        label: str = "relevance",
        *,
        temperature: float = 0.07,
        learnable: bool = True,
        max_scale: float = 100.0,
        symmetric: bool = True,
        positives: Positives = "any",
        mask_false_negatives: bool = True,
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
        self.symmetric = symmetric
        self.positives: Positives = positives
        self.mask_false_negatives = mask_false_negatives

    @property
    def scale(self) -> Float[Tensor, ""]:
        """1 / temperature, at most max_scale; its gradient is that of exp() there too, which clamp() would stop."""
        log_scale = widened(self.log_scale)
        excess = (log_scale.detach() - math.log(self.max_scale)).clamp(min=0)
        return (log_scale - excess).exp()

    def forward(
        self,
        left: Float[Tensor, "query dim"],
        right: Float[Tensor, "product dim"],
        pairs: Pairs,
        left_valid: Bool[Tensor, "query"],
        right_valid: Bool[Tensor, "product"],
    ) -> Float[Tensor, ""]:
        self._clip_parameter()
        left_valid, right_valid = gather_rows(left_valid), gather_rows(right_valid)
        pairs = pairs.between(left_valid, right_valid)
        if not self.mask_false_negatives:
            pairs = pairs.diagonal()
        loss = self._one_way(left, right, pairs, right_valid)
        if self.symmetric:
            loss = (loss + self._one_way(right, left, pairs.swapped(), left_valid)) / 2
        return loss

    def _one_way(
        self,
        rows: Float[Tensor, "query dim"],
        columns: Float[Tensor, "product dim"],
        pairs: Pairs,
        valid: Bool[Tensor, "all_products"],
    ) -> Float[Tensor, ""]:
        """The local rows against the columns of all ranks."""
        own = pairs.of_rows(own_rows(len(rows)))
        losses = info_nce(rows, gather_rows(widened(columns)), own, self.scale, valid=valid, positives=self.positives)
        return share_of_mean(losses, len(pairs.positive[:, 0].unique()))

    @torch.no_grad()
    def _clip_parameter(self) -> None:
        """Brings back a parameter that a step took past the maximum, so that it need not come back step by step."""
        if self.training and self.log_scale.requires_grad:
            self.log_scale.data.clamp_(max=math.log(self.max_scale))
