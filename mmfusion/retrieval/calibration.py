"""What a score is worth: how often products of that score are relevant."""

import numpy as np
from jaxtyping import Float

from mmfusion.retrieval.ranked import Ranked


def calibration(scores: Float[np.ndarray, "query k"], ranked: Ranked, bins: int = 10) -> list[dict[str, float]]:
    """The retrieved judged pairs in `bins` parts of equal size by score, ascending.

    Of each part the lowest and the highest score, the number of pairs, and the share of them that is relevant. Equal
    scores stay together, so there may be fewer parts, and unequal ones.
    """
    known = ~np.isnan(ranked.shown)
    score, relevant = scores[known], ranked.shown[known] >= ranked.positive_from
    if not len(score):
        return []
    ordered = np.sort(score)
    starts = np.unique(np.searchsorted(ordered, ordered[np.arange(bins) * len(ordered) // bins]))
    ends = np.append(starts[1:], len(ordered))
    low, high = ordered[starts], ordered[ends - 1]
    hits = np.bincount(np.searchsorted(low, score[relevant], side="right") - 1, minlength=len(low))
    columns = low.tolist(), high.tolist(), (ends - starts).tolist(), (hits / (ends - starts)).tolist()
    return [dict(zip(("low", "high", "pairs", "relevant"), row, strict=True)) for row in zip(*columns, strict=True)]
