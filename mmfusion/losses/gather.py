"""What the losses exchange between ranks at once; ring.py does it block by block. Without a group there is one rank.

A global row is rank * rows per rank + local row. Ranks hold equally many rows, and call these functions in one order.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mmfusion.batch import Judged
from mmfusion.losses.pairs import Pairs, equal_pairs
from mmfusion.speed.timeline import communicating


def gather_rows(rows: Shaped[Tensor, "rows *shape"]) -> Shaped[Tensor, "all_rows *shape"]:
    """The rows of all ranks, in global order; the gradient of floats flows back to the rank that they came from."""
    return _Gather.apply(rows) if _ranks() > 1 else rows


def own_rows(rows: int) -> range:
    """Which global rows are this rank's, when each rank has `rows`."""
    start = (dist.get_rank() if _ranks() > 1 else 0) * rows
    return range(start, start + rows)


def share_of_mean(values: Float[Tensor, "rows"], total: Float[Tensor, ""] | int) -> Float[Tensor, ""]:
    """This rank's share of a mean over the rows of all ranks, whose weights sum to `total`: values' sum over total,
    times the number of ranks, which DDP's average over ranks takes away again. 0 where `total` is 0."""
    total = torch.as_tensor(total, dtype=values.dtype, device=values.device)
    return values.sum() * _ranks() / torch.where(total > 0, total, 1)


def match_pairs(query_id: Int[Tensor, "query"], judged: Judged, products: int | None = None) -> Pairs:
    """The (global query row, global product row) pairs of the ranks' batches that a label column lists.

    query_id: of this rank's query rows; a query may be in several. judged: of this rank's product rows, `products` of
    them, or one per query. Each rank matches its own products' judgments with the queries of all ranks and gathers
    coordinates and gains alone; the result is the same on all ranks.
    """
    entry, query = equal_pairs(judged.query_id, gather_rows(query_id)).unbind(1)
    product = judged.product[entry] + own_rows(len(query_id) if products is None else products).start
    bits = judged.gain[entry].double().view(torch.int64)  # to the last bit, in one table with the integers
    found = gather_ragged(torch.stack([query, product, bits, judged.positive[entry]], 1))
    return Pairs(found[:, :2], found[:, 2].contiguous().view(torch.float64).to(judged.gain.dtype), found[:, 3].bool())


def identity_pairs(product_id: Int[Tensor, "product"]) -> Pairs:
    """The pairs of global rows of the same product, as positives: each row with itself and with its duplicates."""
    ids = gather_rows(product_id)
    rows = equal_pairs(ids, ids)
    return Pairs(rows, torch.ones(len(rows), device=ids.device), torch.ones_like(rows[:, 0], dtype=torch.bool))


def gather_ragged(rows: Shaped[Tensor, "rows *shape"]) -> Shaped[Tensor, "all_rows *shape"]:
    """As gather_rows, where each rank may have another number of rows; they travel padded to the longest."""
    if _ranks() == 1:
        return rows
    lengths = gather_rows(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = torch.cat([rows, rows.new_zeros(max(lengths) - len(rows), *rows.shape[1:])])
    parts = gather_rows(padded).reshape(len(lengths), *padded.shape)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def exchange_columns(columns: Float[Tensor, "all_columns"]) -> Float[Tensor, "ranks columns"]:
    """What each rank holds of this rank's columns, of which all ranks have equally many; gradients flow back."""
    parts = columns.reshape(_ranks(), -1)
    return _Exchange.apply(parts) if _ranks() > 1 else parts


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """As torch.distributed.nn.functional.all_gather, which torch 2.15 deprecates: the gradient is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
        with communicating():
            dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = gradient.new_empty(len(gradient) // dist.get_world_size(), *gradient.shape[1:])
        with communicating():
            dist.reduce_scatter_tensor(own, gradient.contiguous())
        return own


class _Exchange(torch.autograd.Function):
    """Row r goes to rank r, and what rank r sends is row r; so do gradients."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor) -> Tensor:
        received = torch.empty_like(parts)
        with communicating():
            dist.all_to_all_single(received, parts.contiguous())
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = torch.empty_like(gradient)
        with communicating():
            dist.all_to_all_single(own, gradient.contiguous())
        return own
