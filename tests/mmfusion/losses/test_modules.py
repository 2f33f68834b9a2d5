import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from mmfusion.losses import InfoNCE, Pairs, identity_pairs, match_pairs
from tests.ddp import run_ranks
from tests.mmfusion.losses.test_functional import slow_info_nce
from tests.mmfusion.losses.test_gather import PRODUCTS, QUERIES, judge

ROWS = 16  # of the whole batch
VALID = {
    "all": torch.ones(ROWS, 2, dtype=torch.bool),
    "unequal": torch.arange(ROWS * 2).reshape(ROWS, 2) % 7 > torch.arange(ROWS)[:, None] // 4,
    "none on the last rank": (torch.arange(ROWS) < 4)[:, None].expand(ROWS, 2),
    "none": torch.zeros(ROWS, 2, dtype=torch.bool),
}


class Step(nn.Module):
    """Two towers and a loss: what DDP wraps. Its terms use judged pairs and pairs of the same product."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.left, self.right = nn.Linear(6, 5), nn.Linear(7, 5)
        self.judged, self.identity = InfoNCE(**options), InfoNCE(**options)
        self.double()
        for parameter in (*self.left.parameters(), *self.right.parameters()):
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(self, left: Tensor, right: Tensor, query: Tensor, product: Tensor, valid: Tensor) -> Tensor:
        sides = normalize(self.left(left), dim=1), normalize(self.right(right), dim=1)
        judged = self.judged(*sides, match_pairs(query, judge(product)), *valid.unbind(1))
        return judged + 0.5 * self.identity(*sides, identity_pairs(product), *valid.unbind(1))


def batch(valid: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(ROWS, width, dtype=torch.float64, generator=generator) for width in (6, 7))
    return [left, right, QUERIES, PRODUCTS, VALID[valid]]


def step(model: nn.Module, rank: int, world: int, valid: str) -> Tensor:
    own = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    loss = model(*(column[own] for column in batch(valid)))
    loss.backward()
    return loss.detach()


def _ddp_step(rank: int, world: int, options: dict[str, Any], valid: str) -> dict[str, Tensor]:
    model = Step(options)
    loss = step(DistributedDataParallel(model), rank, world, valid)
    return {"loss": loss, **gradients(model)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


CASES: list[tuple[dict[str, Any], str]] = [
    ({}, "all"),
    ({}, "unequal"),
    ({"temperature": 0.01}, "unequal"),
    ({"positives": "each"}, "unequal"),
    ({"symmetric": False}, "unequal"),
    ({"mask_false_negatives": False}, "unequal"),
    ({"learnable": False}, "unequal"),
    ({}, "none on the last rank"),
    ({"positives": "each"}, "none"),
]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(("options", "valid"), CASES, ids=str)
def test_ddp_gives_the_loss_and_gradient_of_one_process(world: int, options: dict[str, Any], valid: str) -> None:
    model = Step(options)
    loss = step(model, 0, 1, valid)
    results = run_ranks(_ddp_step, world, options, valid)
    torch.testing.assert_close(torch.stack([r.pop("loss") for r in results]).mean(), loss, rtol=1e-9, atol=1e-14)
    expected = gradients(model)
    assert len(expected) == (4 if options.get("learnable") is False else 6)
    assert all(gradient.any() for gradient in expected.values()) == (valid != "none")
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"positives": "each"}, {"symmetric": False}])
def test_one_process_equals_the_slow_definition(options: dict[str, Any]) -> None:
    """Mean over the rows that are valid and have a valid positive, in each direction; then of the directions."""
    left, right, query, product, valid = batch("unequal")
    sides = normalize(left[:, :5], dim=1), normalize(right[:, :5], dim=1)
    pairs = match_pairs(query, judge(product))
    loss = InfoNCE(**options).double()(*sides, pairs, *valid.unbind(1)).item()
    kept = pairs.between(*valid.unbind(1))
    assert 0 < len(kept.positive) < len(pairs.positive)
    directions = []
    for rows, columns, own, usable in ((*sides, kept, valid[:, 1]), (*sides[::-1], kept.swapped(), valid[:, 0])):
        losses = slow_info_nce(rows, columns, own, 1 / 0.07, valid=usable, positives=options.get("positives", "any"))
        directions.append(math.fsum(losses) / len({row for row, _ in own.positive.tolist()}))
    expected = sum(directions) / 2 if options.get("symmetric", True) else directions[0]
    assert loss == pytest.approx(expected, rel=1e-7)  # the temperature is stored in fp32


def test_sides_can_be_swapped() -> None:
    left, right, query, product, valid = batch("unequal")
    left, right, pairs = (
        normalize(left[:, :5], dim=1),
        normalize(right[:, :5], dim=1),
        match_pairs(query, judge(product)),
    )
    loss = InfoNCE()
    there = loss(left, right, pairs, *valid.unbind(1))
    back = loss(right, left, pairs.swapped(), *valid.flip(1).unbind(1))
    torch.testing.assert_close(there, back)


def test_what_fills_a_row_that_is_not_valid_does_not_matter() -> None:
    left, right, query, product, valid = batch("unequal")
    left, right, pairs = left[:, :5].clone(), right[:, :5].clone(), match_pairs(query, judge(product))
    loss = InfoNCE()
    before = loss(left, right, pairs, *valid.unbind(1))
    left[~valid[:, 0]], right[~valid[:, 1]] = 9.0, -9.0
    assert torch.equal(loss(left, right, pairs, *valid.unbind(1)), before)


def test_unmasked_knows_the_tuples_alone() -> None:
    rows, valid = torch.eye(4), torch.ones(4, dtype=torch.bool)
    pairs = Pairs(torch.tensor([[0, 0], [1, 1], [2, 2], [3, 3], [0, 1]]), torch.tensor([[1, 0]]))
    own = Pairs(torch.arange(4)[:, None].expand(4, 2), pairs.ignored[:0])
    unmasked = InfoNCE(mask_false_negatives=False)(rows, rows, pairs, valid, valid)
    assert torch.equal(unmasked, InfoNCE()(rows, rows, own, valid, valid))
    assert not torch.equal(unmasked, InfoNCE()(rows, rows, pairs, valid, valid))


def test_the_scale_starts_at_the_temperature_and_is_saved_either_way() -> None:
    for learnable in (True, False):
        loss = InfoNCE(temperature=0.05, learnable=learnable)
        assert loss.scale.item() == pytest.approx(20)
        assert list(loss.state_dict()) == ["log_scale"]
        assert [name for name, _ in loss.named_parameters()] == (["log_scale"] if learnable else [])


def test_the_scale_stops_at_its_maximum_and_returns_from_it() -> None:
    rows, valid = torch.eye(4), torch.ones(4, dtype=torch.bool)
    none = torch.zeros(0, 2, dtype=torch.int64)
    right, wrong = (Pairs(torch.stack([torch.arange(4), torch.arange(4).roll(n)], 1), none) for n in (0, 1))
    loss = InfoNCE(temperature=0.12, max_scale=10)
    optimizer = torch.optim.SGD(loss.parameters(), lr=100.0)
    for pairs in (right, right, wrong):
        optimizer.zero_grad()
        loss(rows, rows, pairs, valid, valid).backward()
        assert loss.scale <= 10.00001
        if pairs is wrong:
            assert loss.scale.item() == pytest.approx(10)
        optimizer.step()
    assert loss.scale < 9


@pytest.mark.parametrize("options", [{"temperature": 0.005}, {"temperature": 0.0}, {"max_scale": -1.0}])
def test_a_temperature_beyond_the_maximum_is_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is at most max_scale"):
        InfoNCE(**options)


def test_bf16_towers_under_autocast_get_an_fp32_loss() -> None:
    left, right, query, product, valid = batch("all")
    left, right = normalize(left[:, :5], dim=1).bfloat16(), normalize(right[:, :5], dim=1).bfloat16()
    pairs = match_pairs(query, judge(product))
    exact = InfoNCE()(left.float(), right.float(), pairs, *valid.unbind(1))
    with torch.autocast("cpu", torch.bfloat16):
        loss = InfoNCE()(left, right, pairs, *valid.unbind(1))
    assert torch.equal(loss, exact)
