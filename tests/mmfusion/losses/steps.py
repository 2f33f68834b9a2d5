"""A whole batch of 16 tuples with a hard negative each, its shares on 1, 2 or 4 ranks, and a step of two towers on it.

Queries and products occur several times, on different ranks too. Row i of the products is tuple i's, row 16 + i its
hard negative.
"""

import math
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from mmfusion.batch import Judged
from mmfusion.losses import Loss, Pairs, match_pairs
from tests.ddp import run_ranks

TUPLES = 16
QUERIES = torch.tensor([7, 3, 7, 90, 12, 7, 5, 3, 3, 1, 44, 5, 90, 2, 8, 12])
TUPLES_PRODUCTS = [20, 21, 22, 20, 23, 20, 24, 25, 26, 27, 22, 28, 29, 30, 31, 20]
HARD_NEGATIVES = [40, 22, 41, 31, 20, 42, 43, 26, 40, 21, 23, 44, 45, 41, 30, 46]
PRODUCTS = torch.tensor([*TUPLES_PRODUCTS, *HARD_NEGATIVES])
POSITIVES = {20: [7, 90, 12], 21: [3], 22: [44], 23: [12], 26: [3, 7], 31: [8], 24: [5], 25: [3], 27: [1], 28: [5]}
OTHERS = {20: {3: 0.1}, 22: {7: 0.1, 3: 0.01}, 26: {5: 0.1}, 31: {7: 0.1, 3: 0.01, 5: 0.2}, 40: {7: 0.01, 3: 0.1}}
GAINS = {(query, product): 1.0 for product, queries in POSITIVES.items() for query in queries} | {
    (query, product): gain for product, gains in OTHERS.items() for query, gain in gains.items()
}
SCORES = {  # a teacher's: of some products, for some queries; of query 2 for one product, of query 1 for none
    (query, product): 9 * math.sin(7 * query + product)
    for query in (3, 5, 7, 8, 12, 44, 90)
    for product in (20, 21, 22, 23, 26, 31, 40, 41)
    if (query + product) % 3
} | {(2, 45): 1.5}
TABLES = {"judged": GAINS, "teacher": SCORES}
VALID = {
    "all": (torch.ones(TUPLES, dtype=torch.bool), torch.ones(2 * TUPLES, dtype=torch.bool)),
    "some": (torch.arange(TUPLES) % 7 != 3, torch.arange(2 * TUPLES) % 5 != 2),
    "none of the last half's products": (torch.arange(TUPLES) != 1, torch.arange(2 * TUPLES) % TUPLES < 8),
    "none": (torch.zeros(TUPLES, dtype=torch.bool), torch.zeros(2 * TUPLES, dtype=torch.bool)),
}


def listed(products: Tensor, table: str) -> Judged:
    """What a table says of product rows; positive from 1, unless it holds a teacher's scores."""
    entries = TABLES[table].items()
    rows = [(row, q, g) for row, p in enumerate(products.tolist()) for (q, product), g in entries if product == p]
    row, query, gain = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
    grades = torch.tensor(gain, dtype=torch.float64)
    positive = (grades >= 1) & (table == "judged")
    return Judged(torch.tensor(row, dtype=torch.int64), torch.tensor(query, dtype=torch.int64), grades, positive)


def whole_pairs(table: str) -> Pairs:
    """All pairs of the whole batch in one process, 32 products for 16 queries."""
    return match_pairs(QUERIES, listed(PRODUCTS, table), products=2 * TUPLES)


def vectors(dtype: torch.dtype = torch.float64, dim: int = 5) -> tuple[Tensor, Tensor]:
    """Unit-norm rows of the whole batch."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(3 * TUPLES, dim, dtype=torch.float64, generator=generator)
    left, right = normalize(drawn, dim=1).to(dtype).split([TUPLES, 2 * TUPLES])
    return left.contiguous(), right.contiguous()


class Step(nn.Module):
    """Two towers and a loss: what DDP wraps."""

    def __init__(self, loss: Loss, table: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.left, self.right = nn.Linear(6, 5), nn.Linear(7, 5)
        self.loss, self.table = deepcopy(loss), table
        self.double()
        for parameter in (*self.left.parameters(), *self.right.parameters()):
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(self, left: Tensor, right: Tensor, query: Tensor, product: Tensor, *valid: Tensor) -> Tensor:
        pairs = match_pairs(query, listed(product, self.table), products=len(product))
        return self.loss(normalize(self.left(left), dim=1), normalize(self.right(right), dim=1), pairs, *valid)


def own_tuples(rank: int, world: int) -> slice:
    return slice(rank * TUPLES // world, (rank + 1) * TUPLES // world)


def own_products(rows: Tensor, rank: int, world: int) -> Tensor:
    """Of the whole batch's products the tuples' own and then their hard negatives, as a rank has them."""
    return torch.cat([part[own_tuples(rank, world)] for part in rows.split(TUPLES)])


def step(model: nn.Module, rank: int, world: int, valid: str) -> dict[str, Tensor]:
    """Loss and gradients of a rank's share."""
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(TUPLES, 6, dtype=torch.float64, generator=generator)
    right = torch.randn(2 * TUPLES, 7, dtype=torch.float64, generator=generator)
    left, query, left_valid = (rows[own_tuples(rank, world)] for rows in (left, QUERIES, VALID[valid][0]))
    right, product, right_valid = (own_products(rows, rank, world) for rows in (right, PRODUCTS, VALID[valid][1]))
    loss = model(left, right, query, product, left_valid, right_valid)
    loss.backward()
    found = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach()} | {name: gradient for name, gradient in found.items() if gradient is not None}


def ddp_step(rank: int, world: int, loss: Loss, table: str, valid: str) -> dict[str, Tensor]:
    return step(DistributedDataParallel(Step(loss, table)), rank, world, valid)


def check_ranks_equal_one_process(loss: Loss, table: str, world: int, valid: str) -> dict[str, Tensor]:
    """The mean of the ranks' losses and DDP's gradients are one process's, which are returned."""
    expected = step(Step(loss, table), 0, 1, valid)
    results = run_ranks(ddp_step, world, loss, table, valid)
    mean = torch.stack([result["loss"] for result in results]).mean()
    for result in results:
        torch.testing.assert_close({**result, "loss": mean}, expected, rtol=1e-9, atol=1e-13)
    return expected
