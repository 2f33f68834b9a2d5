"""The plainest way to use both views: their scores, added with one weight for all products. Nothing is trained.

A product's score is weight * q . text + (1 - weight) * q . image, which is one dot product of vectors twice as long:
[weight q; (1 - weight) q] . [text; image]. So the search over the corpus is exact, as that of any view.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from mmfusion.batch import Judgments
from mmfusion.retrieval.baselines import GRID, best_weight
from mmfusion.retrieval.evaluation import Evaluation, ViewResult, mean_ndcg, measured
from mmfusion.retrieval.ranking import Rows, VectorsOf, all_queries, own_products, rank_corpus
from mmfusion.retrieval.topk import TopK, exact_dot, merge
from mmfusion.retrieval.vectors import ReadVectors

NAME = "score_fusion"
BOTH = ("text", "image")
CANDIDATES = 100  # of each view's list, among which the weight is chosen
QUERIES = 64  # whose candidates are scored at a time


class SideBySide(ReadVectors):
    """Vectors of the same rows after one another, joined as they are read: nothing is held twice."""

    def __init__(self, *parts: Float[Tensor, "row _"] | ReadVectors) -> None:
        self.parts, self.device = parts, parts[0].device
        self.shape = torch.Size([len(parts[0]), sum(part.shape[1] for part in parts)])

    def __getitem__(self, rows: slice | Int[Tensor, "row"]) -> Float[Tensor, "row dim"]:
        return torch.cat([part[rows].float() for part in self.parts], 1)


def add_score_fusion(
    results: Mapping[str, dict[str, ViewResult]],
    corpus: Mapping[str, Rows],
    queries: Mapping[str, Rows],
    judgments: Mapping[str, Judgments],
    tie: Int[Tensor, "catalogue"],
    options: Evaluation,
    weight: float | None,
) -> float | None:
    """Adds the row to each split's views where there are text and image, and returns the weight of the text.

    The weight is the best one on val; on other splits alone it is `weight`, and without one the row is left out.
    corpus: this rank's rows of each view. queries: this rank's rows of each split.
    """
    if not set(BOTH) <= set(corpus):
        return None
    if "val" in results:
        weight = choose(results["val"], corpus, queries["val"], judgments["val"], tie, options)
    if weight is None:
        return None
    text, image = (corpus[view] for view in BOTH)
    assert torch.equal(text.ids, image.ids), "views are collected together"
    searched = Rows(SideBySide(text.vectors, image.vectors), text.ids)
    for split, views in results.items():
        asked = queries[split].vectors[:].float()
        sought = Rows(torch.cat([weight * asked, (1 - weight) * asked], 1), queries[split].ids)
        ranking = rank_corpus(sought, searched, tie, options.depth, chunk=options.chunk)
        views[NAME] = measured(ranking, judgments[split], options)
    return weight


def choose(
    views: Mapping[str, ViewResult],
    corpus: Mapping[str, Rows],
    queries: Rows,
    judgments: Judgments,
    tie: Int[Tensor, "catalogue"],
    options: Evaluation,
) -> float:
    """The weight of GRID with the best nDCG@10 in the first label column; equal on all ranks.

    Only the first CANDIDATES of each view's list are scored: what both put deeper than that is hardly among the first
    ten of their sum. So the choice takes seconds whatever the size of the corpus.
    """
    found = _candidates(views, corpus, queries)
    reached = {}
    for weight in GRID:
        scores = (weight * found.text.double() + (1 - weight) * found.image.double()).float()
        top = merge([TopK(scores.masked_fill(found.ids < 0, -torch.inf), found.ids)], tie, found.ids.shape[1])
        reached[weight] = mean_ndcg(top, views["text"].query_ids, judgments, options)
    return best_weight(reached)


@dataclass
class _Scored:
    """Candidates of each query, each once (-1: none), and their dot products with the query."""

    ids: Int[Tensor, "query candidate"]
    text: Float32[Tensor, "query candidate"]
    image: Float32[Tensor, "query candidate"]


def _candidates(views: Mapping[str, ViewResult], corpus: Mapping[str, Rows], queries: Rows) -> _Scored:
    asked = all_queries(queries)
    assert np.array_equal(asked.ids.numpy(), views["text"].query_ids)
    ids = torch.cat([views[view].top.ids[:, :CANDIDATES] for view in BOTH], 1).sort(1, descending=True).values
    ids[:, 1:] = torch.where(ids[:, 1:] == ids[:, :-1], -1, ids[:, 1:])
    scores = {}
    for view in BOTH:
        vectors = VectorsOf(own_products(corpus[view]))
        blocks = zip(asked.vectors[:].float().split(QUERIES), ids.split(QUERIES), strict=True)
        scores[view] = torch.cat([_scores(*block, vectors) for block in blocks])
    return _Scored(ids, scores["text"], scores["image"])


def _scores(
    asked: Float[Tensor, "query dim"], ids: Int[Tensor, "query candidate"], vectors: VectorsOf
) -> Float32[Tensor, "query candidate"]:
    products, place = ids.clamp(min=0).unique(return_inverse=True)
    return exact_dot(asked[:, None], torch.from_numpy(vectors(products.numpy()))[place])
