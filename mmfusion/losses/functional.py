"""The mathematics of the losses, on tensors alone: no ranks, no Lightning, no parameters.

Numerical policy: similarities and losses in fp32 or wider (under autocast too), and sums of exponentials only as
log-sum-exp, so that a scale of 100 is safe. What is masked has the lowest finite similarity, not minus infinity: its
probability is exactly 0 and a row of which nothing is left has gradient 0, not NaN.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmfusion.losses.pairs import Pairs

Positives = Literal["any", "each"]


def info_nce(
    query: Float[Tensor, "query dim"],
    product: Float[Tensor, "product dim"],
    pairs: Pairs,
    scale: Float[Tensor, ""],
    *,
    valid: Bool[Tensor, "product"],
    positives: Positives = "any",
) -> Float[Tensor, "query"]:
    """Each query's contrastive loss against all valid products; 0 for a query without a positive pair.

    Rows are unit-norm; `pairs` are (query, product) rows of valid products; ignored pairs are in no denominator.
    any: -log of the sum over positives of p(product | query): they share the probability, the best may have it all
    (MIL-NCE, Miech 2020, arXiv 1912.06430, eq. 1; with one positive InfoNCE, van den Oord 2018, 1807.03748, eq. 4).
    each: the mean over positives of InfoNCE against the negatives alone, so that every positive must win (SupCon,
    Khosla 2020, 2004.11362, eq. 2, less the other positives in its denominator, which push one another away).
    """
    if positives not in get_args(Positives):
        raise ValueError(f"positives is {positives!r}; choose one of {', '.join(get_args(Positives))}")
    logits = similarities(query, product, scale, valid)
    loss = _any_positive(logits, pairs) if positives == "any" else _each_positive(logits, pairs)
    return torch.where(has_pair(pairs.positive, len(query)), loss, 0)


def similarities(
    query: Float[Tensor, "query dim"],
    product: Float[Tensor, "product dim"],
    scale: Float[Tensor, ""],
    valid: Bool[Tensor, "product"],
) -> Float[Tensor, "query product"]:
    """scale * query . product, in fp32 or wider; the lowest finite number for products that are not valid."""
    with torch.autocast(query.device.type, enabled=False):
        query, product = widened(scale) * widened(query), widened(product)
        masked = torch.zeros_like(product[:, 0]).masked_fill(~valid, lowest(product))
        return torch.addmm(masked, query, product.T)  # the mask rides along: no pass over the square matrix


def has_pair(pairs: Int[Tensor, "pair 2"], rows: int) -> Bool[Tensor, "{rows}"]:
    """Which of `rows` left rows occur in `pairs`."""
    return torch.zeros(rows, dtype=torch.bool, device=pairs.device).index_fill(0, pairs[:, 0], True)


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


def _any_positive(logits: Float[Tensor, "query product"], pairs: Pairs) -> Float[Tensor, "query"]:
    log_p = _without(logits, pairs.ignored).log_softmax(1)  # a fused kernel: .8 of the time of logsumexp
    return -segment_logsumexp(log_p[pairs.positive.unbind(1)], pairs.positive[:, 0], len(logits))


def _each_positive(logits: Float[Tensor, "query product"], pairs: Pairs) -> Float[Tensor, "query"]:
    row = pairs.positive[:, 0]
    similarity = logits[pairs.positive.unbind(1)]
    negatives = _without(logits, torch.cat([pairs.positive, pairs.ignored])).logsumexp(1)
    losses = -logsigmoid(similarity - negatives[row])  # exact: softplus cuts off above 20
    count = torch.bincount(row, minlength=len(logits)).clamp(min=1)
    return torch.zeros_like(negatives).index_add(0, row, losses) / count


def _without(logits: Float[Tensor, "query product"], pairs: Int[Tensor, "out 2"]) -> Float[Tensor, "query product"]:
    """`logits`, in place, with the lowest finite number at `pairs`."""
    return logits.index_put_(pairs.unbind(1), logits.new_tensor(lowest(logits))) if len(pairs) else logits
