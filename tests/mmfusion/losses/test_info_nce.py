import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmfusion.losses import GradedInfoNCE, InfoNCE, Pairs, Sigmoid
from mmfusion.losses.info_nce import Contrastive
from tests.mmfusion.losses.slow import drawn_pairs, positives_of, slow_mean, unit

LEFT, RIGHT = 12, 18
LEFT_VALID, RIGHT_VALID = torch.arange(LEFT) != 4, torch.arange(RIGHT) % 7 != 3
BOTH = pytest.mark.parametrize("kind", [InfoNCE, GradedInfoNCE])


def sides() -> tuple[Tensor, Tensor]:
    return unit(LEFT), unit(RIGHT, seed=1)


@BOTH
@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("positives", ["any", "each"])
@pytest.mark.parametrize("hard_up_to", [0.0, 0.05])
def test_equals_the_slow_definition(
    kind: type[Contrastive], hard_up_to: float, positives: Any, symmetric: bool, chunk: int | None
) -> None:
    pairs = drawn_pairs(LEFT, RIGHT)
    fewer = Pairs(*(column[pairs.gain > hard_up_to] for column in (pairs.rows, pairs.gain, pairs.positive)))
    assert (len(fewer) < len(pairs)) == (hard_up_to > 0)
    options: dict[str, Any] = {"positives": positives, "symmetric": symmetric}
    loss = kind(temperature=0.1, hard_up_to=hard_up_to, chunk=chunk, **options).double()  # type: ignore[call-arg]
    expected = slow_mean(
        *sides(), fewer, loss.scale.item(), LEFT_VALID, RIGHT_VALID, graded=kind is GradedInfoNCE, **options
    )
    assert loss(*sides(), pairs, LEFT_VALID, RIGHT_VALID).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("positives", ["any", "each"])
def test_with_equal_gains_graded_is_plain(positives: Any) -> None:
    pairs = drawn_pairs(LEFT, RIGHT)
    equal = Pairs(pairs.rows, torch.full_like(pairs.gain, 0.3), torch.ones_like(pairs.positive))
    results = []
    for kind in (InfoNCE, GradedInfoNCE):
        left, right = (side.requires_grad_() for side in sides())
        loss = kind(positives=positives)(left, right, equal, LEFT_VALID, RIGHT_VALID)
        results.append([loss, *torch.autograd.grad(loss, (left, right))])
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)


@BOTH
def test_sides_can_be_swapped(kind: type[Contrastive]) -> None:
    left, right, pairs, loss = *sides(), drawn_pairs(LEFT, RIGHT), kind()  # type: ignore[call-arg]
    there = loss(left, right, pairs, LEFT_VALID, RIGHT_VALID)
    back = loss(right, left, pairs.swapped(), RIGHT_VALID, LEFT_VALID)
    torch.testing.assert_close(there, back)


@BOTH
def test_the_order_of_tuples_and_pairs_does_not_matter(kind: type[Contrastive]) -> None:
    left, right, pairs, loss = *sides(), drawn_pairs(LEFT, RIGHT), kind()  # type: ignore[call-arg]
    before = loss(left, right, pairs, LEFT_VALID, RIGHT_VALID)
    rows, columns, order = torch.randperm(LEFT), torch.randperm(RIGHT), torch.randperm(len(pairs))
    moved = torch.stack([rows.argsort()[pairs.rows[:, 0]], columns.argsort()[pairs.rows[:, 1]]], 1)
    again = Pairs(moved[order], pairs.gain[order], pairs.positive[order])
    torch.testing.assert_close(
        loss(left[rows], right[columns], again, LEFT_VALID[rows], RIGHT_VALID[columns]), before, rtol=1e-12, atol=0
    )


@BOTH
def test_what_fills_a_row_that_is_not_valid_does_not_matter(kind: type[Contrastive]) -> None:
    left, right, pairs, loss = *sides(), drawn_pairs(LEFT, RIGHT), kind()  # type: ignore[call-arg]
    before = loss(left, right, pairs, LEFT_VALID, RIGHT_VALID)
    left[~LEFT_VALID], right[~RIGHT_VALID] = 9.0, -9.0
    assert torch.equal(loss(left, right, pairs, LEFT_VALID, RIGHT_VALID), before)


@BOTH
@pytest.mark.parametrize("pairs", [positives_of([]), positives_of([[0, 0]])])
def test_without_a_valid_positive_loss_and_gradients_are_zero(kind: type[Contrastive], pairs: Pairs) -> None:
    rows, none = unit(4).requires_grad_(), torch.zeros(4, dtype=torch.bool)
    loss = kind()  # type: ignore[call-arg]
    value = loss(rows, rows, pairs, none, none)
    gradients = torch.autograd.grad(value, (rows, loss.log_scale))
    assert value == 0
    assert not any(gradient.any() for gradient in gradients)


def test_only_a_row_with_a_better_pair_counts_in_full() -> None:
    """Two queries, one with a product of gain 1, one with .1, all similarities 0: (1 log 3 + .1 log 3) / 1.1. A query
    without a pair counts nothing."""
    rows, valid = torch.eye(6)[:3], torch.ones(3, dtype=torch.bool)
    gain = torch.tensor([1.0, 0.1])
    pairs = Pairs(torch.tensor([[0, 1], [1, 2]]), gain, gain >= 1)
    loss = GradedInfoNCE(temperature=1.0, symmetric=False)
    left, right = rows.requires_grad_(), torch.eye(6)[3:]
    value = loss(left, right, pairs, valid, valid)
    assert value.item() == pytest.approx(math.log(3))
    gradient = torch.autograd.grad(value, left)[0]
    assert gradient[1].norm().item() == pytest.approx(0.1 * gradient[0].norm().item())
    assert gradient[0].any()
    assert not gradient[2].any()


def test_unmasked_knows_the_tuples_alone() -> None:
    rows, valid = torch.eye(4), torch.ones(4, dtype=torch.bool)
    pairs = positives_of([[0, 0], [1, 1], [2, 2], [3, 3], [0, 1]])
    pairs = Pairs(
        torch.cat([pairs.rows, torch.tensor([[1, 0]])]),
        torch.cat([pairs.gain, torch.tensor([0.1])]),
        torch.cat([pairs.positive, torch.tensor([False])]),
    )
    own = positives_of([[i, i] for i in range(4)])
    unmasked = InfoNCE(mask_false_negatives=False)(rows, rows, pairs, valid, valid)
    assert torch.equal(unmasked, InfoNCE()(rows, rows, own, valid, valid))
    assert not torch.equal(unmasked, InfoNCE()(rows, rows, pairs, valid, valid))


@BOTH
def test_bf16_towers_under_autocast_get_an_fp32_loss(kind: type[Contrastive]) -> None:
    left, right = (side.bfloat16() for side in sides())
    pairs = drawn_pairs(LEFT, RIGHT)
    exact = kind()(left.float(), right.float(), pairs, LEFT_VALID, RIGHT_VALID)  # type: ignore[call-arg]
    with torch.autocast("cpu", torch.bfloat16):
        loss = kind()(left, right, pairs, LEFT_VALID, RIGHT_VALID)  # type: ignore[call-arg]
    assert loss.dtype == torch.float32
    assert torch.equal(loss, exact)


def test_duplicate_queries_masked_have_lower_loss_where_they_are_right() -> None:
    """Two tuples of one query: at perfect vectors the masked loss is that of sharing, the unmasked one pays log 2."""
    rows, valid = normalize(torch.eye(3)[[0, 0, 1, 2]]), torch.ones(4, dtype=torch.bool)
    every = positives_of([[0, 0], [0, 1], [1, 0], [1, 1], [2, 2], [3, 3]])
    options: dict[str, Any] = {"temperature": 0.01, "learnable": False}
    masked = InfoNCE(**options)(rows, rows, every, valid, valid)
    unmasked = InfoNCE(**options, mask_false_negatives=False)(rows, rows, every, valid, valid)
    assert masked.item() == pytest.approx(0, abs=1e-6)
    assert unmasked.item() == pytest.approx(math.log(2) / 2, rel=1e-5)


@BOTH
def test_a_chunk_without_rows_is_an_error(kind: type[Contrastive]) -> None:
    with pytest.raises(ValueError, match="chunk is 0; expected a number of rows"):
        kind(chunk=0)  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", [InfoNCE, Sigmoid])
def test_judgments_that_nobody_goes_by_are_an_error(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"hard_up_to=0.1 with mask_false_negatives=false"):
        kind(mask_false_negatives=False, hard_up_to=0.1)
