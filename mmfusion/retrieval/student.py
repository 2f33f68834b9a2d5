"""Student's t with any degrees of freedom, whole or not."""

import math

TINY = 1e-300
TERMS = 100_000  # of the continued fraction, which needs about sqrt(df)


def two_sided(t: float, df: float) -> float:
    """The chance that Student's t lies further from 0 than `t`. df > 0; an infinite `t` has none."""
    if math.isinf(t):
        return 0.0
    return incomplete_beta(df / (df + t * t), df / 2, 0.5)


def quantile(chance: float, df: float) -> float:
    """The t > 0 beyond which, on both sides together, Student's t lies with this chance (0 < chance <= 1)."""
    low, high = 0.0, 1.0
    while two_sided(high, df) > chance:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, df) > chance else (low, middle)
    return (low + high) / 2


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function (Abramowitz and Stegun 1964, 26.5.8), 0 <= x <= 1."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side alone
        return 1 - incomplete_beta(1 - x, b, a)
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(scale) / (a * _fraction(x, a, b))


def _fraction(x: float, a: float, b: float) -> float:
    """1 + d1 / (1 + d2 / (1 + ...)), by Lentz's method as Thompson and Barnett (1986) gave it."""
    value, above, below = 1.0, 1.0, 0.0
    for term in range(1, TERMS):
        half = term // 2
        if term % 2:
            factor = -(a + half) * (a + b + half) * x / ((a + 2 * half) * (a + 2 * half + 1))
        else:
            factor = half * (b - half) * x / ((a + 2 * half - 1) * (a + 2 * half))
        below = 1 / (1 + factor * below or TINY)
        above = 1 + factor / above or TINY
        value *= above * below
        if abs(above * below - 1) < 1e-15:
            return value
    raise AssertionError(f"the fraction of the incomplete beta function did not converge at {(x, a, b)}")
