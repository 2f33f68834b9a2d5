"""Contrastive losses over the batch of all ranks: the mathematics of functional.py on the matrix of contrast.py."""

from abc import abstractmethod
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from mmfusion.losses.contrast import contrast
from mmfusion.losses.functional import Positives, graded_info_nce, row_weights, widened
from mmfusion.losses.gather import exchange_columns, gather_ragged, gather_rows, own_rows, share_of_mean
from mmfusion.losses.modules import Listing
from mmfusion.losses.pairs import Pairs


class Contrastive(Listing):
    """What InfoNCE and GradedInfoNCE share: their means are over the rows of all ranks that have a pair to win with.

    Each rank compares its left rows with the right rows of all ranks, once for both directions.
    """

    def __init__(self, label: str | None, symmetric: bool, positives: Positives, **listing: Any) -> None:
        super().__init__(label, **listing)
        self.symmetric = symmetric
        self.positives: Positives = positives

    @abstractmethod
    def worth(self, pairs: Pairs) -> Float[Tensor, "pair"]:
        """What each of them counts as a positive; 0: it is ignored."""

    def forward(
        self,
        left: Float[Tensor, "query dim"],
        right: Float[Tensor, "product dim"],
        pairs: Pairs,
        left_valid: Bool[Tensor, "query"],
        right_valid: Bool[Tensor, "product"],
    ) -> Float[Tensor, ""]:
        self.clip_scale()
        all_left, all_right = gather_rows(left_valid), gather_rows(right_valid)
        pairs = self.listed(pairs, len(left), len(right)).between(all_left, all_right).sorted()
        own = pairs.of_rows(own_rows(len(left)))
        found = contrast(
            self.scale * widened(left), gather_rows(widened(right)), own.rows, left_valid, all_right,
            columns=self.symmetric, chunk=self.chunk,
        )  # fmt: skip
        loss = self._mean(found.row, found.listed, own, self._total(pairs, len(all_left)))
        if not self.symmetric:
            return loss
        columns = own_rows(len(right))
        here = (pairs.rows[:, 1] >= columns.start) & (pairs.rows[:, 1] < columns.stop)
        negatives = exchange_columns(found.column).logsumexp(0)
        similarity = gather_ragged(found.listed)[here]  # of all pairs, in their order: they are sorted by left row
        other = self._mean(
            negatives, similarity, pairs.swapped().of_rows(columns), self._total(pairs.swapped(), len(all_right))
        )
        return (loss + other) / 2

    def _mean(
        self,
        negatives: Float[Tensor, "row"],
        similarity: Float[Tensor, "pair"],
        pairs: Pairs,
        total: Float[Tensor, ""],
    ) -> Float[Tensor, ""]:
        """This rank's share of the mean of one direction; `pairs` are of this rank's rows, `total` of all ranks'."""
        worth = self.worth(pairs).to(similarity.dtype)
        row, worth, similarity = pairs.rows[worth > 0, 0], worth[worth > 0], similarity[worth > 0]
        losses = graded_info_nce(negatives, similarity, row, worth, self.positives)
        return share_of_mean(losses * row_weights(row, worth, len(losses)), total)

    def _total(self, pairs: Pairs, rows: int) -> Float[Tensor, ""]:
        """What all rows count together."""
        return row_weights(pairs.rows[:, 0], self.worth(pairs), rows).sum()


class InfoNCE(Contrastive):
    """Contrastive loss over the batch of all ranks, with several positives per row (functional.graded_info_nce).

    The mean is over the rows of all ranks that are valid and have a valid positive; without any, the loss is 0, with
    zero gradients to all that it depends on.

    Args:
        label: the label column whose judgments say which pairs are positive and which ignored; null: the primary one.
        temperature: where the temperature starts; similarities are divided by it.
        learnable: whether the temperature is trained (its logarithm is, as in CLIP, Radford 2021, section 2.5).
        max_scale: the largest 1 / temperature; training is held there.
        symmetric: the mean of both directions, left to right and right to left; else left to right alone.
        positives: any: a row's positives share its probability. each: every positive must beat the negatives.
        mask_false_negatives: go by the judgments of all pairs in the batch. Without, only the positives of row i with
            row i count, the tuples' own, and all other pairs are negative, as where judgments are unknown.
        hard_up_to: judged pairs that are worth at most this are negatives; those from there to a positive are ignored.
        chunk: rows of the similarity matrix that exist at a time, computed a second time in the backward pass; null:
            the whole matrix is kept.
    """

    def __init__(
        self,
        label: str | None = None,
        *,
        temperature: float = 0.07,
        learnable: bool = True,
        max_scale: float = 100.0,
        symmetric: bool = True,
        positives: Positives = "any",
        mask_false_negatives: bool = True,
        hard_up_to: float = 0.0,
        chunk: int | None = None,
    ) -> None:
        super().__init__(
            label, symmetric, positives, temperature=temperature, learnable=learnable, max_scale=max_scale,
            mask_false_negatives=mask_false_negatives, hard_up_to=hard_up_to, chunk=chunk,
        )  # fmt: skip

    def worth(self, pairs: Pairs) -> Float[Tensor, "pair"]:
        return pairs.positive.float()


class GradedInfoNCE(Contrastive):
    """Contrastive loss in which every judged pair is a positive in proportion to its gain (functional.graded_info_nce).

    A pair beats the negatives, unjudged or judged as worth nothing, and the pairs that are worth less; those worth more
    are not in its denominator. A row's pairs count in proportion to their gains, and a row in proportion to its best
    pair's: a query of which the batch has only a substitute (gain .1) counts a tenth of one whose exact product is
    there. With equal gains it is InfoNCE.

    Args:
        label: the label column whose gains weigh the pairs; null: the primary one.
        temperature: where the temperature starts; similarities are divided by it.
        learnable: whether the temperature is trained (its logarithm is, as in CLIP, Radford 2021, section 2.5).
        max_scale: the largest 1 / temperature; training is held there.
        symmetric: the mean of both directions, left to right and right to left; else left to right alone.
        positives: any: a row's pairs of one gain share the probability. each: every pair must win.
        hard_up_to: judged pairs that are not positive and worth at most this are negatives.
        chunk: rows of the similarity matrix that exist at a time, computed a second time in the backward pass; null:
            the whole matrix is kept.
    """

    def __init__(
        self,
        label: str | None = None,
        *,
        temperature: float = 0.07,
        learnable: bool = True,
        max_scale: float = 100.0,
        symmetric: bool = True,
        positives: Positives = "any",
        hard_up_to: float = 0.0,
        chunk: int | None = None,
    ) -> None:
        super().__init__(
            label, symmetric, positives, temperature=temperature, learnable=learnable, max_scale=max_scale,
            hard_up_to=hard_up_to, chunk=chunk,
        )  # fmt: skip

    def worth(self, pairs: Pairs) -> Float[Tensor, "pair"]:
        return pairs.gain
