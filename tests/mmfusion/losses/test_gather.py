import pytest
import torch
from torch import Tensor

from mmfusion.batch import Judged
from mmfusion.losses import Pairs, identity_pairs, match_pairs
from mmfusion.losses.gather import gather_ragged, gather_rows, own_rows, share_of_mean
from tests.ddp import run_ranks

WORLDS = pytest.mark.parametrize("world", [1, 2, 4])
ROWS = 4  # per rank
QUERIES = torch.tensor([7, 3, 7, 90, 12, 7, 5, 3, 3, 1, 44, 5, 90, 2, 8, 12])  # of 4 ranks, with duplicates
PRODUCTS = torch.tensor([20, 21, 22, 20, 23, 20, 24, 25, 26, 27, 22, 28, 29, 30, 31, 20])
GAINS = {  # of (product, query): the products' train judgments, whether or not the query is in the batch
    20: {7: 1.0, 90: 0.1, 12: 1.0, 6: 1.0},
    21: {3: 1.0},
    22: {7: 0.1, 44: 1.0, 3: 0.01},
    23: {12: 1.0, 99: 0.1},
    26: {3: 1.0, 5: 0.1, 7: 1.0},
    31: {8: 1.0, 7: 0.1, 3: 0.1, 2: 0.1, 1: 0.1, 5: 0.1},
}


def judge(product_id: Tensor) -> Judged:
    listed = [(row, *entry) for row, p in enumerate(product_id.tolist()) for entry in GAINS.get(p, {}).items()]
    product, query, gain = (list(column) for column in zip(*listed, strict=True)) if listed else ([], [], [])
    grades = torch.tensor(gain, dtype=torch.float64)
    return Judged(torch.tensor(product, dtype=torch.int64), torch.tensor(query, dtype=torch.int64), grades, grades >= 1)


def slow_pairs(queries: Tensor, products: Tensor) -> tuple[set, set]:
    positive: set[tuple[int, int]] = set()
    ignored: set[tuple[int, int]] = set()
    for i, query in enumerate(queries.tolist()):
        for j, product in enumerate(products.tolist()):
            gain = GAINS.get(product, {}).get(query, 0)
            if gain:
                (positive if gain >= 1 else ignored).add((i, j))
    return positive, ignored


def as_set(pairs: Tensor) -> set[tuple[int, ...]]:
    listed = [tuple(pair) for pair in pairs.tolist()]
    assert len(set(listed)) == len(listed)
    return set(listed)


def _match(rank: int, world: int) -> tuple[Pairs, Pairs]:
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    return match_pairs(QUERIES[own], judge(PRODUCTS[own])), identity_pairs(PRODUCTS[own])


@WORLDS
def test_pairs_across_ranks_are_those_of_two_loops_over_the_whole_batch(world: int) -> None:
    results = run_ranks(_match, world)
    queries, products = QUERIES[: world * ROWS], PRODUCTS[: world * ROWS]
    positive, ignored = slow_pairs(queries, products)
    same = {(i, j) for i, p in enumerate(products) for j, q in enumerate(products) if p == q}
    assert len(positive) > 1
    assert len(ignored) > 1
    assert not positive & ignored
    for judged, identity in results:
        assert as_set(judged.positive) == positive
        assert as_set(judged.ignored) == ignored
        assert as_set(identity.positive) == same
        assert identity.ignored.shape == (0, 2)


def test_without_a_group_there_is_one_rank() -> None:
    rows = torch.randn(3, 2)
    assert gather_rows(rows) is rows
    assert torch.equal(gather_ragged(QUERIES[:, None]), QUERIES[:, None])
    assert own_rows(3) == range(3)
    assert share_of_mean(torch.tensor([1.0, 2.0]), 4).item() == 0.75
    pairs, identity = _match(0, 1)
    assert (as_set(pairs.positive), as_set(pairs.ignored)) == slow_pairs(QUERIES[:ROWS], PRODUCTS[:ROWS])
    assert as_set(identity.positive) == {(0, 0), (1, 1), (2, 2), (3, 3), (0, 3), (3, 0)}


def test_products_may_outnumber_queries() -> None:
    """Hard negatives add product rows: a rank's products are then counted on their own."""
    results = run_ranks(_match_more_products, 2)
    queries = QUERIES[[0, 1, 8, 9]]
    positive, ignored = slow_pairs(queries, PRODUCTS)
    assert all(as_set(pairs.positive) == positive and as_set(pairs.ignored) == ignored for pairs in results)


def _match_more_products(rank: int, world: int) -> Pairs:
    return match_pairs(QUERIES[8 * rank :][:2], judge(PRODUCTS[8 * rank :][:8]), products=8)


@pytest.mark.parametrize("lengths", [[3, 0], [0, 0], [1, 5], [2, 2]])
def test_ragged_rows_keep_their_order(lengths: list[int]) -> None:
    expected = [[rank, i] for rank, length in enumerate(lengths) for i in range(length)]
    assert [rows.tolist() for rows in run_ranks(_ragged, 2, lengths)] == [expected] * 2


def _ragged(rank: int, world: int, lengths: list[int]) -> Tensor:
    return gather_ragged(torch.tensor([[rank, i] for i in range(lengths[rank])], dtype=torch.int64).reshape(-1, 2))


@WORLDS
def test_gathered_gradient_is_the_sum_over_ranks(world: int) -> None:
    """With f = sum over ranks r of (r + 1) * weight . gathered, row i has gradient weight[i] * sum of (r + 1)."""
    results = run_ranks(_gradient, world)
    weight = torch.arange(world * 6, dtype=torch.float64).reshape(-1, 2)
    rows, gradients = (torch.cat(parts) for parts in zip(*[result[:2] for result in results], strict=True))
    assert all(torch.equal(gathered, rows) for _, _, gathered in results)
    assert torch.equal(gradients, weight * sum(range(1, world + 1)))


def _gradient(rank: int, world: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    rows = torch.randn(2, 3, generator=generator, dtype=torch.float64).T.requires_grad_()  # not contiguous
    gathered = gather_rows(rows)
    weight = torch.arange(world * 6, dtype=torch.float64).reshape(-1, 2)
    ((rank + 1) * weight * gathered).sum().backward()
    assert rows.grad is not None
    return rows.detach(), rows.grad, gathered.detach()
