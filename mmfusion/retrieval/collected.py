"""One pass of an evaluation: the vectors of queries and corpus as they come, and what each view reached with them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmfusion.batch import RetrievalData
from mmfusion.retrieval.evaluation import Evaluation, ViewResult, main_metrics, measured
from mmfusion.retrieval.examination import WITHOUT, Examination
from mmfusion.retrieval.leading import leading
from mmfusion.retrieval.ranking import Collector, Rows, rank_corpus
from mmfusion.retrieval.vectors import ReadVectors

QUERY = "query"


Collected = dict[str, dict[str, Collector]]  # by what a loader yields, "corpus" or "queries/<split>", and by view


def collect(
    into: dict[str, Collector],
    vectors: Mapping[str, Float[Tensor, "row dim"]],
    ids: Int[Tensor, "row"],
    valid: Bool[Tensor, "row"],
    folder: str | None,
) -> None:
    """Adds a loader's batch, by view. folder: where vectors of products wait when they do not fit into memory."""
    for view, rows in vectors.items():
        if view not in into:
            into[view] = Collector(Path(folder) if folder and view != QUERY else None)
        into[view].add(rows, ids, valid)


@dataclass
class Vectors:
    """This rank's vectors, by view of the corpus and by split of the queries."""

    corpus: dict[str, Rows]
    queries: dict[str, Rows]


def vectors_of(collected: Collected) -> Vectors:
    """What the loaders gave; `collected` is empty afterwards."""
    corpus = {view: collector.rows() for view, collector in collected.pop("corpus").items()}
    queries = {name.removeprefix("queries/"): found[QUERY].rows() for name, found in collected.items()}
    collected.clear()
    return Vectors(corpus, queries)


def measured_views(
    vectors: Vectors,
    views: Mapping[str, int | None],
    data: RetrievalData,
    tie: Int[Tensor, "catalogue"],
    options: Evaluation,
    intervals: bool,
) -> dict[str, dict[str, ViewResult]]:
    """results[split][view], equal on every rank.

    views: how many leading dimensions a view is searched by; None: all. fused@64 is the view fused by its first 64.
    """
    results: dict[str, dict[str, ViewResult]] = {}
    for split, asked in vectors.queries.items():
        judgments, results[split] = data.judgments(split), {}
        for view, dim in views.items():
            rows = vectors.corpus[view.partition("@")[0]]
            sought, searched = (Rows(leading(part.vectors, dim), part.ids) for part in (asked, rows))
            ranking = rank_corpus(sought, searched, tie, options.depth, chunk=options.chunk)
            results[split][view] = measured(ranking, judgments, options, intervals)
    return results


def photos_dropped(
    vectors: Vectors, examination: Examination, data: RetrievalData, tie: Int[Tensor, "catalogue"], options: Evaluation
) -> dict[str, dict[str, ViewResult]]:
    """results[split][fraction]: the view fused with so many of the photos hidden, by its main metrics alone.

    Without intervals: a slice draws its own. Corpora are searched one after another, none of them is held.
    """
    results: dict[str, dict[str, ViewResult]] = {split: {} for split in vectors.queries}
    if not examination.hidden:
        return results
    options = replace(options, metrics=main_metrics(options.metrics))
    seen, unseen = vectors.corpus["fused"], vectors.corpus[WITHOUT]
    assert torch.equal(seen.ids, unseen.ids), "views are collected together"
    for name in examination.hidden:
        searched = Rows(Either(seen.vectors, unseen.vectors, examination.hides(name, seen.ids)), seen.ids)
        for split, asked in vectors.queries.items():
            ranking = rank_corpus(asked, searched, tie, options.depth, chunk=options.chunk)
            results[split][name] = measured(ranking, data.judgments(split), options, intervals=False)
    return results


class Either(ReadVectors):
    """Rows of one corpus or of another, chosen as they are read: nothing is held twice."""

    def __init__(
        self,
        first: Float[Tensor, "row dim"] | ReadVectors,
        second: Float[Tensor, "row dim"] | ReadVectors,
        takes_second: Bool[Tensor, "row"],
    ) -> None:
        assert first.shape == second.shape
        self.first, self.second, self.takes_second = first, second, takes_second
        self.device, self.shape = first.device, first.shape

    def __getitem__(self, rows: slice | Int[Tensor, "row"]) -> Float[Tensor, "row dim"]:
        first, second = self.first[rows], self.second[rows]
        takes_second = self.takes_second[rows if isinstance(rows, slice) else rows.to(self.takes_second.device)]
        return torch.where(takes_second.to(first.device)[:, None], second, first)


def with_dims(views: Sequence[str], dims: Mapping[str, Sequence[int]]) -> dict[str, int | None]:
    """Views by name with the dimensions that they are searched by: each whole, then by fewer, the most first."""
    found: dict[str, int | None] = {}
    for view in views:
        found[view] = None
        found |= {f"{view}@{dim}": dim for dim in sorted(dims.get(view, ()), reverse=True)}
    return found
