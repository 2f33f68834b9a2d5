"""The mathematics of the losses, on tensors alone: no ranks, no Lightning, no parameters.

Numerical policy, of all losses: similarities and losses in fp32 or wider, whatever autocast and TF32 do elsewhere, and
sums of exponentials only as log-sum-exp, so that a scale of 100 is safe. What is masked has the lowest finite
similarity, not minus infinity: its probability is exactly 0 and a row of which nothing is left has gradient 0, not NaN.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

Positives = Literal["any", "each"]


def graded_info_nce(
    negatives: Float[Tensor, "query"],
    listed: Float[Tensor, "pair"],
    query: Int[Tensor, "pair"],
    gain: Float[Tensor, "pair"],
    positives: Positives = "any",
) -> Float[Tensor, "query"]:
    """Each query's contrastive loss, in which a listed pair beats all that is worth less; 0 for a query without a pair.

    negatives: log-sum-exp over a query's negatives. listed, gain: similarity and gain (> 0) of the listed pairs, sorted
    by `query`. With s the similarities (scale * query . product), g the gains, 0 for negatives, and U the units of a
    query, loss = sum over U of g_u * l_u / sum over U of g_u, where
    any: a unit is all products of one gain, l_u = -log of sum over j of U e^s_j / sum over k with g_k <= g_u of e^s_k:
    they share the probability, the best may have it all. With one gain MIL-NCE (Miech 2020, arXiv 1912.06430, eq. 1),
    with one positive InfoNCE (van den Oord 2018, 1807.03748, eq. 4); with several gains the ranking losses' terms of
    RINCE (Hoffmann 2022, 2201.11736), which leaves better products out of a grade's denominator.
    each: a unit is one product, l_u = -log of e^s_u / (e^s_u + sum over k with g_k < g_u of e^s_k): every positive must
    win. With one gain SupCon (Khosla 2020, 2004.11362, eq. 2) less the other positives in its denominator, which push
    one another away. Gains weigh as in GCL (Zhu 2024, 2404.08535).
    """
    if positives not in get_args(Positives):
        raise ValueError(f"positives is {positives!r}; choose one of {', '.join(get_args(Positives))}")
    if not len(listed):
        return negatives * 0 + listed.sum()  # of both, for ranks that hold none: backward passes meet in gather.py
    order = gain.argsort(stable=True)
    order = order[query[order].argsort(stable=True)]
    listed, query, gain = listed[order], query[order], gain[order]
    row_starts, grade_starts = _starts(query), _starts(query) | _starts(gain)
    worse = _worse(listed, row_starts, grade_starts)
    if positives == "any":
        unit = grade_starts.cumsum(0) - 1
        listed = segment_logsumexp(listed, unit, int(unit[-1]) + 1)
        worse, query, gain = worse[grade_starts], query[grade_starts], gain[grade_starts]
    losses = -logsigmoid(listed - torch.logaddexp(negatives[query], worse))  # exact: softplus cuts off above 20
    gain = gain.to(losses.dtype)
    total = torch.zeros_like(negatives).index_add(0, query, gain)
    return torch.zeros_like(negatives).index_add(0, query, losses * gain / total[query])


def row_weights(query: Int[Tensor, "pair"], gain: Float[Tensor, "pair"], rows: int) -> Float[Tensor, "{rows}"]:
    """What a row counts in a mean: the gain of its best listed pair; 0 without one."""
    return gain.new_zeros(rows).scatter_reduce(0, query, gain, "amax")


def segment_logsumexp(
    value: Float[Tensor, "pair"], segment: Int[Tensor, "pair"], segments: int
) -> Float[Tensor, "{segments}"]:
    """The log-sum-exp of each segment's values; the lowest finite number for a segment that has none."""
    empty = value.new_full((segments,), lowest(value))
    top = empty.scatter_reduce(0, segment, value.detach(), "amax")
    total = torch.zeros_like(empty).index_add(0, segment, (value - top[segment]).exp())
    return top + total.clamp(min=torch.finfo(value.dtype).tiny).log()


def widened(value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """In fp32, or as it is when wider."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def lowest(value: Float[Tensor, "*shape"]) -> float:
    return torch.finfo(value.dtype).min


def _starts(value: Tensor) -> Tensor:
    """Where a value differs from the one before; the first one does."""
    return torch.cat([value.new_ones(1, dtype=torch.bool), value[1:] != value[:-1]])


def _worse(listed: Tensor, row_starts: Tensor, grade_starts: Tensor) -> Tensor:
    """For each pair the log-sum-exp over the pairs of its row with a lower gain. Pairs are sorted by row, then gain."""
    place = torch.arange(len(listed), device=listed.device)
    row = torch.where(row_starts, place, 0).cummax(0).values
    grade = torch.where(grade_starts, place, 0).cummax(0).values
    empty = listed.new_full((1,), lowest(listed))
    if torch.equal(row, grade):
        return empty.expand(len(listed))
    # Prefixes by doubling: after the pass with `reach`, an entry sums up to 2 * reach of its row, itself included.
    sums, reach = listed, 1
    longest = int((place - row).max()) + 1
    while reach < longest:
        before = torch.where(place - reach >= row, sums[(place - reach).clamp(min=0)], empty)
        sums, reach = torch.logaddexp(sums, before), 2 * reach
    return torch.where(grade > row, sums[(grade - 1).clamp(min=0)], empty)
