"""From the vectors that ranks collected to ranked lists: gather, search, merge.

The corpus and the queries are sharded over the ranks of torch.distributed, in any way and unequally; every rank ends
with the same lists, which are those of one process.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmfusion.retrieval.topk import TopK, merge, search

T = TypeVar("T")


@dataclass
class Rows:
    """Vectors of queries or of products with their dense ids."""

    vectors: Float[Tensor, "row dim"]
    ids: Int[Tensor, "row"]


@dataclass
class Ranking:
    """A split's ranked lists, on the CPU; `query_ids` ascending, equal on all ranks."""

    query_ids: Int[np.ndarray, "query"]
    top: TopK


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


def rank_corpus(
    queries: Rows,
    corpus: Rows,
    tie: Int[Tensor, "catalogue"],
    depth: int,
    *,
    chunk: int = 16_384,
    device: torch.device | None = None,
) -> Ranking:
    """The `depth` best products of the corpus for every query.

    queries, corpus: this rank's rows; an id that came up several times, on whatever ranks, counts once.
    tie: `tie_ranks` of the catalogue. chunk, device: of the search; the default device is that of the corpus.
    """
    queries, corpus = _all_queries(queries), _own_products(corpus)
    found = search(
        queries.vectors.to(device or corpus.vectors.device), corpus.vectors, corpus.ids, tie, depth, chunk=chunk
    )
    parts = gathered(TopK(found.scores.cpu(), found.ids.cpu()))
    return Ranking(queries.ids.numpy(), merge(parts, tie.cpu(), depth))


def joined(parts: Sequence[Ranking]) -> Ranking:
    """Lists of disjoint queries as one ranking."""
    query_ids = np.concatenate([part.query_ids for part in parts])
    order = np.argsort(query_ids)
    scores, ids = (torch.cat([getattr(part.top, name) for part in parts])[order] for name in ("scores", "ids"))
    return Ranking(query_ids[order], TopK(scores, ids))


def _all_queries(queries: Rows) -> Rows:
    """The queries of all ranks, each id once, in ascending order, on the CPU."""
    parts = gathered(Rows(queries.vectors.cpu().clone(), queries.ids.cpu().clone()))
    ids, first = np.unique(torch.cat([part.ids for part in parts]).numpy(), return_index=True)
    return Rows(torch.cat([part.vectors for part in parts])[first], torch.from_numpy(ids))


def _own_products(corpus: Rows) -> Rows:
    """This rank's products without those that it, or a rank before it, has already."""
    ids = gathered(corpus.ids.cpu().numpy())
    start = sum(len(part) for part in ids[: process()[0]])
    first = np.unique(np.concatenate(ids), return_index=True)[1]
    own = np.sort(first[(first >= start) & (first < start + len(corpus.ids))]) - start
    if len(own) == len(corpus.ids):
        return corpus
    kept = torch.from_numpy(own).to(corpus.ids.device)
    return Rows(corpus.vectors[kept.to(corpus.vectors.device)], corpus.ids[kept])


def gathered(value: T) -> list[T]:
    """The value of every rank, in rank order. CPU values; their bytes travel on the group's own device."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def process() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
