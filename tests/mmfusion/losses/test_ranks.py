"""Every loss on 1, 2 and 4 ranks, as it is, in chunks, and with towers that run in micro-batches.

Averaged gradients of towers, scale and bias must be those of one process on the whole batch: with hard negatives or
extra queries, with duplicate queries and products across ranks, and with rows that are not valid, more of them on some
ranks.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from mmfusion.cached import in_micro_batches
from mmfusion.losses import Distillation, GradedInfoNCE, InfoNCE, Loss, Matryoshka, Sigmoid, identity_pairs, match_pairs
from tests.ddp import run_ranks
from tests.mmfusion.losses.test_gather import PRODUCTS, QUERIES, judge

ROWS = 16  # tuples of the whole batch
HARD = torch.tensor([22, 20, 31, 21, 40, 41, 26, 20, 42, 43, 44, 23, 22, 21, 45, 46])  # one for each tuple
EXTRA = torch.tensor([3, 99, 12, 5, 7, 44, 90, 6, 2, 12, 3, 1, 8, 99, 5, 6])  # a query beside each of the tuples
MORE = ("hard", "extra")  # which rows come beside the tuples'
VALID = {
    "all": torch.ones(ROWS, 3, dtype=torch.bool),
    "unequal": torch.arange(ROWS * 3).reshape(ROWS, 3) % 7 > torch.arange(ROWS)[:, None] // 4,
    "none on the last rank": (torch.arange(ROWS) < 4)[:, None].expand(ROWS, 3),
    "none": torch.zeros(ROWS, 3, dtype=torch.bool),
}
LOSSES: dict[str, tuple[type[Loss], dict[str, Any]]] = {
    "any": (InfoNCE, {}),
    "each": (InfoNCE, {"positives": "each"}),
    "one way": (InfoNCE, {"symmetric": False}),
    "unmasked": (InfoNCE, {"mask_false_negatives": False}),
    "cold": (InfoNCE, {"temperature": 0.01, "learnable": False}),
    "graded": (GradedInfoNCE, {"hard_up_to": 0.01}),
    "graded each": (GradedInfoNCE, {"positives": "each"}),
    "sigmoid": (Sigmoid, {"bias": -1.0}),
    "matryoshka": (Matryoshka, {"dims": [2, 5]}),
    "kl": (Distillation, {"label": "teacher", "kind": "kl"}),
    "margin": (Distillation, {"label": "teacher", "kind": "margin"}),
}
CHUNKED = ["any", "each", "one way", "unmasked", "graded", "sigmoid", "matryoshka"]
WAYS: dict[str, dict[str, Any]] = {"plain": {}, "chunked": {"chunk": 3}, "cached": {"micro_batch": 3}}


def made(name: str, chunk: int | None) -> Loss:
    kind, options = LOSSES[name]
    if name == "matryoshka":
        return Matryoshka(InfoNCE(chunk=chunk), **options)
    return kind(**options, **({"chunk": chunk} if name in CHUNKED else {}))


class Step(nn.Module):
    """Two towers and two terms of one kind: what DDP wraps."""

    def __init__(self, name: str, chunk: int | None = None, micro_batch: int | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.left, self.right = nn.Linear(6, 5), nn.Linear(7, 5)
        self.judged, self.identity = made(name, chunk), made(name, chunk)
        self.micro_batch = micro_batch
        self.double()
        for parameter in (*self.left.parameters(), *self.right.parameters()):
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(self, left: Tensor, right: Tensor, query: Tensor, product: Tensor, valid: Tensor) -> Tensor:
        """valid: of the query, the product and what comes beside each tuple, a product or a query; so are the rows."""
        query_rows = self.vectors(self.left, left)
        product_rows = self.vectors(self.right, right)
        valid_queries, valid_rows = (
            torch.cat([valid[:, side], valid[:, 2]])[: len(rows)] for side, rows in enumerate((query, product))
        )
        pairs = match_pairs(query, judge(product), len(product))
        loss = self.judged(query_rows, product_rows, pairs, valid_queries, valid_rows)
        if isinstance(self.identity, Distillation):  # of which a product with itself is one, and no two
            return loss
        photos = self.vectors(self.right, right.flip(1))
        other_valid = valid_rows.roll(len(valid)) if len(product) > len(valid) else valid[:, 2]
        return loss + 0.5 * self.identity(product_rows, photos, identity_pairs(product), valid_rows, other_valid)

    def vectors(self, tower: nn.Module, rows: Tensor) -> Tensor:
        def some(part: slice) -> Tensor:
            return normalize(tower(rows[part]).tanh(), dim=1)

        return in_micro_batches(some, len(rows), self.micro_batch, [tower])


def batch(valid: str, more: str, rank: int, world: int) -> list[Tensor]:
    """One rank's rows of the whole batch: its tuples', then their hard negatives or as many extra queries."""
    generator = torch.Generator().manual_seed(1)
    widths = (6, 7, 7, 6)
    left, right, hard, extra = (torch.randn(ROWS, w, dtype=torch.float64, generator=generator) for w in widths)
    own = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    if more == "hard":
        sides = [left[own], torch.cat([right[own], hard[own]]), QUERIES[own], torch.cat([PRODUCTS[own], HARD[own]])]
    else:
        sides = [torch.cat([left[own], extra[own]]), right[own], torch.cat([QUERIES[own], EXTRA[own]]), PRODUCTS[own]]
    return [*sides, VALID[valid][own]]


def step(model: nn.Module, rank: int, world: int, valid: str, more: str) -> Tensor:
    loss = model(*batch(valid, more, rank, world))
    loss.backward()
    return loss.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def _ddp_steps(rank: int, world: int, cases: list[tuple[str, str, str, str]]) -> list[dict[str, Tensor]]:
    results = []
    for name, way, valid, more in cases:
        model = Step(name, **WAYS[way])
        unused = name in ("kl", "margin")  # the second term's scale
        loss = step(DistributedDataParallel(model, find_unused_parameters=unused), rank, world, valid, more)
        results.append({"loss": loss, **gradients(model)})
    return results


CASES = {
    name: [
        (name, way, valid, more)
        for way in WAYS
        if way != "chunked" or name in CHUNKED
        for valid in VALID
        for more in MORE
    ]
    for name in LOSSES
}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_ddp_gives_the_loss_and_gradient_of_one_process(world: int, name: str) -> None:
    """The one process computes plainly, so that chunks and micro-batches are proven by the same comparison."""
    expected = {}
    for valid, more in itertools.product(VALID, MORE):
        model = Step(name)
        expected[valid, more] = {"loss": step(model, 0, 1, valid, more), **gradients(model)}
        if name not in ("kl", "margin"):
            moved = [bool(gradient.any()) for key, gradient in expected[valid, more].items() if key != "loss"]
            assert all(moved) == (valid != "none"), "every parameter has a gradient, unless nothing is valid"
    if world == 1:
        results = [
            [
                {"loss": step(m := Step(n, **WAYS[way]), 0, 1, valid, more), **gradients(m)}
                for n, way, valid, more in CASES[name]
            ]
        ]
    else:
        results = run_ranks(_ddp_steps, world, CASES[name])
    for case, *found in zip(CASES[name], *results, strict=True):
        whole = expected[case[2:]]
        torch.testing.assert_close(torch.stack([r["loss"] for r in found]).mean(), whole["loss"], rtol=1e-9, atol=1e-14)
        for result in found:
            assert result.keys() >= whole.keys(), case
            for key in whole.keys() - {"loss"}:
                torch.testing.assert_close(
                    result[key],
                    whole[key],
                    rtol=1e-8,
                    atol=1e-13,
                    msg=lambda text, case=case, key=key: f"{case} {key}: {text}",
                )
