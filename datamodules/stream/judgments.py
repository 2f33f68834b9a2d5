"""The train judgments by product, from the table beside the shards: the same as the samples hold, for whole batches.

What is drawn and listed here is, to the bit, what stream.batches.Reader makes of the samples one by one.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int64, Integer

from datamodules.shards import Shards
from datamodules.stream.listed import ListedByProduct, starts


@dataclass(frozen=True)
class Positives:
    """The train positives of the primary column: product i's queries, ascending, are start[i] to start[i + 1].

    total: running sums, within each product, of the weights by which its queries are drawn.
    """

    start: Int64[np.ndarray, "products_and_end"]
    query: Integer[np.ndarray, "positive"]
    total: Float64[np.ndarray, "positive"]

    def drawn(
        self, product: Int64[np.ndarray, "tuple"], point: Float64[np.ndarray, "tuple"]
    ) -> Int64[np.ndarray, "tuple"]:
        """Of each product, that has one, the query whose stretch holds the point of [0, 1), as plan.chosen has it."""
        low, high = self.start[product], self.start[product + 1] - 1
        assert (low <= high).all(), "trainable products have positives"
        target = point * self.total[high]
        while (low < high).any():  # halving: the first that reaches beyond the target, or else the last
            middle = (low + high) // 2
            beyond = self.total[middle] > target
            low, high = np.where(beyond, low, np.minimum(middle + 1, high)), np.where(beyond, middle, high)
        return self.query[low].astype(np.int64)


@dataclass(frozen=True)
class TrainJudgments:
    """By product. `judged`: one per label column. Memory: 12 bytes per positive, 9 per judgment and column."""

    positives: Positives
    judged: dict[str, ListedByProduct]

    @classmethod
    def of(cls, shards: Shards, rarity: Float64[np.ndarray, "query"]) -> "TrainJudgments":
        """rarity: a query's weight, with which its gain is multiplied."""
        train = shards.judgments("train")
        order = np.argsort(train.product, kind="stable")  # by (product, query), as they were by (query, product)
        product, query = train.product[order], train.query[order].astype(np.int32)
        gains = {column: gain[order].astype(np.float64) for column, gain in train.gain.items()}
        judged = {}
        for column, gain in gains.items():
            rows = gain > 0  # not where NaN: not judged in this column
            positive = gain[rows] >= train.positive_from[column]
            judged[column] = ListedByProduct.of(product[rows], query[rows], gain[rows], positive, len(shards))
        primary = shards.manifest.primary
        rows = gains[primary] >= train.positive_from[primary]
        start, of_whom = starts(product[rows], len(shards)), query[rows]
        return cls(Positives(start, of_whom, _running(gains[primary][rows] * rarity[of_whom], start)), judged)


def _running(
    weight: Float64[np.ndarray, "positive"], start: Int64[np.ndarray, "products_and_end"]
) -> Float[np.ndarray, "positive"]:
    """np.cumsum of each list by itself: added in the same order, so that the sums are the same to the bit."""
    total, length = weight.copy(), np.diff(start)
    longest = np.argsort(-length, kind="stable")
    first, length = start[:-1][longest], length[longest]
    for place in range(1, int(length.max(initial=0))):
        at = first[: np.searchsorted(-length, -place)] + place  # of the lists that are longer than `place`
        total[at] += total[at - 1]
    return total
