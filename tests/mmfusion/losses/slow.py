"""The contrastive losses pair by pair, in Python's floats, written from functional.graded_info_nce's formula."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmfusion.losses.pairs import Pairs


def slow_losses(
    query: Tensor, product: Tensor, pairs: Pairs, scale: float, *, valid: Tensor, positives: str, graded: bool
) -> list[float]:
    """One per query, 0 for one without a pair to win with; for similarities whose exponentials do not overflow."""
    listed = {(i, j): g for (i, j), g in zip(pairs.rows.tolist(), pairs.gain.tolist(), strict=True)}
    worth = {
        pair: (listed[pair] if graded else 1.0)
        for pair, positive in zip(listed, pairs.positive.tolist(), strict=True)
        if graded or positive
    }
    losses = []
    for i, q in enumerate(query.double().tolist()):
        e = [math.exp(scale * math.fsum(a * b for a, b in zip(q, p, strict=True))) for p in product.double().tolist()]
        gain = {j: worth[i, j] for j in range(len(e)) if (i, j) in worth}
        negatives = [e[j] for j in range(len(e)) if valid[j] and (i, j) not in listed]
        if positives == "any":
            units = [(g, [e[j] for j in gain if gain[j] == g]) for g in sorted(set(gain.values()))]
        else:
            units = [(g, [e[j]]) for j, g in gain.items()]
        total = 0.0
        for g, unit in units:
            worse = [e[j] for j in gain if gain[j] < g]
            total += g * -math.log(math.fsum(unit) / math.fsum([*unit, *worse, *negatives]))
        losses.append(total / math.fsum(g for g, _ in units) if units else 0.0)
    return losses


def slow_weights(pairs: Pairs, rows: int, *, graded: bool) -> list[float]:
    """What each row counts: the gain of its best pair; without grades 1 where it has a positive."""
    listed = list(zip(pairs.rows[:, 0].tolist(), pairs.gain.tolist(), pairs.positive.tolist(), strict=True))
    if graded:
        return [max((g for i, g, _ in listed if i == row), default=0.0) for row in range(rows)]
    return [float(any(p for i, _, p in listed if i == row)) for row in range(rows)]


def slow_mean(
    left: Tensor,
    right: Tensor,
    pairs: Pairs,
    scale: float,
    left_valid: Tensor,
    right_valid: Tensor,
    *,
    positives: str = "any",
    graded: bool = False,
    symmetric: bool = True,
) -> float:
    """The loss of one process on a whole batch."""
    pairs = pairs.between(left_valid, right_valid)
    ways = [(left, right, pairs, right_valid), (right, left, pairs.swapped(), left_valid)]
    means = []
    for rows, columns, own, valid in ways[: 2 if symmetric else 1]:
        losses = slow_losses(rows, columns, own, scale, valid=valid, positives=positives, graded=graded)
        weights = slow_weights(own, len(rows), graded=graded)
        means.append(math.fsum(w * x for w, x in zip(weights, losses, strict=True)) / math.fsum(weights))
    return math.fsum(means) / len(means)


def unit(rows: int, dim: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(rows, dim, dtype=torch.float64, generator=generator), dim=1)


def drawn_pairs(queries: int, products: int, seed: int = 0) -> Pairs:
    """Three gains, 1 of which is positive; query 1 has no positive, query 2 nothing listed."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.rand(queries, products, generator=generator)
    gain = torch.tensor([1.0, 0.1, 0.01, 0.0], dtype=torch.float64)[
        torch.bucketize(kind, torch.tensor([0.2, 0.4, 0.55]))
    ]
    gain[1, gain[1] == 1] = 0.1
    gain[2] = 0
    rows = gain.nonzero()
    worth = gain[rows.unbind(1)]
    return Pairs(rows, worth, worth >= 1)


def positives_of(rows: list[list[int]]) -> Pairs:
    """These pairs, all positive and worth 1."""
    listed = torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)
    return Pairs(listed, torch.ones(len(listed)), torch.ones(len(listed), dtype=torch.bool))
