import math
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from mmfusion.losses.functional import Positives, info_nce, segment_logsumexp
from mmfusion.losses.pairs import Pairs

BOTH = pytest.mark.parametrize("positives", get_args(Positives))


def slow_info_nce(
    query: Tensor, product: Tensor, pairs: Pairs, scale: float, *, valid: Tensor, positives: str
) -> list[float]:
    """The definition, pair by pair, in Python's floats; for rows whose exponentials do not overflow."""
    positive = {tuple(pair) for pair in pairs.positive.tolist()}
    ignored = {tuple(pair) for pair in pairs.ignored.tolist()}
    losses = []
    for i, q in enumerate(query.double().tolist()):
        good, bad = [], []
        for j, p in enumerate(product.double().tolist()):
            similarity = math.exp(scale * math.fsum(a * b for a, b in zip(q, p, strict=True)))
            if (i, j) in positive:
                good.append(similarity)
            elif valid[j] and (i, j) not in ignored:
                bad.append(similarity)
        if not good:
            losses.append(0.0)
        elif positives == "any":
            losses.append(-math.log(math.fsum(good) / math.fsum(good + bad)))
        else:
            losses.append(math.fsum(-math.log(g / math.fsum([g, *bad])) for g in good) / len(good))
    return losses


def draw(queries: int = 6, products: int = 9, seed: int = 0) -> tuple[Tensor, Tensor, Pairs, Tensor]:
    """Unit-norm rows in float64; some with several positives, some with none; product 2 is not valid."""
    generator = torch.Generator().manual_seed(seed)
    query = normalize(torch.randn(queries, 5, dtype=torch.float64, generator=generator), dim=1)
    product = normalize(torch.randn(products, 5, dtype=torch.float64, generator=generator), dim=1)
    kind = torch.rand(queries, products, generator=generator)
    valid = torch.ones(products, dtype=torch.bool)
    valid[2], kind[:, 2], kind[1] = False, 1.0, kind[1] / 2 + 0.5
    return query, product, Pairs((kind < 0.3).nonzero(), ((kind > 0.3) & (kind < 0.6)).nonzero()), valid


@BOTH
@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
def test_equals_the_slow_definition(positives: Positives, scale: float) -> None:
    query, product, pairs, valid = draw()
    losses = info_nce(query, product, pairs, torch.tensor(scale), valid=valid, positives=positives)
    expected = slow_info_nce(query, product, pairs, scale, valid=valid, positives=positives)
    assert expected[1] == 0
    assert len(pairs.ignored) > 0
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-13)


@BOTH
def test_gradcheck(positives: Positives) -> None:
    query, product, pairs, valid = draw()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *inputs: info_nce(inputs[0], inputs[1], pairs, inputs[2], valid=valid, positives=positives),
        (query.requires_grad_(), product.requires_grad_(), scale),
    )


@BOTH
def test_one_positive_is_cross_entropy(positives: Positives) -> None:
    query, product, _, _ = draw()
    target = torch.tensor([3, 1, 4, 1, 5, 8])
    pairs = Pairs(torch.stack([torch.arange(6), target], 1), torch.zeros(0, 2, dtype=torch.int64))
    valid = torch.ones(9, dtype=torch.bool)
    losses = info_nce(query, product, pairs, torch.tensor(20.0), valid=valid, positives=positives)
    torch.testing.assert_close(losses, cross_entropy(20 * query @ product.T, target, reduction="none"))


def test_equal_embeddings_give_log_of_the_number_of_choices() -> None:
    """Of 7 valid products: 2 positives, 1 ignored. any: log(6 / 2); each: log(5), one positive and 4 negatives."""
    rows = torch.full((8, 4), 0.5)
    valid = torch.arange(8) < 7
    pairs = Pairs(torch.tensor([[0, 0], [0, 6]]), torch.tensor([[0, 3]]))
    choices: dict[Positives, int] = {"any": 3, "each": 5}
    for positives, count in choices.items():
        losses = info_nce(rows[:1], rows, pairs, torch.tensor(100.0), valid=valid, positives=positives)
        assert losses.item() == pytest.approx(math.log(count), rel=1e-5)


@BOTH
def test_the_order_of_rows_and_pairs_does_not_matter(positives: Positives) -> None:
    query, product, pairs, valid = draw()
    losses = info_nce(query, product, pairs, torch.tensor(9.0), valid=valid, positives=positives)
    rows, columns = torch.randperm(6), torch.randperm(9)
    moved = [
        torch.stack([rows.argsort()[p[:, 0]], columns.argsort()[p[:, 1]]], 1) for p in (pairs.positive, pairs.ignored)
    ]
    shuffled = Pairs(*(pair[torch.randperm(len(pair))] for pair in moved))
    again = info_nce(
        query[rows], product[columns], shuffled, torch.tensor(9.0), valid=valid[columns], positives=positives
    )
    torch.testing.assert_close(again, losses[rows], rtol=1e-12, atol=1e-13)


@BOTH
def test_ignored_and_invalid_products_are_as_if_absent(positives: Positives) -> None:
    query, product, pairs, valid = draw()
    pairs = Pairs(pairs.positive[pairs.positive[:, 0] == 0], pairs.ignored[pairs.ignored[:, 0] == 0])
    kept = valid.index_fill(0, pairs.ignored[:, 1], False).nonzero()[:, 0]
    renumbered = torch.searchsorted(kept, pairs.positive[:, 1].contiguous())
    fewer = Pairs(torch.stack([pairs.positive[:, 0], renumbered], 1), pairs.ignored[:0])
    losses = info_nce(query[:1], product, pairs, torch.tensor(9.0), valid=valid, positives=positives)
    all_valid = torch.ones(len(kept), dtype=torch.bool)
    without = info_nce(query[:1], product[kept], fewer, torch.tensor(9.0), valid=all_valid, positives=positives)
    assert len(kept) < len(product) - 1
    torch.testing.assert_close(losses, without, rtol=1e-12, atol=1e-13)


def test_a_duplicate_product_that_is_positive_is_not_pushed_away() -> None:
    """Against its own copy as a negative, a query at its product loses log 2; with both positive, nothing."""
    product = torch.eye(4)[[0, 0, 1, 2]]
    none, valid, scale = torch.zeros(0, 2, dtype=torch.int64), torch.ones(4, dtype=torch.bool), torch.tensor(100.0)
    for pairs, loss in ([[0, 0]], math.log(2)), ([[0, 0], [0, 1]], 0.0):
        losses = info_nce(product[:1], product, Pairs(torch.tensor(pairs), none), scale, valid=valid)
        assert losses.item() == pytest.approx(loss, abs=1e-6)


@BOTH
@pytest.mark.parametrize("some_valid", [True, False])
def test_rows_without_anything_left_have_zero_loss_and_zero_gradient(positives: Positives, some_valid: bool) -> None:
    query, product, _, _ = draw()
    none = torch.zeros(0, 2, dtype=torch.int64)
    valid = torch.full((9,), some_valid)
    scale = torch.tensor(100.0, requires_grad=True)
    losses = info_nce(
        query.requires_grad_(), product.requires_grad_(), Pairs(none, none), scale, valid=valid, positives=positives
    )
    gradients = torch.autograd.grad(losses.sum(), (query, product, scale))
    assert not losses.any()
    assert not any(gradient.any() for gradient in gradients)


@BOTH
def test_fp32_is_finite_and_exact_at_scale_100(positives: Positives) -> None:
    """The worst case: the positive opposite, a negative on top. The loss is 200, its gradient 100 on each of them."""
    product = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    pairs = Pairs(torch.tensor([[0, 0]]), torch.zeros(0, 2, dtype=torch.int64))
    valid = torch.ones(2, dtype=torch.bool)
    query = torch.tensor([[1.0, 0.0]])
    loss = info_nce(query, product, pairs, torch.tensor(100.0), valid=valid, positives=positives)
    assert loss.item() == 200
    assert torch.autograd.grad(loss, product)[0].tolist() == [[-100.0, 0.0], [100.0, 0.0]]


@BOTH
def test_half_precision_and_autocast_compute_in_fp32(positives: Positives) -> None:
    query, product, pairs, valid = draw()
    query, product, scale = query.bfloat16(), product.bfloat16(), torch.tensor(50.0)
    exact = info_nce(query.float(), product.float(), pairs, scale, valid=valid, positives=positives)
    with torch.autocast("cpu", torch.bfloat16):
        losses = info_nce(query, product, pairs, scale, valid=valid, positives=positives)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, exact, rtol=1e-6, atol=1e-6)


def test_unknown_positives_are_named() -> None:
    query, product, pairs, valid = draw()
    with pytest.raises(ValueError, match="positives is 'all'; choose one of any, each"):
        info_nce.__wrapped__(query, product, pairs, torch.tensor(1.0), valid=valid, positives="all")  # type: ignore


def test_segment_logsumexp_equals_logsumexp_of_each_segment() -> None:
    value = torch.tensor([1000.0, 3.0, -1000.0, 999.0, 4.0])
    result = segment_logsumexp(value, torch.tensor([2, 0, 3, 2, 0]), 4)
    expected = [value[[1, 4]].logsumexp(0), torch.finfo(torch.float32).min, value[[0, 3]].logsumexp(0), -1000.0]
    torch.testing.assert_close(result, torch.tensor(expected))
