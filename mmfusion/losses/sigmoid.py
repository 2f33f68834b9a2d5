"""The sigmoid loss, in which every pair is a decision of its own: no row needs the others, so blocks can pass by."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from mmfusion.losses.functional import lowest, widened
from mmfusion.losses.gather import gather_rows, own_rows, share_of_mean
from mmfusion.losses.modules import Listing
from mmfusion.losses.pairs import Pairs
from mmfusion.losses.ring import blocks, pass_on
from mmfusion.precision import full_precision

# Entries of the matrix at a time: a core's cache holds them; elsewhere 2**26, which fill a GPU. But 128 rows at least:
# of fewer, products are slow.
ENTRIES = {"cpu": 2**20}
EXACT = 50  # softplus is the identity above this, to the last bit of float64; its default, 20, is 2e-9 off


class Sigmoid(Listing):
    """A binary decision per pair of the batch of all ranks (SigLIP, Zhai 2023, arXiv 2303.15343, equation 1).

    loss = -1/n * sum over valid left rows i and valid right rows j of log sigmoid(z_ij * (scale * cosine_ij + bias)),
    with z_ij = 1 for positives and -1 for all others, and n the number of valid left rows of all ranks, with or without
    a positive. Ignored pairs take no part. A row may have several positives, each counts. 0, with zero gradients, when
    no left or no right row is valid.

    Memory per rank does not grow with the number of ranks: their right rows come by in a ring (ring.py), and of the
    similarities to a block only some rows exist at a time; the backward pass, which can run once, computes them again.

    Args:
        label: the label column that lists the pairs; None: the primary one.
        temperature: where the temperature starts; similarities are divided by it.
        learnable: whether temperature and bias are trained.
        max_scale: the largest 1 / temperature; training is held there.
        bias: where the bias starts: low, as nearly all pairs are negatives.
        mask_false_negatives: go by the judgments of all pairs in the batch. Without, only the tuples' own pairs are
            positive, and all others negative, as where judgments are unknown.
        hard_up_to: listed pairs that are not positive and worth at most this are negatives; the others are ignored.
        chunk: rows of a block's similarities that exist at a time; None: as many as suit the device.
    """

    bias: Tensor

    def __init__(
        self,
        label: str | None = None,
        *,
        temperature: float = 0.1,
        learnable: bool = True,
        max_scale: float = 100.0,
        bias: float = -10.0,
        mask_false_negatives: bool = True,
        hard_up_to: float = 0.0,
        chunk: int | None = None,
    ) -> None:
        super().__init__(
            label, temperature=temperature, learnable=learnable, max_scale=max_scale,
            mask_false_negatives=mask_false_negatives, hard_up_to=hard_up_to, chunk=chunk,
        )  # fmt: skip
        start = torch.tensor(float(bias))
        if learnable:
            self.bias = nn.Parameter(start)
        else:
            self.register_buffer("bias", start)

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
        own = self.listed(pairs, len(left), len(right)).between(all_left, all_right).of_rows(own_rows(len(left)))
        losses = sigmoid_losses(self.scale * widened(left), right, own, widened(self.bias), all_right, self.chunk)
        return share_of_mean(torch.where(left_valid, losses, 0), int(all_left.sum()))


def sigmoid_losses(
    left: Float[Tensor, "query dim"],
    right: Float[Tensor, "product dim"],
    pairs: Pairs,
    bias: Float[Tensor, ""],
    valid: Bool[Tensor, "all_products"],
    chunk: int | None = None,
) -> Float[Tensor, "query"]:
    """Each left row's sum of -log sigmoid(z (left . right + bias)) over the valid right rows of all ranks.

    left, right: this rank's rows. pairs: of this rank's left rows with global right rows, all valid: positives, and
    ignored ones, which count nothing; all other pairs are negatives. valid: of all ranks' right rows. The gradient of
    right rows comes home from all ranks, each weighed by its own upstream gradient, which need not be equal.
    """
    size = chunk or max(128, ENTRIES.get(left.device.type, 2**26) // max(1, len(right)))
    right = right.to(left.dtype).contiguous()
    listed = _Listed.of(pairs, len(left), len(right), len(valid), size)
    return _RowLosses.apply(left, right, bias.to(left.dtype), valid, listed)


class _Listed(NamedTuple):
    """Listed pairs by the piece of the matrix (a rank's right rows, `size` left rows) that they are in.

    row: counted from the piece's first. column: from the block's first. starts: 2 per piece, of its positives and of
    its ignored pairs.
    """

    row: Tensor
    column: Tensor
    starts: list[int]
    size: int

    @classmethod
    def of(cls, pairs: Pairs, rows: int, columns: int, all_columns: int, size: int) -> "_Listed":
        row, column = pairs.rows.unbind(1)
        pieces = -(-rows // size)
        cell = 2 * (column // columns * pieces + row // size) + ~pairs.positive
        cell, order = cell.sort()
        edges = torch.arange(2 * pieces * (all_columns // columns) + 1, device=cell.device)
        return cls(row[order] % size, column[order] % columns, torch.searchsorted(cell, edges).tolist(), size)


class _Piece(NamedTuple):
    """Logits of some left rows with a block; listed, positive: coordinates in it."""

    rows: slice
    logits: Tensor
    listed: tuple[Tensor, Tensor]
    positive: tuple[Tensor, Tensor]


def _pieces(rank: int, block: Tensor, left: Tensor, bias: Tensor, valid: Tensor, listed: _Listed) -> Iterator[_Piece]:
    """The similarities of `left` to the right rows of a rank, piece by piece, in the rows' precision."""
    offset = bias.expand(len(block)).masked_fill(~valid[rank * len(block) :][: len(block)], lowest(bias))
    starts = range(0, len(left), listed.size)
    for number, start in enumerate(starts, rank * len(starts)):
        rows = slice(start, start + listed.size)
        first, ignored, end = listed.starts[2 * number :][:3]
        with full_precision(left.device):
            logits = torch.addmm(offset, left[rows], block.T)
        both, positive = slice(first, end), slice(first, ignored)
        yield _Piece(
            rows, logits, (listed.row[both], listed.column[both]), (listed.row[positive], listed.column[positive])
        )


class _RowLosses(torch.autograd.Function):
    """Listed pairs have the lowest finite logit among the negatives, so that they count exactly 0 there.

    A rank's right rows travel the ring in both passes. In the backward pass their gradient follows them: each rank adds
    what its left rows found to what has come, and the last one sends it home.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, bias: Tensor, valid: Tensor, listed: _Listed) -> Tensor:
        ctx.save_for_backward(left, right, bias, valid)
        ctx.listed = listed
        losses = torch.zeros_like(left[:, 0])
        for rank, block in blocks(right):
            for piece in _pieces(rank, block, left, bias, valid, listed):
                positive = softplus(-piece.logits[piece.positive], threshold=EXACT)
                piece.logits[piece.listed] = lowest(left)
                losses[piece.rows] += softplus(piece.logits, threshold=EXACT).sum(1)
                losses[piece.rows].index_add_(0, piece.positive[0], positive)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        left, right, bias, valid = ctx.saved_tensors
        weighted = upstream[:, None] * left
        to_left, to_bias = torch.zeros_like(left), torch.zeros_like(upstream)
        found = None
        for rank, block in blocks(right):
            to_block = torch.zeros_like(block)
            for piece in _pieces(rank, block, left, bias, valid, ctx.listed):
                positive = -torch.sigmoid(-piece.logits[piece.positive])
                piece.logits[piece.listed] = lowest(left)
                slope = piece.logits.sigmoid_()
                slope[piece.positive] = positive
                with full_precision(left.device):
                    to_left[piece.rows].addmm_(slope, block)
                    to_block.addmm_(slope.T, weighted[piece.rows])
                to_bias[piece.rows] += slope.sum(1)
            if found is not None:
                to_block += found()
            found = pass_on(to_block)
        assert found is not None
        return upstream[:, None] * to_left, found(), (upstream * to_bias).sum(), None, None
