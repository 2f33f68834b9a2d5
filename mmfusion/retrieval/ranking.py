"""From the vectors that ranks collected to ranked lists: gather, search, merge.

The corpus and the queries are sharded over the ranks of torch.distributed, in any way and unequally; every rank ends
with the same lists, which are those of one process.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from mmfusion.retrieval.topk import TopK, merge, search
from mmfusion.retrieval.vectors import ReadVectors, VectorWriter

T = TypeVar("T")
BLOCK = 2048  # queries whose lists travel between ranks at a time


@dataclass
class Rows:
    """Vectors of queries or of products with their dense ids; those of a corpus may be in a file."""

    vectors: Float[Tensor, "row dim"] | ReadVectors
    ids: Int[Tensor, "row"]


@dataclass
class Ranking:
    """A split's ranked lists, on the CPU; `query_ids` ascending, equal on all ranks."""

    query_ids: Int[np.ndarray, "query"]
    top: TopK


class Collector:
    """Gathers the vectors of one view batch by batch, without the rows that only pad a batch.

    folder: where they wait when they do not fit into memory, in a file that is removed with this process at the latest.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._vectors: list[Tensor] = []
        self._ids: list[Tensor] = []
        self._writer: VectorWriter | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._folder = TemporaryDirectory(prefix="corpus-", dir=folder)
            self._writer = VectorWriter(Path(self._folder.name) / "vectors.npy")

    def add(self, vectors: Float[Tensor, "row dim"], ids: Int[Tensor, "row"], valid: Bool[Tensor, "row"]) -> None:
        self._ids.append(ids[valid])
        if self._writer:
            self._writer.add(vectors[valid])
        else:
            self._vectors.append(vectors.detach()[valid])

    def rows(self) -> Rows:
        """To be called once. What is in a file can be read for as long as somebody holds it."""
        assert self._ids, "no batch was collected"
        return Rows(self._writer.close() if self._writer else torch.cat(self._vectors), torch.cat(self._ids))


def rank_corpus(
    queries: Rows,
    corpus: Rows,
    tie: Int[Tensor, "catalogue"],
    depth: int,
    *,
    chunk: int = 16_384,
) -> Ranking:
    """The `depth` best products of the corpus for every query.

    queries, corpus: this rank's rows; an id that came up several times, on whatever ranks, counts once.
    tie: `tie_ranks` of the catalogue. chunk: products searched at a time. The search runs where the queries are.
    """
    return rank_own(queries, own_products(corpus), tie, depth, chunk=chunk)


def rank_own(queries: Rows, corpus: Rows, tie: Int[Tensor, "catalogue"], depth: int, *, chunk: int) -> Ranking:
    """`rank_corpus` of an `own_products`, for who ranks several times."""
    device = queries.vectors.device
    queries = all_queries(queries)
    found = search(queries.vectors[:].to(device), corpus.vectors, corpus.ids, tie, depth, chunk=chunk)
    return Ranking(queries.ids.numpy(), _merged(TopK(found.scores.cpu(), found.ids.cpu()), tie.cpu(), depth))


def _merged(found: TopK, tie: Int[Tensor, "catalogue"], depth: int) -> TopK:
    """The lists of all ranks as one each, BLOCK queries at a time: what ranks send each other is bounded by that."""
    blocks = [
        merge(gathered(TopK(scores.clone(), ids.clone())), tie, depth)
        for scores, ids in zip(found.scores.split(BLOCK), found.ids.split(BLOCK), strict=True)
    ]
    return TopK(torch.cat([block.scores for block in blocks]), torch.cat([block.ids for block in blocks]))


def joined(parts: Sequence[Ranking]) -> Ranking:
    """Lists of disjoint queries as one ranking."""
    query_ids = np.concatenate([part.query_ids for part in parts])
    order = np.argsort(query_ids)
    scores, ids = (torch.cat([getattr(part.top, name) for part in parts])[order] for name in ("scores", "ids"))
    return Ranking(query_ids[order], TopK(scores, ids))


def all_queries(queries: Rows) -> Rows:
    """The queries of all ranks, each id once, in ascending order, on the CPU."""
    parts = gathered(Rows(queries.vectors[:].cpu().clone(), queries.ids.cpu().clone()))
    ids, first = np.unique(torch.cat([part.ids for part in parts]).numpy(), return_index=True)
    return Rows(torch.cat([part.vectors[:] for part in parts])[first], torch.from_numpy(ids))


def own_products(corpus: Rows) -> Rows:
    """This rank's products, each once, without those that a rank before it has."""
    ids = gathered(corpus.ids.cpu().numpy())
    start = sum(len(part) for part in ids[: process()[0]])
    first = np.unique(np.concatenate(ids), return_index=True)[1]
    own = np.sort(first[(first >= start) & (first < start + len(corpus.ids))]) - start
    if len(own) == len(corpus.ids):
        return corpus
    kept = torch.from_numpy(own).to(corpus.ids.device)
    return Rows(corpus.vectors[kept.to(corpus.vectors.device)], corpus.ids[kept])


class VectorsOf:
    """Vectors of an `own_products` by dense id, from whatever rank has them. All ranks ask for the same at once."""

    def __init__(self, corpus: Rows) -> None:
        ids = corpus.ids.cpu().numpy()
        self._vectors, self._order = corpus.vectors, np.argsort(ids, kind="stable")
        self._ids = ids[self._order]

    def __call__(self, ids: Int[np.ndarray, "product"]) -> Float32[np.ndarray, "product dim"]:
        at = np.searchsorted(self._ids, ids)
        own = at < len(self._ids)
        own[own] = self._ids[at[own]] == ids[own]
        rows = torch.from_numpy(self._order[at[own]]).to(self._vectors.device)
        parts = gathered((own, self._vectors[rows].float().cpu().numpy()))
        assert np.logical_or.reduce([held for held, _ in parts]).all(), "every product is on some rank"
        found = np.empty((len(ids), parts[0][1].shape[1]), np.float32)
        for held, vectors in parts:
            found[held] = vectors
        return found


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
