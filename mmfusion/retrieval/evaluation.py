"""From the vectors that ranks collected to the numbers of a view: gather, search, merge, measure.

The corpus and the queries are sharded over the ranks of torch.distributed, in any way and unequally; every rank ends
with the same result, which is that of one process.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmfusion.batch import Judgments
from mmfusion.retrieval.metrics import parse_metric, ranked_gains
from mmfusion.retrieval.significance import bootstrap_interval
from mmfusion.retrieval.topk import TopK, merge, search

DEFAULT_METRICS = ("ndcg@1", "ndcg@10", "recall@10", "recall@100", "mrr")

T = TypeVar("T")


@dataclass
class Rows:
    """Vectors of queries or of products with their dense ids."""

    vectors: Float[Tensor, "row dim"]
    ids: Int[Tensor, "row"]


class Collector:
    """Gathers the vectors of one view batch by batch, without the rows that only pad a batch."""

    def __init__(self) -> None:
        self._vectors: list[Tensor] = []
        self._ids: list[Tensor] = []

    def add(self, vectors: Float[Tensor, "row dim"], ids: Int[Tensor, "row"], valid: Bool[Tensor, "row"]) -> None:
        self._vectors.append(vectors.detach()[valid])
        self._ids.append(ids[valid])

    def rows(self) -> Rows:
        assert self._vectors, "no batch was collected"
        return Rows(torch.cat(self._vectors), torch.cat(self._ids))


@dataclass
class ViewResult:
    """What a view reached on a split; equal on all ranks.

    metrics: `<label column>/<name>` to {"value", "low", "high"}: the mean over queries and its 95 % interval.
    per_query: the values behind each mean, in the order of `query_ids` (ascending); NaN where the mean leaves one out.
    top: the products that were found, on the CPU.
    """

    query_ids: Int[np.ndarray, "query"]
    top: TopK
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    per_query: dict[str, Float[np.ndarray, "query"]] = field(default_factory=dict)

    def left_out(self) -> dict[str, int]:
        """The number of queries that each mean leaves out, because they have no positive."""
        return {name: int(np.isnan(values).sum()) for name, values in self.per_query.items()}


def evaluate_view(
    queries: Rows,
    corpus: Rows,
    judgments: Judgments,
    tie: Int[Tensor, "catalogue"],
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    depth: int = 100,
    chunk: int = 16_384,
    device: torch.device | None = None,
    seed: int = 0,
) -> ViewResult:
    """Searches the corpus for every query and measures the lists in each label column.

    queries, corpus: this rank's rows; an id that came up several times, on whatever ranks, counts once.
    tie: `tie_ranks` of the catalogue. depth: products retrieved per query. chunk, device: of the search; the default
    device is that of the corpus. seed: of the intervals' resampling.
    """
    parsed = {name: parse_metric(name, depth) for name in metrics}
    queries, corpus = _all_queries(queries), _own_products(corpus)
    found = search(
        queries.vectors.to(device or corpus.vectors.device), corpus.vectors, corpus.ids, tie, depth, chunk=chunk
    )
    found = TopK(found.scores.cpu(), found.ids.cpu())
    result = ViewResult(queries.ids.numpy(), merge(_gathered(found), tie.cpu(), depth))
    for column in judgments.gain:
        ranked = ranked_gains(result.top.ids.numpy(), result.query_ids, judgments, column)
        for name, (metric, k) in parsed.items():
            per_query = metric(ranked, k)
            result.per_query[f"{column}/{name}"] = per_query
            result.metrics[f"{column}/{name}"] = _mean_with_interval(per_query, seed)
    return result


def _all_queries(queries: Rows) -> Rows:
    """The queries of all ranks, each id once, in ascending order, on the CPU."""
    parts = _gathered(Rows(queries.vectors.cpu().clone(), queries.ids.cpu().clone()))
    ids, first = np.unique(torch.cat([part.ids for part in parts]).numpy(), return_index=True)
    return Rows(torch.cat([part.vectors for part in parts])[first], torch.from_numpy(ids))


def _own_products(corpus: Rows) -> Rows:
    """This rank's products without those that it, or a rank before it, has already."""
    ids = _gathered(corpus.ids.cpu().numpy())
    start = sum(len(part) for part in ids[: _rank()])
    first = np.unique(np.concatenate(ids), return_index=True)[1]
    own = np.sort(first[(first >= start) & (first < start + len(corpus.ids))]) - start
    if len(own) == len(corpus.ids):
        return corpus
    kept = torch.from_numpy(own).to(corpus.ids.device)
    return Rows(corpus.vectors[kept.to(corpus.vectors.device)], corpus.ids[kept])


def _mean_with_interval(per_query: Float[np.ndarray, "query"], seed: int) -> dict[str, float]:
    low, high = bootstrap_interval(per_query, seed=seed)
    counted = per_query[~np.isnan(per_query)]
    return {"value": float(counted.mean()) if len(counted) else np.nan, "low": low, "high": high}


def _gathered(value: T) -> list[T]:
    """The value of every rank, in rank order. CPU values; their bytes travel on the group's own device."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
