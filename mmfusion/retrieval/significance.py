"""How far a mean over queries can be trusted."""

import numpy as np
from jaxtyping import Float

DRAWS = 4_000_000  # query draws held in memory at a time


def bootstrap_interval(
    per_query: Float[np.ndarray, "query"], resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean over queries (Efron 1979): queries are drawn anew, with replacement.

    Queries with NaN are left out, as they are of the mean; without any query left, both ends are NaN.
    """
    values = per_query[~np.isnan(per_query)]
    if len(values) == 0:
        return np.nan, np.nan
    draw = np.random.default_rng(seed)
    rows = max(1, DRAWS // len(values))
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    means = [values[draw.integers(len(values), size=(size, len(values)))].mean(1) for size in sizes]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)
