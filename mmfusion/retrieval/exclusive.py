"""Exclusive matches: products that the fused view finds and neither text nor photo alone would have brought up."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from mmfusion.batch import Judgments
from mmfusion.retrieval.evaluation import Evaluation, ViewResult, mean_with_interval
from mmfusion.retrieval.labels import names
from mmfusion.retrieval.metrics import ranked_gains

FIRST = 10  # of the fused view
BEYOND = 100  # of text and of image: what is deeper is not found there
MOST = 5  # queries that are named
UNJUDGED = "unjudged"
TITLE = "Found by fused alone"  # of a gallery of the queries that are named


def exclusive_matches(views: Mapping[str, ViewResult], judgments: Judgments, options: Evaluation) -> dict[str, Any]:
    """Of one split, {} without the views text, image and fused:

    depths: of each view. per_query: the mean number of exclusive matches of a query, with its interval and `queries`.
    products: how many there are in all. labels[column][label] = {"exclusive", "first"}: the label's share of them, and
    of all of the fused view's first products. most: dense ids of queries with most relevant ones (first column).
    """
    if not {"text", "image", "fused"} <= set(views):
        return {}
    beyond = min(BEYOND, options.depth)
    fused = views["fused"].top.ids.numpy()[:, :FIRST]
    there = fused >= 0
    only = there.copy()
    for view in ("text", "image"):
        only &= ~among(fused, views[view].top.ids.numpy()[:, :beyond])
    query_ids = views["fused"].query_ids
    shown = {column: _labelled(fused, query_ids, judgments, column) for column in judgments.gain}
    relevant = next(iter(shown.values()))[1] & only
    per_query = only.sum(1).astype(np.float64)
    return {
        "depths": {"fused": FIRST, "text": beyond, "image": beyond},
        "per_query": mean_with_interval(per_query, options.resamples) | {"queries": len(query_ids)},
        "products": int(only.sum()),
        "labels": {column: _shares(labels, only, there) for column, (labels, _) in shown.items()},
        "most": _most(relevant.sum(1), query_ids),
    }


def among(ids: Int[np.ndarray, "query k"], others: Int[np.ndarray, "query depth"]) -> Bool[np.ndarray, "query k"]:
    """Which of the products are in the query's other list."""
    catalogue = 1 + max(ids.max(initial=0), others.max(initial=0))
    row = np.arange(len(ids))[:, None] * catalogue
    return np.isin(row + ids, (row + others)[others >= 0])


def _labelled(
    ids: Int[np.ndarray, "query k"], query_ids: Int[np.ndarray, "query"], judgments: Judgments, column: str
) -> tuple[np.ndarray, Bool[np.ndarray, "query k"]]:
    """The name of each product's label, and whether it is relevant. Labels that are numbers are relevant or not."""
    gains = ranked_gains(ids, query_ids, judgments, column).shown
    relevant = np.nan_to_num(gains, nan=-np.inf) >= judgments.positive_from[column]
    if not (labels := judgments.labels.get(column)):
        return np.where(np.isnan(gains), UNJUDGED, np.where(relevant, "relevant", "not relevant")), relevant
    named = names(labels)
    return np.array([[named.get(gain, UNJUDGED) for gain in row] for row in gains.tolist()], object), relevant


def _shares(
    labels: np.ndarray, only: Bool[np.ndarray, "query k"], there: Bool[np.ndarray, "query k"]
) -> dict[str, dict[str, float]]:
    return {
        label: {"exclusive": _share(labels[only] == label), "first": _share(labels[there] == label)}
        for label in dict.fromkeys(labels[there].tolist())
    }


def _share(hits: Bool[np.ndarray, "_"]) -> float:
    return float(hits.mean()) if len(hits) else float("nan")


def _most(counts: Int[np.ndarray, "query"], query_ids: Int[np.ndarray, "query"]) -> list[int]:
    return [int(query_ids[row]) for row in np.argsort(-counts, kind="stable")[:MOST] if counts[row]]
