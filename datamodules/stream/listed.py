"""What is said of pairs, by product: judgments of a label column, or a teacher's scores, for whole batches at once."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Integer

from mmfusion.batch import Judged


@dataclass(frozen=True)
class ListedByProduct:
    """Product i's entries are those from start[i] to start[i + 1]. 9 bytes per entry and 8 per product.

    `of` keeps the order that the entries of a product have.
    """

    start: Int64[np.ndarray, "products_and_end"]
    query: Integer[np.ndarray, "listed"]
    gain: Float[np.ndarray, "listed"]
    positive: Bool[np.ndarray, "listed"]

    @classmethod
    def of(
        cls,
        product: Integer[np.ndarray, "listed"],
        query: Integer[np.ndarray, "listed"],
        gain: Float[np.ndarray, "listed"],
        positive: Bool[np.ndarray, "listed"],
        products: int,
    ) -> "ListedByProduct":
        order = np.argsort(product, kind="stable")
        gains = gain[order].astype(np.float32)
        return cls(starts(product[order], products), query[order].astype(np.int32), gains, positive[order])

    def listed(self, product: Int64[np.ndarray, "product"]) -> Judged:
        """What is said of the products in a batch's rows."""
        first = self.start[product]
        count = self.start[product + 1] - first
        row = np.repeat(np.arange(len(product)), count)
        at = np.arange(len(row)) + np.repeat(first - (np.cumsum(count) - count), count)
        return Judged(
            product=torch.from_numpy(row),
            query_id=torch.from_numpy(self.query[at].astype(np.int64)),
            gain=torch.from_numpy(self.gain[at]),
            positive=torch.from_numpy(self.positive[at]),
        )


def starts(product: Integer[np.ndarray, "listed"], products: int) -> Int64[np.ndarray, "products_and_end"]:
    """Where the entries of each product begin, of entries sorted by product, and at last where all end."""
    return np.searchsorted(product, np.arange(products + 1)).astype(np.int64)
