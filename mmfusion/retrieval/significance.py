"""How far a mean over queries can be trusted, and a difference between the means of two runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, UInt8

DRAWS = 4_000_000  # numbers drawn and held in memory at a time
FLIPS = 100_000  # sign flips of a test; it resolves p down to 1 / (1 + FLIPS)
SIGNIFICANT = 0.05

# the signs of eight queries under each value of a byte
SIGNS = 1.0 - 2.0 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")


def bootstrap_interval(
    per_query: Float[np.ndarray, "query"], resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean over queries (Efron 1979): queries are drawn anew, with replacement.

    Queries with NaN are left out, as they are of the mean; without any query left, both ends are NaN. Of the
    differences between two runs' values, this is the paired interval of the difference of their means.
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


def sign_flip_test(differences: Float[np.ndarray, "query"], flips: int = FLIPS, seed: int = 0) -> float:
    """Two-sided p of the paired randomisation test (Fisher 1935): of equal runs, any difference could have either sign.

    The share of sign patterns under which the mean is at least as far from 0 as it is. All patterns count where they
    are no more than `flips`; else p is (1 + extreme) / (1 + flips) of as many random ones, so that it is never 0
    (Phipson and Smyth 2010). `differences` holds no NaN; memory is bounded by DRAWS.
    """
    moved = differences[differences != 0]  # the others change no sum
    extreme = np.abs(moved.sum()) - 1e-12 * np.abs(moved).sum()  # equal sums may have been rounded differently
    width = -(-len(moved) // 8)
    if 2 ** len(moved) <= flips:
        patterns = np.arange(2 ** len(moved), dtype="<u8")[:, None].view(np.uint8).T[:width]
        return float(np.mean(np.abs(_flipped_sums(moved, patterns)) >= extreme))
    draw = np.random.default_rng(seed)
    rows = max(1, DRAWS // width)
    sizes = [min(rows, flips - start) for start in range(0, flips, rows)]
    drawn = (draw.integers(256, size=(width, size), dtype=np.uint8) for size in sizes)
    count = sum(int((np.abs(_flipped_sums(moved, patterns)) >= extreme).sum()) for patterns in drawn)
    return (1 + count) / (1 + flips)


def _flipped_sums(
    values: Float[np.ndarray, "query"], patterns: UInt8[np.ndarray, "byte pattern"]
) -> Float[np.ndarray, "pattern"]:
    """The sum under each pattern of signs, one bit per query: the 256 sums of every eight queries are looked up."""
    eights = np.append(values, np.zeros(-len(values) % 8)).reshape(-1, 8)
    sums = np.zeros(patterns.shape[1])
    for byte, of_eight in zip(patterns, eights @ SIGNS.T, strict=True):
        sums += of_eight[byte]
    return sums


def holm(p: Float[np.ndarray, "test"]) -> Float[np.ndarray, "test"]:
    """p values of tests that are read together (Holm 1979): the chance that any below .05 is there by luck is 5 %."""
    order = np.argsort(p, kind="stable")
    steps = p[order] * np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected


@dataclass(frozen=True)
class Paired:
    """Two runs on the same queries: the mean of `run` less that of `baseline`, its 95 % interval and p.

    queries: those with a value in both runs. left_out: those with a value in one of the two alone.
    p: of `sign_flip_test`. p_holm: p corrected for all tests that are shown together; p where there is one test.
    """

    baseline: str
    run: str
    metric: str
    queries: int
    left_out: int
    difference: float
    low: float
    high: float
    p: float
    p_holm: float

    @property
    def significant(self) -> bool:
        return self.p_holm < SIGNIFICANT

    @property
    def verdict(self) -> str:
        """One line with the corrected p, such as "B is better by .021 [.012, .030], p = .0004"."""
        p = f"p {p_text(self.p_holm)}"
        if not self.significant:
            found = f"{'+' if self.difference > 0 else ''}{_number(self.difference)} {_interval(self.low, self.high)}"
            return f"{self.run} and {self.baseline} do not differ significantly: {found}, {p}"
        if self.difference > 0:
            found = f"better by {_number(self.difference)} {_interval(self.low, self.high)}, {p}"
        else:
            found = f"worse by {_number(-self.difference)} {_interval(-self.high, -self.low)}, {p}"
        if self.low <= 0 <= self.high:
            return f"{self.run} is probably {found}, but the interval includes 0"
        return f"{self.run} is {found}"


def paired(
    baseline: str,
    run: str,
    metric: str,
    before: Float[np.ndarray, "query"],
    after: Float[np.ndarray, "query"],
    seed: int = 0,
) -> Paired:
    """Tests the values `after`, of `run`, against `before`, of `baseline`, on the queries in which neither is NaN.

    Raises ValueError where there is none.
    """
    both = ~np.isnan(before) & ~np.isnan(after)
    if not both.any():
        raise ValueError(f"runs {baseline} and {run} have no query with {metric} in common; compare runs on one split")
    differences = after[both] - before[both]
    low, high = bootstrap_interval(differences, seed=seed)
    p = sign_flip_test(differences, seed=seed)
    left_out = int((np.isnan(before) != np.isnan(after)).sum())
    return Paired(baseline, run, metric, int(both.sum()), left_out, float(differences.mean()), low, high, p, p)


def corrected(tests: Sequence[Paired]) -> list[Paired]:
    """Tests that are shown together, their p values corrected for their number."""
    p = holm(np.array([test.p for test in tests], dtype=float))
    return [replace(test, p_holm=float(value)) for test, value in zip(tests, p, strict=True)]


def _interval(low: float, high: float) -> str:
    return f"[{_number(low)}, {_number(high)}]"


def _number(value: float) -> str:
    """.021 and -.021, without the zero in front."""
    digits = f"{abs(value):.3f}"
    return f"{'-' if value < 0 and float(digits) else ''}{digits.removeprefix('0')}"


def p_text(value: float) -> str:
    """= .41, = .012, = .0004 or < .0001, with as many digits as tell on which side of .05 it is."""
    if value < 0.0001:
        return "< .0001"
    rounded = (f"{value:.{digits}g}" for digits in range(1 if value < 0.001 else 2, 18))
    text = next(text for text in rounded if (float(text) < SIGNIFICANT) == (value < SIGNIFICANT))
    return f"= {text.removeprefix('0')}"
