import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmfusion.losses.pairs import Pairs
from mmfusion.losses.sigmoid import Sigmoid, sigmoid_losses
from tests.ddp import run_ranks
from tests.mmfusion.losses.steps import (
    GAINS,
    PRODUCTS,
    QUERIES,
    TUPLES,
    VALID,
    check_ranks_equal_one_process,
    own_products,
    own_tuples,
    vectors,
    whole_pairs,
)


def slow_sigmoid(
    left: Tensor, right: Tensor, valid: str, *, scale: float, bias: float, hard_up_to: float = 0.0, own: bool = False
) -> float:
    """Equation 1 of the paper, pair by pair, in Python's floats."""
    rows = [i for i in range(len(left)) if VALID[valid][0][i]]
    columns = [j for j in range(len(right)) if VALID[valid][1][j]]
    losses = []
    for i in rows:
        for j in columns:
            gain = GAINS.get((int(QUERIES[i]), int(PRODUCTS[j])), 0.0)
            if own:
                sign = 1 if gain >= 1 and i == j else -1
            elif gain >= 1:
                sign = 1
            elif gain > hard_up_to:
                continue
            else:
                sign = -1
            cosine = math.fsum(a * b for a, b in zip(left[i].tolist(), right[j].tolist(), strict=True))
            losses.append(math.log1p(math.exp(-sign * (scale * cosine + bias))))  # -log sigmoid
    return math.fsum(losses) / len(rows)


@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
@pytest.mark.parametrize(("temperature", "bias"), [(1.0, 0.0), (0.1, -10.0), (0.01, 3.0)])
@pytest.mark.parametrize("options", [{}, {"hard_up_to": 0.05}, {"hard_up_to": 1.0}, {"mask_false_negatives": False}])
def test_equals_the_slow_definition(
    chunk: int | None, temperature: float, bias: float, options: dict[str, Any]
) -> None:
    sigmoid = Sigmoid(temperature=temperature, bias=bias, chunk=chunk, **options).double()
    scale, own = sigmoid.scale.item(), not options.get("mask_false_negatives", True)
    for valid in ("all", "some"):
        expected = slow_sigmoid(
            *vectors(), valid, scale=scale, bias=bias, hard_up_to=options.get("hard_up_to", 0.0), own=own
        )
        loss = sigmoid(*vectors(), whole_pairs("judged"), *VALID[valid])
        assert loss.item() == pytest.approx(expected, rel=1e-13)


def test_the_batch_has_what_the_tests_are_about() -> None:
    pairs = whole_pairs("judged")
    own = pairs.own(TUPLES, 2 * TUPLES)
    assert 3 < len(own) < pairs.positive.sum() < len(pairs) - 5
    assert (pairs.rows[:, 1] >= TUPLES).sum() > 5
    assert len(pairs) > len(pairs.above(0.05)) > len(pairs.above(1.0)) == pairs.positive.sum()


def dense(left: Tensor, right: Tensor, pairs: Pairs, bias: Tensor, valid: Tensor) -> Tensor:
    """Row losses by way of whole matrices, for autograd."""
    logits, sign, counted = left @ right.T + bias, -torch.ones(len(left), len(right)), valid.repeat(len(left), 1)
    sign[pairs.rows[pairs.positive].unbind(1)] = 1
    counted[pairs.rows[~pairs.positive].unbind(1)] = False
    return (softplus(-sign.to(left) * logits, threshold=700) * counted).sum(1)


@pytest.mark.parametrize("chunk", [None, 3])
def test_gradients_are_exact(chunk: int | None) -> None:
    (left, right), valid = vectors(), VALID["some"][1]
    pairs = whole_pairs("judged").between(torch.ones(TUPLES, dtype=torch.bool), valid)
    inputs = [rows.requires_grad_() for rows in (20 * left, right, torch.tensor(-4.0, dtype=torch.float64))]
    weights = torch.linspace(-1, 2, TUPLES, dtype=torch.float64)
    found = [
        (losses, *torch.autograd.grad(losses, inputs, weights))
        for losses in (
            sigmoid_losses(inputs[0], inputs[1], pairs, inputs[2], valid, chunk),
            dense(inputs[0], inputs[1], pairs, inputs[2], valid),
        )
    ]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)
    assert torch.autograd.gradcheck(lambda a, b, c: sigmoid_losses(a, b, pairs, c, valid, chunk), inputs)


def test_equal_embeddings() -> None:
    """All cosines are 1. 3 of 4 rows and 4 of 5 columns are valid: 12 pairs, 2 positives, 1 ignored, 9 negatives."""
    rows = torch.full((5, 4), 0.5)
    pairs = Pairs(
        torch.tensor([[0, 0], [0, 3], [1, 1], [3, 3]]), torch.ones(4), torch.tensor([True, True, False, True])
    )
    loss = Sigmoid(temperature=0.5, bias=-1.0)(rows[:4], rows, pairs, torch.arange(4) < 3, torch.arange(5) < 4)
    expected = (2 * math.log1p(math.exp(-1)) + 9 * math.log1p(math.exp(1))) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_the_order_of_rows_and_pairs_does_not_matter() -> None:
    (left, right), pairs, valid = vectors(), whole_pairs("judged"), VALID["some"]
    rows, columns, order = torch.randperm(TUPLES), torch.randperm(2 * TUPLES), torch.randperm(len(pairs))
    moved = torch.stack([rows.argsort()[pairs.rows[:, 0]], columns.argsort()[pairs.rows[:, 1]]], 1)
    sigmoid = Sigmoid(chunk=5).double()
    again = sigmoid(
        left[rows],
        right[columns],
        Pairs(moved[order], pairs.gain[order], pairs.positive[order]),
        valid[0][rows],
        valid[1][columns],
    )
    torch.testing.assert_close(again, sigmoid(left, right, pairs, *valid), rtol=1e-12, atol=0)


def test_sides_can_be_swapped_but_for_the_number_of_rows() -> None:
    (left, right), pairs, valid = vectors(), whole_pairs("judged"), VALID["some"]
    sigmoid = Sigmoid(temperature=0.2).double()
    there, back = sigmoid(left, right, pairs, *valid), sigmoid(right, left, pairs.swapped(), *valid[::-1])
    torch.testing.assert_close(there * valid[0].sum(), back * valid[1].sum(), rtol=1e-12, atol=0)


def test_what_fills_a_row_that_is_not_valid_does_not_matter() -> None:
    results = []
    for fill in 0.0, 9.0:
        left, right = vectors(torch.float32)
        left[~VALID["some"][0]], right[~VALID["some"][1]] = fill, -fill
        loss = Sigmoid()(left.requires_grad_(), right.requires_grad_(), whole_pairs("judged"), *VALID["some"])
        gradients = torch.autograd.grad(loss, (left, right))
        assert not gradients[0][~VALID["some"][0]].any()
        assert not gradients[1][~VALID["some"][1]].any()
        results.append((loss, gradients[0][VALID["some"][0]], gradients[1][VALID["some"][1]]))
    assert all(torch.equal(*both) for both in zip(*results, strict=True))


@pytest.mark.parametrize("sides", [(True, False), (False, True), (False, False)])
def test_without_valid_rows_loss_and_gradients_are_zero(sides: tuple[bool, bool]) -> None:
    left, right = (rows.requires_grad_() for rows in vectors(torch.float32))
    valid = torch.full((TUPLES,), sides[0]), torch.full((2 * TUPLES,), sides[1])
    sigmoid = Sigmoid(temperature=0.01, bias=100.0)
    loss = sigmoid(left, right, whole_pairs("judged"), *valid)
    gradients = torch.autograd.grad(loss, [left, right, *sigmoid.parameters()])
    assert loss.item() == 0
    assert len(gradients) == 4
    assert not any(gradient.any() for gradient in gradients)


def test_fp32_is_finite_and_exact_at_scale_100() -> None:
    """The positive opposite, a negative on top: logits -110 and 90. Slopes -1 and 1, times the scale."""
    left = torch.tensor([[1.0, 0.0]])
    right = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    pairs = Pairs(torch.tensor([[0, 0]]), torch.ones(1), torch.ones(1, dtype=torch.bool))
    bias = torch.tensor(-10.0, requires_grad=True)
    losses = sigmoid_losses(100 * left, right, pairs, bias, torch.ones(2, dtype=torch.bool))
    assert losses.tolist() == [200.0]
    gradients = torch.autograd.grad(losses.sum(), (right, bias))
    assert gradients[0].tolist() == [[-100.0, 0.0], [100.0, 0.0]]
    assert gradients[1].item() == 0


def test_bf16_towers_under_autocast_get_an_fp32_loss_and_gradient() -> None:
    left, right = (rows.bfloat16().requires_grad_() for rows in vectors())
    found = []
    for autocast in (True, False):
        sigmoid = Sigmoid()
        rows = (left, right) if autocast else (left.float(), right.float())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = sigmoid(*rows, whole_pairs("judged"), *VALID["some"])
            found.append((loss, *torch.autograd.grad(loss, [left, right, *sigmoid.parameters()])))
    assert found[0][0].dtype == torch.float32
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


@pytest.mark.parametrize("chunk", [None, 7])
def test_equals_open_clip(chunk: int | None) -> None:
    open_clip = pytest.importorskip("open_clip")
    left, right = vectors()
    right = right[:TUPLES]
    diagonal = torch.arange(TUPLES)[:, None].expand(TUPLES, 2)
    pairs = Pairs(diagonal, torch.ones(TUPLES), torch.ones(TUPLES, dtype=torch.bool))
    valid = torch.ones(TUPLES, dtype=torch.bool)
    sigmoid = Sigmoid(temperature=0.05, bias=-3.0, chunk=chunk).double()
    inputs = [left.requires_grad_(), right.requires_grad_(), *sigmoid.parameters()]
    assert len(inputs) == 4
    found = [
        (loss, *torch.autograd.grad(loss, inputs))
        for loss in (
            sigmoid(left, right, pairs, valid, valid),
            open_clip.loss.SigLipLoss()(left, right, sigmoid.scale, sigmoid.bias),
        )
    ]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


class Largest(TorchDispatchMode):
    """The most elements that any tensor had that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *(t.untyped_storage().nbytes() // t.element_size() for t in tensors)])
        return result


def _largest(rank: int, world: int, rows: int, chunk: int | None) -> int:
    """Of a step with `rows` rows per rank, 16 wide."""
    left, right = (torch.randn(rows, 16, requires_grad=True) for _ in range(2))
    valid = torch.ones(rows, dtype=torch.bool)
    diagonal = torch.arange(world * rows)[:, None].expand(-1, 2)
    pairs = Pairs(diagonal, torch.ones(len(diagonal)), torch.ones(len(diagonal), dtype=torch.bool))
    with Largest() as largest:
        Sigmoid(chunk=chunk)(left, right, pairs, valid, valid).backward()
    return largest.elements


@pytest.mark.parametrize(("chunk", "rows"), [(64, 64), (None, 512)])
def test_the_square_matrix_never_exists(chunk: int | None, rows: int) -> None:
    assert _largest(0, 1, 2048, chunk) == rows * 2048


def test_memory_does_not_grow_with_the_number_of_ranks() -> None:
    """Of all ranks there are coordinates and flags alone: 2 integers per row, not 16 numbers."""
    assert max(run_ranks(_largest, 2, 256, 4)) == 256 * 16
    assert max(run_ranks(_largest, 4, 256, 4)) == 256 * 16


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("options", "valid"),
    [
        ({}, "all"),
        ({"chunk": 3}, "some"),
        ({"mask_false_negatives": False}, "some"),
        ({"hard_up_to": 0.05, "chunk": 3, "temperature": 0.02}, "some"),
        ({"learnable": False}, "some"),
        ({}, "none of the last half's products"),
        ({"chunk": 3}, "none of the last half's products"),
        ({}, "none"),
    ],
    ids=str,
)
def test_ranks_equal_one_process(world: int, options: dict[str, Any], valid: str) -> None:
    found = check_ranks_equal_one_process(Sigmoid(bias=-2.0, **options), "judged", world, valid)
    assert {"loss.bias", "loss.log_scale"} < set(found) or options.get("learnable") is False
    assert all(value.any() for value in found.values()) == (valid != "none")


def _weighted(rank: int, world: int, pairs: Pairs) -> tuple[Tensor, ...]:
    """Gradients of a weighted sum of the whole batch's row losses. `pairs` count products as one process has them."""
    order = torch.cat([own_products(torch.arange(2 * TUPLES), r, world) for r in range(world)])
    moved = Pairs(torch.stack([pairs.rows[:, 0], order.argsort()[pairs.rows[:, 1]]], 1), pairs.gain, pairs.positive)
    (left, right), tuples = vectors(), own_tuples(rank, world)
    rows = 9 * left[tuples], own_products(right, rank, world), torch.tensor(-3.0, dtype=torch.float64)
    left, right, bias = (value.requires_grad_() for value in rows)
    own = moved.of_rows(range(tuples.start, tuples.stop))
    losses = sigmoid_losses(left, right, own, bias, VALID["some"][1][order], 3)
    return torch.autograd.grad(losses, (left, right, bias), torch.linspace(-1, 2, TUPLES).double()[tuples])


@pytest.mark.parametrize("world", [2, 4])
def test_each_rank_may_have_another_upstream_gradient(world: int) -> None:
    """The gradient is that of the sum over ranks of what each makes of its losses, as of any collective."""
    pairs = whole_pairs("judged").between(torch.ones(TUPLES, dtype=torch.bool), VALID["some"][1])
    left, right, bias = (torch.stack(parts) for parts in zip(*run_ranks(_weighted, world, pairs), strict=True))
    expected = _weighted(0, 1, pairs)
    torch.testing.assert_close(left.flatten(0, 1), expected[0], rtol=1e-12, atol=1e-13)
    for rank in range(world):
        torch.testing.assert_close(right[rank], own_products(expected[1], rank, world), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(bias.sum(), expected[2], rtol=1e-12, atol=1e-13)


def test_the_bias_is_trained_with_the_temperature() -> None:
    assert {name for name, _ in Sigmoid().named_parameters()} == {"log_scale", "bias"}
    assert not list(Sigmoid(learnable=False).parameters())
    assert set(Sigmoid(learnable=False).state_dict()) == {"log_scale", "bias"}
    assert (Sigmoid(temperature=0.05).scale.item(), Sigmoid(bias=-7).bias.item()) == (pytest.approx(20), -7)


def test_a_chunk_without_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="chunk is 0; expected a number of rows, at least 1, or null"):
        Sigmoid(chunk=0)
