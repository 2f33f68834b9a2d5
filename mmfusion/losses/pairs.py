"""What the rows of two sides are to each other, as coordinates: positives are sparse, a second square matrix is not."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass
class Pairs:
    """(left row, right row) coordinates; every pair in neither list is a negative.

    Coordinates are unique and in one list only. `ignored` pairs are neither pulled together nor pushed apart.
    """

    positive: Int[Tensor, "pair 2"]
    ignored: Int[Tensor, "ignored 2"]

    def swapped(self) -> "Pairs":
        """The same pairs as (right row, left row)."""
        return self._map(lambda pairs: pairs.flip(1))

    def between(self, left: Bool[Tensor, "query"], right: Bool[Tensor, "product"]) -> "Pairs":
        """The pairs whose two rows are both True."""
        return self._map(lambda pairs: pairs[left[pairs[:, 0]] & right[pairs[:, 1]]])

    def of_rows(self, rows: range) -> "Pairs":
        """The pairs of some consecutive left rows, which are counted from 0."""
        within = self._map(lambda pairs: pairs[(pairs[:, 0] >= rows.start) & (pairs[:, 0] < rows.stop)])
        return within._map(lambda pairs: pairs - pairs.new_tensor([rows.start, 0]))

    def diagonal(self) -> "Pairs":
        """The positives of row i with row i alone; all else becomes negative."""
        return Pairs(self.positive[self.positive[:, 0] == self.positive[:, 1]], self.ignored[:0])

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Pairs":
        return Pairs(function(self.positive), function(self.ignored))


def equal_pairs(left: Int[Tensor, "left"], right: Int[Tensor, "right"]) -> Int[Tensor, "pair 2"]:
    """All (left position, right position) whose ids are equal, sorted by left position, then right position."""
    left, (ids, order) = left.contiguous(), right.sort(stable=True)
    first = torch.searchsorted(ids, left)
    count = torch.searchsorted(ids, left, right=True) - first
    row = torch.arange(len(left), device=left.device).repeat_interleave(count)
    nth = torch.arange(len(row), device=left.device) - (count.cumsum(0) - count)[row]
    return torch.stack([row, order[first[row] + nth]], 1)
