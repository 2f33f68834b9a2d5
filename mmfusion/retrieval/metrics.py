"""Ranking metrics with judgments as input: pure numpy, vectorised over queries, graded gains, the true ideal.

Each metric takes a `Ranked` and a depth k and returns one value per query. Policy:
  - A retrieved product that is not judged has gain 0 and is not relevant, or is taken off the list (`ranked_gains`);
    a gain below 0 counts as 0.
  - What is judged but not retrieved still counts, in the ideal and in the number of relevant products.
  - Relevant means gain >= positive_from of the label column.
  - A list shorter than k is one whose last places are wrong: what is divided by k stays divided by k.
  - A query for which a metric is not defined (nDCG, ERR: no judged gain above 0; all others that speak of relevance: no
    relevant product) gets NaN. The mean leaves it out and the NaNs tell how many; `with_policy` counts it as 0 instead,
    as trec_eval does.
  - judged and the shares describe the list as it is shown, every list, and so never leave one out.
"""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial

import numpy as np
from jaxtyping import Float, Shaped

from mmfusion.retrieval.calibration import calibration
from mmfusion.retrieval.ranked import Ranked, places, ranked_gains

__all__ = [
    "METRICS",
    "Metric",
    "PerQuery",
    "Ranked",
    "calibration",
    "parse_metric",
    "ranked_gains",
    "shares",
    "with_policy",
]

PerQuery = Float[np.ndarray, "query"]
Metric = Callable[..., PerQuery]  # of ranked: Ranked and k: int
NO_POSITIVE = ("skip", "zero")


def ndcg(ranked: Ranked, k: int) -> PerQuery:
    """Sum of gain / log2(rank + 1) over the first k, over that of the ideal order (Järvelin 2002, linear gains)."""
    return _ratio(_discounted(_first(ranked, k)), _discounted(ranked.ideal[:, :k]))


def ndcg_exp(ranked: Ranked, k: int) -> PerQuery:
    """nDCG with 2^gain - 1 in place of the gain (Burges 2005): tells large gains further apart than small ones."""
    best = ranked.ideal.max(1, initial=0.0, keepdims=True)
    found, ideal = _exponential(_first(ranked, k), best), _exponential(ranked.ideal[:, :k], best)
    return _ratio(_discounted(found), _discounted(ideal))


def recall(ranked: Ranked, k: int) -> PerQuery:
    """The share of all relevant products that is among the first k; below 1 where there are more than k."""
    return _ratio(ranked.hits(k), ranked.relevant_total)


def recall_capped(ranked: Ranked, k: int) -> PerQuery:
    """Relevant products among the first k, divided by min(k, relevant): 1 is always within reach."""
    return _ratio(ranked.hits(k), np.minimum(ranked.relevant_total, k))


def precision(ranked: Ranked, k: int) -> PerQuery:
    """The share of the first k that is relevant."""
    return _where_relevant(ranked, ranked.hits(k) / k)


def hit_rate(ranked: Ranked, k: int) -> PerQuery:
    """1 where there is a relevant product among the first k, else 0 (trec_eval's success)."""
    return _where_relevant(ranked, ranked.hits(k) > 0)


def mrr(ranked: Ranked, k: int) -> PerQuery:
    """1 / rank of the first relevant product, 0 where there is none among the first k: nothing deeper was looked at."""
    return _where_relevant(ranked, (ranked.hits(k) > 0) / (1 + ranked.relevant[:, :k].argmax(1)))


def mean_average_precision(ranked: Ranked, k: int) -> PerQuery:
    """Sum of the precision at the rank of each relevant product among the first k, over all relevant products.

    As trec_eval's map_cut it is not divided by min(k, relevant): 1 is out of reach where more than k are relevant.
    """
    first = ranked.relevant[:, :k]
    query, place = np.divmod(np.flatnonzero(first), max(1, first.shape[1]))
    precisions = (1 + places(query, len(ranked.relevant))) / (1 + place)
    return _ratio(np.bincount(query, precisions, len(ranked.relevant)), ranked.relevant_total)


def err(ranked: Ranked, k: int) -> PerQuery:
    """Expected 1 / rank at which a searcher who reads from the top is satisfied (Chapelle 2009, eq. 4 and 5).

    The product at rank r satisfies with R = (2^gain - 1) / 2^largest, and ERR is the sum over r of R_r / r times the
    product of (1 - R_i) over all ranks i before. Even the best list stays below 1. The largest gain is that of the
    column, of its labels or, where those are numbers, of all its judgments: one extreme number makes all others small.
    """
    satisfies = _exponential(_first(ranked, k), ranked.largest)
    goes_on = np.cumprod(1 - satisfies, axis=1)
    goes_on = np.concatenate([np.ones_like(goes_on[:, :1]), goes_on[:, :-1]], axis=1)
    values = satisfies * goes_on @ (1 / np.arange(1, 1 + satisfies.shape[1]))
    return np.where(ranked.ideal.any(1), values, np.nan)


def judged(ranked: Ranked, k: int) -> PerQuery:
    """The share of the first k that is judged: where it is low, the other metrics know little of the list."""
    return np.count_nonzero(~np.isnan(ranked.shown[:, :k]), axis=1) / k


METRICS: dict[str, Metric] = {
    "ndcg": ndcg,
    "ndcg_exp": ndcg_exp,
    "recall": recall,
    "recall_capped": recall_capped,
    "precision": precision,
    "hit_rate": hit_rate,
    "mrr": mrr,
    "map": mean_average_precision,
    "err": err,
    "judged": judged,
}
DEEP = ("mrr", "map")  # look as deep as the search when no k is given


def shares(labels: Mapping[str, float]) -> dict[str, Metric]:
    """The share of the first k that has each label, `share_<label>`, and `share_unjudged`; lower case if unambiguous.

    labels: what each is worth. Those worth the same cannot be told apart by their gains and are one: `share_c+i`.
    """
    distinct = len({label.lower() for label in labels}) == len(labels)
    named: dict[float, list[str]] = {}
    for label, gain in labels.items():
        named.setdefault(gain, []).append(label.lower() if distinct else label)
    found: dict[str, Metric] = {f"share_{'+'.join(names)}": partial(_share, gain=gain) for gain, names in named.items()}
    return found | {"share_unjudged": _share_unjudged}


def parse_metric(name: str, depth: int, labels: Mapping[str, float] | None = None) -> Callable[[Ranked], PerQuery]:
    """The function of a name such as `ndcg@10`. `mrr` and `map` alone look as deep as the search; the others need a k.

    labels: what each label of the column is worth, for the shares; none where labels are numbers.
    """
    family, _, k = name.rpartition("@") if "@" in name else (name, "", "")
    known = METRICS | shares(labels or {})
    if family not in known:
        raise ValueError(f"unknown metric {name!r}; {_hint(family, known)}")
    if name in DEEP:
        return partial(known[family], k=depth)
    if not (k.isdecimal() and int(k) > 0):
        raise ValueError(f"metric {name!r} needs a depth above 0, as in {family}@10")
    if int(k) > depth:
        raise ValueError(f"metric {name!r} needs a search depth of at least {k}, got {depth}; raise the depth")
    return partial(known[family], k=int(k))


def with_policy(per_query: PerQuery, no_positive: str) -> PerQuery:
    """What the mean is taken of: "skip" keeps NaN, to be left out; "zero" counts such queries as 0."""
    if no_positive not in NO_POSITIVE:
        raise ValueError(f"no_positive is {no_positive!r}; expected one of: {', '.join(NO_POSITIVE)}")
    return per_query if no_positive == "skip" else np.nan_to_num(per_query)


def _share(ranked: Ranked, k: int, gain: float) -> PerQuery:
    return np.count_nonzero(ranked.shown[:, :k] == gain, axis=1) / k


def _share_unjudged(ranked: Ranked, k: int) -> PerQuery:
    return np.count_nonzero(np.isnan(ranked.shown[:, :k]) & (ranked.ids[:, :k] >= 0), axis=1) / k


def _hint(family: str, known: Mapping[str, Metric]) -> str:
    if family.startswith("share"):
        return f"the labels of this column have: {', '.join(name for name in known if name.startswith('share_'))}"
    near = get_close_matches(family, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"


def _first(ranked: Ranked, k: int) -> Float[np.ndarray, "query first"]:
    """The gains of the first k as they count: none is negative or NaN."""
    if ranked.gains.shape[1] < k:
        raise ValueError(f"the lists have {ranked.gains.shape[1]} places where k is {k}; pad them with -1")
    return np.fmax(ranked.gains[:, :k], 0)


def _exponential(gains: Float[np.ndarray, "query rank"], top: Float[np.ndarray, "query 1"] | float) -> np.ndarray:
    """(2^gain - 1) / 2^top for gains up to top, exact for small ones and without overflow for large ones."""
    return -np.expm1(-gains * np.log(2)) * np.exp2(gains - top)


def _discounted(gains: Float[np.ndarray, "query rank"]) -> PerQuery:
    return gains @ (1 / np.log2(np.arange(2, 2 + gains.shape[1])))


def _where_relevant(ranked: Ranked, values: Shaped[np.ndarray, "query"]) -> PerQuery:
    return np.where(ranked.relevant_total > 0, values, np.nan)


def _ratio(part: np.ndarray, whole: np.ndarray) -> PerQuery:
    """part / whole; NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
