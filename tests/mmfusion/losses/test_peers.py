"""With unique positives our losses are those of the libraries that users come from, in value and in gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmfusion.losses import GradedInfoNCE, InfoNCE
from tests.mmfusion.losses.slow import positives_of

ROWS, DIM, SCALE = 24, 16, 20.0
OPTIONS: dict[str, Any] = {"temperature": 1 / SCALE, "learnable": False}


def drawn(rows: int = ROWS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, DIM, dtype=torch.float64, generator=generator) for n in (ROWS, rows)]


def assert_same(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], rows: int = ROWS) -> None:
    """Values, and gradients of vectors that are not normalised yet."""
    results = []
    for loss in (ours, theirs):
        sides = [side.requires_grad_() for side in drawn(rows)]
        value = loss(*(normalize(side, dim=1) for side in sides))
        results.append([value, *torch.autograd.grad(value, sides)])
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)  # our temperature is stored in fp32


def valid(rows: int) -> Tensor:
    return torch.ones(rows, dtype=torch.bool)


PAIRS = positives_of([[i, i] for i in range(ROWS)])


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("kind", [InfoNCE, GradedInfoNCE])
@pytest.mark.parametrize("positives", ["any", "each"])
def test_info_nce_is_open_clips(kind: Any, positives: str, chunk: int | None) -> None:
    clip = pytest.importorskip("open_clip").loss.ClipLoss()
    loss = kind(positives=positives, chunk=chunk, **OPTIONS)
    assert_same(
        lambda left, right: loss(left, right, PAIRS, valid(ROWS), valid(ROWS)),
        lambda left, right: clip(left, right, torch.tensor(SCALE, dtype=torch.float64)),
    )


@pytest.mark.parametrize("hard", [0, 1, 3])
def test_one_way_with_hard_negatives_is_sentence_transformers(hard: int) -> None:
    losses = pytest.importorskip("sentence_transformers.losses")
    theirs = losses.MultipleNegativesRankingLoss(model=None, scale=SCALE)
    loss = InfoNCE(symmetric=False, **OPTIONS)
    rows = ROWS * (1 + hard)
    assert_same(
        lambda left, right: loss(left, right, PAIRS, valid(ROWS), valid(rows)),
        lambda left, right: theirs.compute_loss_from_embeddings([left, *right.split(ROWS)], None),
        rows,
    )
