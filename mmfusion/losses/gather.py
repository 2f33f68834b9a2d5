"""The only code of the losses that knows of ranks. Without an initialised group there is one rank: this process.

A global row is rank * rows per rank + local row. Ranks hold equally many rows, and call these functions in one order.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mmfusion.batch import Judged
from mmfusion.losses.pairs import Pairs, equal_pairs


def gather_rows(rows: Shaped[Tensor, "rows *shape"]) -> Shaped[Tensor, "all_rows *shape"]:
    """The rows of all ranks, in global order; the gradient of floats flows back to the rank that they came from."""
    return _Gather.apply(rows) if _ranks() > 1 else rows


def own_rows(rows: int) -> range:
    """Which global rows are this rank's, when each rank has `rows`."""
    start = (dist.get_rank() if _ranks() > 1 else 0) * rows
    return range(start, start + rows)


def share_of_mean(values: Float[Tensor, "rows"], count: int) -> Float[Tensor, ""]:
    """This rank's share of a mean over `count` global rows: what DDP's average over ranks turns into that mean."""
    return values.sum() * (_ranks() / max(count, 1))


def match_pairs(query_id: Int[Tensor, "query"], judged: Judged, products: int | None = None) -> Pairs:
    """The (global query row, global product row) pairs of the ranks' batches that a label column judges with gain > 0.

    query_id: of this rank's query rows; a query may be in several. judged: of this rank's product rows, `products` of
    them, or one per query. Each rank matches its own products' judgments with the queries of all ranks and gathers
    coordinates alone; the result is the same on all ranks.
    """
    entry, query = equal_pairs(judged.query_id, gather_rows(query_id)).unbind(1)
    product = judged.product[entry] + own_rows(len(query_id) if products is None else products).start
    found = gather_ragged(torch.stack([query, product, judged.positive[entry]], 1))
    positive = found[:, 2].bool()
    return Pairs(found[positive, :2], found[~positive, :2])


def identity_pairs(product_id: Int[Tensor, "product"]) -> Pairs:
    """The pairs of global rows of the same product, as positives: each row with itself and with its duplicates."""
    ids = gather_rows(product_id)
    positive = equal_pairs(ids, ids)
    return Pairs(positive, positive[:0])


def gather_ragged(rows: Int[Tensor, "rows column"]) -> Int[Tensor, "all_rows column"]:
    """The rows of all ranks, of which each may have another number; they travel padded to the longest."""
    if _ranks() == 1:
        return rows
    lengths = gather_rows(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = rows.new_zeros(max(lengths), rows.shape[1])
    padded[: len(rows)] = rows
    parts = gather_rows(padded).reshape(len(lengths), *padded.shape)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """As torch.distributed.nn.functional.all_gather, which torch 2.15 deprecates: the gradient is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = gradient.new_empty(len(gradient) // dist.get_world_size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient.contiguous())
        return own
