"""All that a contrastive loss needs of the similarities of two sides, without keeping their square matrix.

A loss with several positives per row, in both directions, depends on the matrix through three small things: each row's
and each column's log-sum-exp over the negatives, and the similarities of the listed pairs. One pass over the matrix
gives all three, and one pass gives the gradient: both directions share each product, which open_clip computes twice.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmfusion.precision import full_precision

# Entries of the matrix that are worked on at a time: a core's cache holds them; elsewhere what fills a GPU.
TILE = {"cpu": 2**19}
FILLS = 2**26
PART = 2**24  # entries of its gradient that exist at a time where the whole matrix was kept


class Contrast(NamedTuple):
    """row, column: log-sum-exp over negatives, the lowest finite number without any. listed: similarities of pairs."""

    row: Float[Tensor, "query"]
    column: Float[Tensor, "product"]
    listed: Float[Tensor, "pair"]


def contrast(
    query: Float[Tensor, "query dim"],
    product: Float[Tensor, "product dim"],
    listed: Int[Tensor, "pair 2"],
    query_valid: Bool[Tensor, "query"],
    product_valid: Bool[Tensor, "product"],
    *,
    columns: bool = True,
    chunk: int | None = None,
) -> Contrast:
    """The statistics of query . product, in the inputs' precision: neither autocast nor TF32.

    listed: pairs of valid rows that are no negatives, each once, sorted by row; only they have similarities. columns:
    False leaves out the columns' statistics. chunk: rows of the matrix that exist at a time, computed again in the
    backward pass: four matrix products for three, memory linear in the number of rows; None: the whole matrix is kept.
    Rows that are not valid take no part, if they are finite.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; expected a number of rows, at least 1")
    with full_precision(query.device):
        return Contrast(*_Contrast.apply(query, product, listed, query_valid, product_valid, columns, chunk))


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        product: Tensor,
        listed: Tensor,
        query_valid: Tensor,
        product_valid: Tensor,
        columns: bool,
        chunk: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        bias = torch.zeros_like(product[:, 0]).masked_fill_(~product_valid, torch.finfo(product.dtype).min)
        masked = (~query_valid).nonzero()[:, 0]
        row, similarity = query.new_empty(len(query)), query.new_empty(len(listed))
        column = torch.full_like(bias, torch.finfo(bias.dtype).min)
        kept = None
        for part in _parts(query, product, listed, masked, bias, chunk):
            similarity[part.pairs] = part.logits[part.listed]
            part.mask()
            for rows in _tiles(part.logits):
                row[part.rows][rows] = part.logits[rows].logsumexp(1)
                if columns:
                    torch.logaddexp(column, part.logits[rows].logsumexp(0), out=column)
            kept = part.logits if chunk is None else None
        ctx.columns, ctx.chunk = columns, chunk
        ctx.save_for_backward(query, product, listed, masked, bias, row, column, kept)
        return row, column, similarity

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_row: Tensor, to_column: Tensor, to_listed: Tensor) -> tuple[Tensor | None, ...]:
        query, product, listed, masked, bias, row, column, kept = ctx.saved_tensors
        to_query, to_product = torch.empty_like(query), torch.zeros_like(product)
        with full_precision(query.device):
            for part in _parts(query, product, listed, masked, bias, ctx.chunk, kept):
                if kept is None:
                    part.mask()
                gradient = torch.empty_like(part.logits)  # what was kept stays: the backward pass may run again
                for rows in _tiles(part.logits):
                    tile, own = part.logits[rows], gradient[rows]
                    torch.sub(tile, row[part.rows][rows, None], out=own).exp_().mul_(to_row[part.rows][rows, None])
                    if ctx.columns:
                        own.addcmul_((tile - column).exp_(), to_column)
                gradient[part.listed] = to_listed[part.pairs]
                torch.mm(gradient, product, out=to_query[part.rows])
                to_product.addmm_(gradient.T, query[part.rows])
        return to_query, to_product, None, None, None, None, None


class _Part(NamedTuple):
    """Some rows of the matrix. listed: the pairs in them, as (rows of the part, columns)."""

    rows: slice
    pairs: slice
    logits: Tensor
    listed: tuple[Tensor, Tensor]
    masked: Tensor

    def mask(self) -> None:
        """Leaves the negatives: all else gets the lowest finite number, whose probability is exactly 0."""
        lowest = torch.finfo(self.logits.dtype).min
        self.logits[self.listed] = lowest
        self.logits[self.masked] = lowest


def _parts(
    query: Tensor,
    product: Tensor,
    listed: Tensor,
    masked: Tensor,
    bias: Tensor,
    chunk: int | None,
    kept: Tensor | None = None,
) -> Iterator[_Part]:
    """The matrix in parts of `chunk` rows, made when asked for; without, the whole, then parts of what was kept."""
    size = max(1, chunk or (len(query) if kept is None else PART // max(1, len(bias))))
    starts = range(0, len(query), size)
    ends = torch.tensor([min(start + size, len(query)) for start in starts], device=listed.device)
    bounds = torch.stack([torch.searchsorted(place, ends) for place in (listed[:, 0].contiguous(), masked)]).tolist()
    edges = [pairwise([0, *ends]) for ends in bounds]
    for start, (first, end), (before, after) in zip(starts, *edges, strict=True):
        rows = slice(start, min(start + size, len(query)))
        at = listed[first:end]
        logits = torch.addmm(bias, query[rows], product.T) if kept is None else kept[rows]
        yield _Part(rows, slice(first, end), logits, (at[:, 0] - start, at[:, 1]), masked[before:after] - start)


def _tiles(logits: Tensor) -> Iterator[slice]:
    size = max(1, TILE.get(logits.device.type, FILLS) // max(1, logits.shape[1]))
    return (slice(start, start + size) for start in range(0, len(logits), size))
