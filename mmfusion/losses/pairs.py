"""What the rows of two sides are to each other, as coordinates: pairs are few, a second square matrix is not."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass
class Pairs:
    """Pairs (left row, right row) that are known to be worth something; every other pair is a negative.

    rows: coordinates, each pair once. gain: what a pair is worth (of a teacher's pairs its score). positive: whether
    that is enough to be a positive; the others are ignored, neither pulled together nor pushed apart, by losses that do
    not grade.
    """

    rows: Int[Tensor, "pair 2"]
    gain: Float[Tensor, "pair"]
    positive: Bool[Tensor, "pair"]

    def __len__(self) -> int:
        return len(self.rows)

    def swapped(self) -> "Pairs":
        """The same pairs as (right row, left row)."""
        return Pairs(self.rows.flip(1), self.gain, self.positive)

    def where(self, kept: Bool[Tensor, "pair"]) -> "Pairs":
        return Pairs(self.rows[kept], self.gain[kept], self.positive[kept])

    def sorted(self) -> "Pairs":
        """The same pairs by left row; those of one row stay in their order."""
        order = self.rows[:, 0].argsort(stable=True)
        return Pairs(self.rows[order], self.gain[order], self.positive[order])

    def between(self, left: Bool[Tensor, "query"], right: Bool[Tensor, "product"]) -> "Pairs":
        """The pairs whose two rows are both True."""
        return self.where(left[self.rows[:, 0]] & right[self.rows[:, 1]])

    def of_rows(self, rows: range) -> "Pairs":
        """The pairs of some consecutive left rows, which are counted from 0."""
        own = self.where((self.rows[:, 0] >= rows.start) & (self.rows[:, 0] < rows.stop))
        return Pairs(own.rows - own.rows.new_tensor([rows.start, 0]), own.gain, own.positive)

    def above(self, gain: float) -> "Pairs":
        """The positives, and of the others those worth more: what is left out becomes negative."""
        return self.where(self.positive | (self.gain > gain))

    def own(self, left: int, right: int) -> "Pairs":
        """The positives of a rank's row i with its row i, where ranks have so many rows: the tuples' own.

        One side may have more rows than tuples, not both.
        """
        rank, row = self.rows // self.rows.new_tensor([left, right]), self.rows % self.rows.new_tensor([left, right])
        return self.where(self.positive & (rank[:, 0] == rank[:, 1]) & (row[:, 0] == row[:, 1]))


def equal_pairs(left: Int[Tensor, "left"], right: Int[Tensor, "right"]) -> Int[Tensor, "pair 2"]:
    """All (left position, right position) whose ids are equal, sorted by left position, then right position."""
    left, (ids, order) = left.contiguous(), right.sort(stable=True)
    first = torch.searchsorted(ids, left)
    count = torch.searchsorted(ids, left, right=True) - first
    row = torch.arange(len(left), device=left.device).repeat_interleave(count)
    nth = torch.arange(len(row), device=left.device) - (count.cumsum(0) - count)[row]
    return torch.stack([row, order[first[row] + nth]], 1)
