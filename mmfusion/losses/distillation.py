"""Distillation: the towers learn to score like a teacher that reads query and product together, a cross-encoder say."""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmfusion.losses.functional import segment_logsumexp, widened
from mmfusion.losses.gather import gather_rows, own_rows, share_of_mean
from mmfusion.losses.modules import Scaled
from mmfusion.losses.pairs import Pairs
from mmfusion.precision import full_precision

Kind = Literal["kl", "margin"]
ENTRIES = 2**22  # of the pairs' rows at a time: millions of pairs would hold each row once per pair


class Distillation(Scaled):
    """Scores like the teacher's, among the products of the batch of all ranks that the teacher scored for a left row.

    The mean over the valid left rows of all ranks with at least two scored, valid right rows; others take no part.
    Without any, the loss is 0, with zero gradients. A product that is in the batch twice counts twice.

    Args:
        label: the teacher: the name of a table of scores.
        kind: kl: of the teacher's probabilities from ours (distillation_kl). margin: differences between two products
            as large as the teacher's (margin_mse); its scores must then be on our scale, 1 / temperature times cosine.
        teacher_temperature: the teacher's scores are divided by it.
        temperature: where our temperature starts; similarities are divided by it.
        learnable: whether our temperature is trained.
        max_scale: the largest 1 / temperature; training is held there.
    """

    reads = "scores"

    def __init__(
        self,
        label: str,
        *,
        kind: Kind = "kl",
        teacher_temperature: float = 1.0,
        temperature: float = 0.07,
        learnable: bool = True,
        max_scale: float = 100.0,
    ) -> None:
        super().__init__(label, temperature=temperature, learnable=learnable, max_scale=max_scale)
        if not label:
            raise ValueError("label is empty; name the table of scores (data.scores) of the teacher")
        if kind not in get_args(Kind):
            raise ValueError(f"kind is {kind!r}; choose one of {', '.join(get_args(Kind))}")
        if not teacher_temperature > 0:
            raise ValueError(f"teacher_temperature is {teacher_temperature}; expected a number above 0")
        self.compare = distillation_kl if kind == "kl" else margin_mse
        self.teacher_temperature = teacher_temperature

    def forward(
        self,
        left: Float[Tensor, "query dim"],
        right: Float[Tensor, "product dim"],
        pairs: Pairs,
        left_valid: Bool[Tensor, "query"],
        right_valid: Bool[Tensor, "product"],
    ) -> Float[Tensor, ""]:
        self.clip_scale()
        all_left = gather_rows(left_valid)
        scored = pairs.between(all_left, gather_rows(right_valid))
        taught = torch.bincount(scored.rows[:, 0], minlength=len(all_left)) > 1
        own = scored.where(taught[scored.rows[:, 0]]).of_rows(own_rows(len(left)))
        with full_precision(left.device):
            left, right = widened(left), gather_rows(widened(right))
            student = self.scale * pair_similarities(left, right, own.rows)
            teacher = own.gain.to(student.dtype) / self.teacher_temperature
            losses = self.compare(student, teacher, own.rows[:, 0], len(left))
        return share_of_mean(losses, int(taught.sum()))


def distillation_kl(
    student: Float[Tensor, "pair"], teacher: Float[Tensor, "pair"], query: Int[Tensor, "pair"], queries: int
) -> Float[Tensor, "{queries}"]:
    """Each query's KL(softmax(teacher) || softmax(student)) over its pairs; 0 for a query without any.

    Hinton 2015, arXiv 1503.02531, section 2, over a list of products as in RocketQAv2 (Ren 2021, 2110.07367) and
    ColBERTv2 (Santhanam 2021, 2112.01488). The student is not divided by the teacher's temperature, it has a scale of
    its own; so no square of that temperature is needed to keep gradients in size.
    """
    wanted = teacher - segment_logsumexp(teacher, query, queries)[query]
    given = student - segment_logsumexp(student, query, queries)[query]
    return student.new_zeros(queries).index_add(0, query, wanted.exp() * (wanted - given))


def margin_mse(
    student: Float[Tensor, "pair"], teacher: Float[Tensor, "pair"], query: Int[Tensor, "pair"], queries: int
) -> Float[Tensor, "{queries}"]:
    """Each query's mean over two different pairs a, b of ((s_a - s_b) - (t_a - t_b))^2; 0 for a query with fewer.

    Margin-MSE (Hofstätter 2020, arXiv 2010.02666), between all products of a list. With d = s - t that is
    the mean of (d_a - d_b)^2 over a != b, which is twice the variance of d, sum of (d - mean)^2 / (n - 1).
    """
    difference = student - teacher
    count = torch.bincount(query, minlength=queries)
    zeros = student.new_zeros(queries)
    mean = zeros.index_add(0, query, difference) / count.clamp(min=1)
    squares = zeros.index_add(0, query, (difference - mean[query]).square())
    return 2 * squares / (count - 1).clamp(min=1)


def pair_similarities(
    left: Float[Tensor, "query dim"], right: Float[Tensor, "product dim"], pairs: Int[Tensor, "pair 2"]
) -> Float[Tensor, "pair"]:
    """left . right of some pairs alone, a few at a time in both passes; the backward pass can run once."""
    return _PairSimilarities.apply(left, right, pairs)


class _PairSimilarities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, pairs: Tensor) -> Tensor:
        ctx.save_for_backward(left, right, pairs)
        found = [(left[some[:, 0]] * right[some[:, 1]]).sum(1) for some in _pieces(pairs, left)]
        return torch.cat([left.new_zeros(0), *found])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        left, right, pairs = ctx.saved_tensors
        to_left, to_right = torch.zeros_like(left), torch.zeros_like(right)
        weights = _pieces(upstream, left)
        for some, weight in zip(_pieces(pairs, left), weights, strict=True):
            to_left.index_add_(0, some[:, 0], weight[:, None] * right[some[:, 1]])
            to_right.index_add_(0, some[:, 1], weight[:, None] * left[some[:, 0]])
        return to_left, to_right, None


def _pieces(pairs: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    return pairs.split(max(1, ENTRIES // max(1, rows.shape[1])))
