import math
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mmfusion.losses.contrast import contrast
from mmfusion.losses.functional import Positives, graded_info_nce, row_weights, segment_logsumexp
from mmfusion.losses.pairs import Pairs
from tests.mmfusion.losses.slow import drawn_pairs, positives_of, slow_losses, slow_weights, unit

BOTH = pytest.mark.parametrize("positives", get_args(Positives))
VALID = torch.arange(9) != 2


def losses_of(
    query: Tensor, product: Tensor, pairs: Pairs, scale: Tensor | float, valid: Tensor, positives: Positives = "any"
) -> Tensor:
    """Each query's loss, all listed pairs rewarded by their gains."""
    everyone = torch.ones(len(query), dtype=torch.bool)
    found = contrast(scale * query, product, pairs.rows, everyone, valid)
    return graded_info_nce(found.row, found.listed, pairs.rows[:, 0], pairs.gain, positives)


def drawn() -> tuple[Tensor, Tensor, Pairs]:
    """Unit-norm rows in float64; some with several grades, one with none; product 2 is in no pair."""
    pairs = drawn_pairs(6, 9)
    return unit(6, seed=1), unit(9, seed=2), pairs.between(torch.ones(6, dtype=torch.bool), VALID)


@BOTH
@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
def test_equals_the_slow_definition(positives: Positives, scale: float) -> None:
    query, product, pairs = drawn()
    expected = slow_losses(query, product, pairs, scale, valid=VALID, positives=positives, graded=True)
    assert expected[2] == 0
    assert pairs.gain.unique().tolist() == [0.01, 0.1, 1.0]
    losses = losses_of(query, product, pairs, scale, VALID, positives)
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-13)


@BOTH
def test_many_grades_in_one_row(positives: Positives) -> None:
    """A numeric label: 40 pairs of one query with 25 different gains."""
    query, product = unit(1), unit(50, seed=3)
    gain = torch.randint(1, 26, (40,), generator=torch.Generator().manual_seed(0)).double()
    pairs = Pairs(torch.stack([torch.zeros(40, dtype=torch.int64), torch.randperm(50)[:40]], 1), gain, gain > 9)
    valid = torch.ones(50, dtype=torch.bool)
    expected = slow_losses(query, product, pairs, 5.0, valid=valid, positives=positives, graded=True)
    assert losses_of(query, product, pairs, 5.0, valid, positives).item() == pytest.approx(expected[0], rel=1e-12)


@BOTH
def test_gradcheck(positives: Positives) -> None:
    query, product, pairs = drawn()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *inputs: losses_of(inputs[0], inputs[1], pairs, inputs[2], VALID, positives),
        (query.requires_grad_(), product.requires_grad_(), scale),
    )


@BOTH
def test_equal_gains_weigh_nothing(positives: Positives) -> None:
    query, product, pairs = drawn()
    one = Pairs(pairs.rows, torch.ones_like(pairs.gain), pairs.positive)
    third = Pairs(pairs.rows, torch.full_like(pairs.gain, 1 / 3), pairs.positive)
    losses = [losses_of(query, product, p, 9.0, VALID, positives) for p in (one, third)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-13)
    all_positive = Pairs(pairs.rows, pairs.gain, torch.ones_like(pairs.positive))
    expected = slow_losses(query, product, all_positive, 9.0, valid=VALID, positives=positives, graded=False)
    torch.testing.assert_close(losses[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-13)


@BOTH
def test_one_positive_is_cross_entropy(positives: Positives) -> None:
    query, product, _ = drawn()
    target = torch.tensor([3, 1, 4, 1, 5, 8])
    pairs = positives_of([[i, j] for i, j in enumerate(target.tolist())])
    losses = losses_of(query, product, pairs, 20.0, torch.ones(9, dtype=torch.bool), positives)
    torch.testing.assert_close(losses, cross_entropy(20 * query @ product.T, target, reduction="none"))


def test_equal_embeddings_give_log_of_the_number_of_choices() -> None:
    """7 valid products, of gains 1, 1, .5 and four negatives: l of gain 1 is log(7 / 2) or, each, log(6), as the other
    one is left out; of gain .5 it is log(5): the better two are left out."""
    rows = torch.full((8, 4), 0.5)
    gain = torch.tensor([1.0, 1.0, 0.5])
    pairs = Pairs(torch.tensor([[0, 0], [0, 6], [0, 3]]), gain, gain == 1)
    expected: dict[Positives, float] = {
        "any": (math.log(7 / 2) + 0.5 * math.log(5)) / 1.5,
        "each": (2 * math.log(6) + 0.5 * math.log(5)) / 2.5,
    }
    for positives, loss in expected.items():
        losses = losses_of(rows[:1], rows, pairs, 100.0, torch.arange(8) < 7, positives)
        assert losses.item() == pytest.approx(loss, rel=1e-5)


@BOTH
def test_a_better_grade_is_not_pushed_down_by_a_worse_one(positives: Positives) -> None:
    """The gradient of the worse product's loss on the better product is 0; the better one's pushes the worse down."""
    query, product = unit(1), unit(2, seed=4).requires_grad_()
    rows = torch.tensor([[0, 0], [0, 1]])
    for gain, moved in (([1.0, 1e-9], [True, True]), ([1.0, 1.0], [False, False])):
        pairs = Pairs(rows, torch.tensor(gain, dtype=torch.float64), torch.tensor([True, True]))
        loss = losses_of(query, product, pairs, 1.0, torch.ones(2, dtype=torch.bool), positives).sum()
        gradient = torch.autograd.grad(loss, product)[0]
        assert (gradient.abs().sum(1) > 1e-12).tolist() == moved
        if moved[0]:
            assert (gradient @ query[0] * torch.tensor([-1, 1]) > 0).all()


@BOTH
def test_the_order_of_rows_and_pairs_does_not_matter(positives: Positives) -> None:
    query, product, pairs = drawn()
    losses = losses_of(query, product, pairs, 9.0, VALID, positives)
    rows, columns = torch.randperm(6), torch.randperm(9)
    moved = torch.stack([rows.argsort()[pairs.rows[:, 0]], columns.argsort()[pairs.rows[:, 1]]], 1)
    order = torch.randperm(len(pairs))
    shuffled = Pairs(moved[order], pairs.gain[order], pairs.positive[order]).sorted()
    again = losses_of(query[rows], product[columns], shuffled, 9.0, VALID[columns], positives)
    torch.testing.assert_close(again, losses[rows], rtol=1e-12, atol=1e-13)


def test_a_duplicate_product_that_is_positive_is_not_pushed_away() -> None:
    """Against its own copy as a negative, a query at its product loses log 2; with both positive, nothing."""
    product, valid = torch.eye(4)[[0, 0, 1, 2]], torch.ones(4, dtype=torch.bool)
    for pairs, loss in ([[0, 0]], math.log(2)), ([[0, 0], [0, 1]], 0.0):
        losses = losses_of(product[:1], product, positives_of(pairs), 100.0, valid)
        assert losses.item() == pytest.approx(loss, abs=1e-6)


@BOTH
@pytest.mark.parametrize("some_valid", [True, False])
@pytest.mark.parametrize("listed", [[], [[0, 1]]])
def test_what_is_not_there_has_zero_loss_and_zero_gradient(
    positives: Positives, some_valid: bool, listed: list[list[int]]
) -> None:
    """A query without a pair; and one whose pair has nothing to beat."""
    query, product = unit(6).requires_grad_(), unit(9, seed=2).requires_grad_()
    valid = torch.full((9,), some_valid).index_fill(0, torch.tensor(1), True)
    scale = torch.tensor(100.0, requires_grad=True)
    losses = losses_of(query, product, positives_of(listed), scale, valid, positives)
    gradients = torch.autograd.grad(losses.sum(), (query, product, scale))
    assert all(gradient.isfinite().all() for gradient in gradients)
    if not (listed and some_valid):
        assert not losses.any()
        assert not any(gradient.any() for gradient in gradients)
    assert not losses[1:].any()


@BOTH
def test_fp32_is_finite_and_exact_at_scale_100(positives: Positives) -> None:
    """The worst case: the positive opposite, a negative on top. The loss is 200, its gradient 100 on each of them."""
    product = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    query, valid = torch.tensor([[1.0, 0.0]]), torch.ones(2, dtype=torch.bool)
    loss = losses_of(query, product, positives_of([[0, 0]]), 100.0, valid, positives)
    assert loss.item() == 200
    assert torch.autograd.grad(loss, product)[0].tolist() == [[-100.0, 0.0], [100.0, 0.0]]


def test_unknown_positives_are_named() -> None:
    one = torch.zeros(1)
    with pytest.raises(ValueError, match="positives is 'all'; choose one of any, each"):
        graded_info_nce.__wrapped__(one, one, one.long(), one + 1, "all")  # type: ignore


def test_segment_logsumexp_equals_logsumexp_of_each_segment() -> None:
    value = torch.tensor([1000.0, 3.0, -1000.0, 999.0, 4.0])
    result = segment_logsumexp(value, torch.tensor([2, 0, 3, 2, 0]), 4)
    expected = [value[[1, 4]].logsumexp(0), torch.finfo(torch.float32).min, value[[0, 3]].logsumexp(0), -1000.0]
    torch.testing.assert_close(result, torch.tensor(expected))


def test_a_row_counts_what_its_best_pair_is_worth() -> None:
    pairs = drawn_pairs(6, 9)
    found = row_weights(pairs.rows[:, 0], pairs.gain, 6)
    assert found.tolist() == slow_weights(pairs, 6, graded=True)
    assert found[1] == 0.1
    assert found[2] == 0
