"""Ranking metrics with judgments as input: pure numpy, vectorised over queries, graded gains, the true ideal.

Each metric takes a `Ranked` and a depth k and returns one value per query. Policy:
  - A retrieved product that is not judged has gain 0 and is not relevant; a gain below 0 counts as 0.
  - What is judged but not retrieved still counts, in the ideal and in the number of relevant products.
  - Relevant means gain >= positive_from of the label column.
  - A query for which a metric is not defined (nDCG: no judged gain above 0; Recall, MRR: no relevant product) gets NaN.
    The mean leaves it out, unlike trec_eval's, which counts it as 0; the NaNs tell how many.
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
from jaxtyping import Bool, Float, Int

from mmfusion.batch import Judgments

PerQuery = Float[np.ndarray, "query"]


@dataclass
class Ranked:
    """What the judgments say about ranked lists, in one label column.

    gains: of the retrieved products, NaN where not judged (or where the list is padded). relevant: which of them are.
    ideal: the largest gains of all judged products of the query, descending, 0 beyond the last.
    relevant_total: the number of relevant products of the query, retrieved or not.
    """

    gains: Float[np.ndarray, "query k"]
    relevant: Bool[np.ndarray, "query k"]
    ideal: Float[np.ndarray, "query k"]
    relevant_total: Int[np.ndarray, "query"]


def ranked_gains(
    ids: Int[np.ndarray, "query k"], query_ids: Int[np.ndarray, "query"], judgments: Judgments, column: str
) -> Ranked:
    """Looks up ranked lists of product ids (best first, -1 pads), one per query id, in a label column's judgments."""
    if column not in judgments.gain:
        raise ValueError(f"no label column {column!r} in the judgments; there are: {', '.join(judgments.gain)}")
    judged = ~np.isnan(judgments.gain[column])
    query, product, gain = judgments.query[judged], judgments.product[judged], judgments.gain[column][judged]
    gains = _looked_up(ids, query_ids, query, product, gain)
    row_of = np.full(1 + max(query.max(initial=-1), query_ids.max(initial=-1)), -1)
    row_of[query_ids] = np.arange(len(query_ids))
    row, gain = row_of[query][row_of[query] >= 0], gain[row_of[query] >= 0]
    positive_from = judgments.positive_from[column]
    return Ranked(
        gains=gains,
        relevant=gains >= positive_from,
        ideal=_largest(row, gain, shape=ids.shape),
        relevant_total=np.bincount(row[gain >= positive_from], minlength=len(query_ids)),
    )


def ndcg(ranked: Ranked, k: int) -> PerQuery:
    """Sum of gain / log2(rank + 1) over the first k, over that of the ideal order (Järvelin 2002, linear gains)."""
    discount = 1 / np.log2(np.arange(2, k + 2))
    gains = np.nan_to_num(ranked.gains[:, :k]).clip(min=0)
    return _ratio(gains @ discount, ranked.ideal[:, :k] @ discount)


def recall(ranked: Ranked, k: int) -> PerQuery:
    """The share of all relevant products that is among the first k; below 1 where there are more than k."""
    return _ratio(ranked.relevant[:, :k].sum(1), ranked.relevant_total)


def recall_capped(ranked: Ranked, k: int) -> PerQuery:
    """Relevant products among the first k, divided by min(k, relevant): 1 is always within reach."""
    return _ratio(ranked.relevant[:, :k].sum(1), np.minimum(ranked.relevant_total, k))


def mrr(ranked: Ranked, k: int) -> PerQuery:
    """1 / rank of the first relevant product, 0 where there is none among the first k: nothing deeper was looked at."""
    first = ranked.relevant[:, :k]
    return _ratio(np.where(first.any(1), 1 / (1 + first.argmax(1)), 0), ranked.relevant_total > 0)


METRICS: dict[str, Callable[[Ranked, int], PerQuery]] = {
    "ndcg": ndcg,
    "recall": recall,
    "recall_capped": recall_capped,
    "mrr": mrr,
}


def parse_metric(name: str, depth: int) -> tuple[Callable[[Ranked, int], PerQuery], int]:
    """The function and k of a name such as `ndcg@10`. `mrr` alone looks as deep as the search; the others need a k."""
    family, _, k = name.partition("@")
    if family not in METRICS:
        near = get_close_matches(family, METRICS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(METRICS)}"
        raise ValueError(f"unknown metric {name!r}; {hint}")
    if name == "mrr":
        return mrr, depth
    if not (k.isdecimal() and int(k) > 0):
        raise ValueError(f"metric {name!r} needs a depth above 0, as in {family}@10")
    if int(k) > depth:
        raise ValueError(f"metric {name!r} needs a search depth of at least {k}, got {depth}; raise the depth")
    return METRICS[family], int(k)


def _looked_up(
    ids: Int[np.ndarray, "query k"],
    query_ids: Int[np.ndarray, "query"],
    judged_query: Int[np.ndarray, "listed"],
    judged_product: Int[np.ndarray, "listed"],
    gain: Float[np.ndarray, "listed"],
) -> Float[np.ndarray, "query k"]:
    """The gain of each retrieved product, NaN where not judged; the judgments are sorted by (query, product)."""
    products = 1 + max(judged_product.max(initial=-1), ids.max(initial=-1))
    keys = np.append(judged_query * products + judged_product, np.iinfo(np.int64).max)
    wanted = np.where(ids >= 0, query_ids[:, None] * products + ids, -1)
    at = np.searchsorted(keys, wanted)
    return np.where(keys[at] == wanted, np.append(gain, np.nan)[at], np.nan)


def _largest(
    row: Int[np.ndarray, "listed"], gain: Float[np.ndarray, "listed"], shape: tuple[int, int]
) -> Float[np.ndarray, "query k"]:
    """The positive gains of each row, descending, as many as fit."""
    order = np.lexsort((-gain, row))
    row, gain = row[order], gain[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    fits = rank < shape[1]
    largest = np.zeros(shape)
    largest[row[fits], rank[fits]] = gain[fits].clip(min=0)
    return largest


def _ratio(part: np.ndarray, whole: np.ndarray) -> PerQuery:
    """part / whole; NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
