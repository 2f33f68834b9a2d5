"""What a run is evaluated by: ranked lists against judgments, beside baselines, with intervals."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from mmfusion.batch import Judgments, RetrievalData
from mmfusion.retrieval.baselines import BM25, choose_weight, random_ranking, reciprocal_rank_fusion, weighted_sum
from mmfusion.retrieval.metrics import parse_metric, ranked_gains, shares, with_policy
from mmfusion.retrieval.ranking import Ranking, gathered, joined, process
from mmfusion.retrieval.significance import bootstrap_interval
from mmfusion.retrieval.topk import TopK

VALIDATION = ("ndcg@1", "ndcg@10", "recall@10", "recall@100", "mrr")
TEST = (
    "ndcg@1", "ndcg@10", "ndcg@100", "recall@10", "recall@100", "recall_capped@100", "precision@10", "map@100", "mrr",
    "hit_rate@10", "err@10", "judged@10", "share@10",
)  # fmt: skip
PROTOCOL = ("depth", "no_positive", "unjudged")  # options of Evaluation that change what a query's value is
TOLD = (*PROTOCOL, "resamples")  # those that results.json tells
MAIN = ("ndcg@10", "recall@100", "mrr")  # metrics of slices by query
BASELINES = ("bm25", "random", "hybrid_rrf", "hybrid_sum")


@dataclass
class Evaluation:
    """How rankings are measured and explained.

    Args:
        metrics: of a test, in each label column: ndcg, ndcg_exp (gain 2^g - 1), recall, recall_capped, precision, map,
            hit_rate, err, judged, share (of every label), each with a depth as in ndcg@10; mrr and map also without
        depth: products retrieved per query; mrr and map count what lies deeper as not found
        no_positive: a query for which a metric is not defined: skip leaves it out of the mean, zero counts it as 0
        unjudged: what a retrieved product counts that nobody judged: zero is gain 0, condensed takes it off the list
            (slices by product are always of the whole lists)
        baselines: rows for BM25, random order, hybrids of BM25 with the primary view, and the weighted sum of what
            text and image score; every rank holds an index of all texts
        slices: columns of queries or of products to slice by, besides the built-in ones
        stated: columns of products; queries are sliced by whether the texts of their relevant products state the
            product's value in the column, in all its words: a photo has to tell what a text does not
        drop_photos: fractions of the photos that are hidden from the fused view, for a slice of what it reaches then;
            the encoders run once, together they take the room of one more view, each takes the time of one more search
        resamples: draws of the bootstrap intervals
        chunk: products whose scores are held at a time
        vectors: folder for the corpus' vectors when they do not fit into memory; without, they stay there
        photos_mib: room for thumbnails in products.parquet, of all splits together
    """

    metrics: list[str] = field(default_factory=lambda: list(TEST))
    depth: int = 1000
    no_positive: Literal["skip", "zero"] = "skip"
    unjudged: Literal["zero", "condensed"] = "zero"
    baselines: bool = True
    slices: list[str] = field(default_factory=list)
    stated: list[str] = field(default_factory=list)
    drop_photos: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0])
    resamples: int = 1000
    chunk: int = 16_384
    vectors: str | None = None
    photos_mib: float = 16.0

    def __post_init__(self) -> None:
        for name in ("depth", "resamples", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.evaluation.{name} is {getattr(self, name)}; expected at least 1")
        if self.photos_mib < 0:
            raise ValueError(f"model.evaluation.photos_mib is {self.photos_mib}; expected 0 or more")
        for fraction in self.drop_photos:
            if not 0 < fraction <= 1:
                raise ValueError(f"model.evaluation.drop_photos holds {fraction}; expected above 0, and 1 at most")
        for name in self.metrics:
            self._expanded(name, {})
        self._expanded("ndcg@10", {})

    def names(self, labels: Mapping[str, float]) -> list[str]:
        """The metrics of a label column, `share@k` as one for each label."""
        return list(dict.fromkeys(name for given in self.metrics for name in self._expanded(given, labels)))

    def _expanded(self, name: str, labels: Mapping[str, float]) -> list[str]:
        family = name.partition("@")[0]
        names = [name.replace(family, share, 1) for share in shares(labels)] if family == "share" else [name]
        for one in names:
            parse_metric(one, self.depth, labels)
        return names


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


def measured(ranking: Ranking, judgments: Judgments, options: Evaluation, intervals: bool = True) -> ViewResult:
    """The lists against every label column of the judgments."""
    result = ViewResult(ranking.query_ids, ranking.top)
    for column in judgments.gain:
        ranked = ranked_gains(ranking.top.ids.numpy(), ranking.query_ids, judgments, column, options.unjudged)
        labels = judgments.labels.get(column, {})
        for name in options.names(labels):
            values = with_policy(parse_metric(name, options.depth, labels)(ranked), options.no_positive)
            result.per_query[f"{column}/{name}"] = values
            result.metrics[f"{column}/{name}"] = mean_with_interval(values, options.resamples if intervals else 0)
    return result


def main_metrics(names: Iterable[str]) -> list[str]:
    """Those of MAIN, of names with or without a label column; the first of all where there is none."""
    names = list(names)
    return [name for name in names if name.rpartition("/")[2] in MAIN] or names[:1]


def mean_with_interval(values: Float[np.ndarray, "query"], resamples: int) -> dict[str, float]:
    """resamples 0: both ends are NaN."""
    low, high = bootstrap_interval(values, resamples) if resamples else (np.nan, np.nan)
    counted = values[~np.isnan(values)]
    return {"value": float(counted.mean()) if len(counted) else np.nan, "low": low, "high": high}


def add_baselines(
    results: dict[str, dict[str, ViewResult]],
    primary: str,
    data: RetrievalData,
    tie: Int[Tensor, "catalogue"],
    options: Evaluation,
    weight: float | None,
) -> float | None:
    """Adds the rows of BASELINES to each split's views, and returns the weight of BM25 in hybrid_sum.

    The weight is the best one on val; on other splits alone it is `weight`, and without one the row is left out.
    """
    bm25 = BM25(data.product_texts())
    judged = {split: data.judgments(split) for split in results}
    lexical = {
        split: _bm25_ranking(bm25, views[primary].query_ids, data, tie, options.depth)
        for split, views in results.items()
    }
    if "val" in results:
        weight = _best_weight(lexical["val"], results["val"][primary], judged["val"], tie, options)
    for split, views in results.items():
        ours, words = views[primary], lexical[split].top
        tops = {
            "bm25": words,
            "random": random_ranking(ours.query_ids, len(tie), options.depth, seed=0),
            "hybrid_rrf": reciprocal_rank_fusion([words, ours.top], tie, options.depth),
        }
        if weight is not None:
            tops["hybrid_sum"] = weighted_sum(words, ours.top, weight, tie, options.depth)
        for view, top in tops.items():
            views[view] = measured(Ranking(ours.query_ids, top), judged[split], options)
    return weight


def _bm25_ranking(
    bm25: BM25, query_ids: Int[np.ndarray, "query"], data: RetrievalData, tie: Int[Tensor, "catalogue"], depth: int
) -> Ranking:
    """Each rank searches for its share of the queries."""
    rank, ranks = process()
    own = query_ids[rank::ranks]
    return joined(gathered(Ranking(own, bm25.search(data.query_texts(own), tie, depth))))


def _best_weight(
    lexical: Ranking, ours: ViewResult, judgments: Judgments, tie: Int[Tensor, "catalogue"], options: Evaluation
) -> float:
    """By nDCG@10 of the first label column."""
    return choose_weight(lexical.top, ours.top, tie, lambda top: mean_ndcg(top, lexical.query_ids, judgments, options))


def mean_ndcg(top: TopK, query_ids: Int[np.ndarray, "query"], judgments: Judgments, options: Evaluation) -> float:
    """nDCG@10 in the first label column, by which weights are chosen; 0 where no query has one."""
    ranked = ranked_gains(top.ids.numpy(), query_ids, judgments, next(iter(judgments.gain)), options.unjudged)
    values = parse_metric("ndcg@10", options.depth)(ranked)
    return float(np.nanmean(values)) if not np.isnan(values).all() else 0.0
