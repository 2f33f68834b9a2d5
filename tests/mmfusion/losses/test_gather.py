import pytest
import torch
from torch import Tensor

from mmfusion.batch import Judged
from mmfusion.losses import Pairs, identity_pairs, match_pairs
from mmfusion.losses.gather import exchange_columns, gather_ragged, gather_rows, own_rows, share_of_mean
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


def slow_pairs(queries: Tensor, products: Tensor) -> dict[tuple[int, int], float]:
    return {
        (i, j): GAINS[product][query]
        for i, query in enumerate(queries.tolist())
        for j, product in enumerate(products.tolist())
        if query in GAINS.get(product, {})
    }


def as_dict(pairs: Pairs) -> dict[tuple[int, ...], float]:
    listed = {tuple(pair): gain for pair, gain in zip(pairs.rows.tolist(), pairs.gain.tolist(), strict=True)}
    assert len(listed) == len(pairs)
    assert torch.equal(pairs.positive, pairs.gain >= 1)
    return listed


def _match(rank: int, world: int) -> tuple[Pairs, Pairs]:
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    return match_pairs(QUERIES[own], judge(PRODUCTS[own])), identity_pairs(PRODUCTS[own])


@WORLDS
def test_pairs_across_ranks_are_those_of_two_loops_over_the_whole_batch(world: int) -> None:
    results = run_ranks(_match, world)
    queries, products = QUERIES[: world * ROWS], PRODUCTS[: world * ROWS]
    expected = slow_pairs(queries, products)
    same = {(i, j): 1.0 for i, p in enumerate(products) for j, q in enumerate(products) if p == q}
    assert {1.0, 0.1} <= set(expected.values())
    for judged, identity in results:
        assert as_dict(judged) == expected, "gains to the last bit"
        assert as_dict(identity) == same


def test_without_a_group_there_is_one_rank() -> None:
    rows = torch.randn(3, 2)
    assert gather_rows(rows) is rows
    assert torch.equal(gather_ragged(QUERIES[:, None]), QUERIES[:, None])
    assert own_rows(3) == range(3)
    assert share_of_mean(torch.tensor([1.0, 2.0]), 4).item() == 0.75
    assert share_of_mean(torch.tensor([0.0, 0.0]), torch.tensor(0.0)).item() == 0
    assert torch.equal(exchange_columns(rows[:, 0]), rows[:, 0][None])
    pairs, identity = _match(0, 1)
    assert as_dict(pairs) == slow_pairs(QUERIES[:ROWS], PRODUCTS[:ROWS])
    assert as_dict(identity).keys() == {(0, 0), (1, 1), (2, 2), (3, 3), (0, 3), (3, 0)}


def test_products_may_outnumber_queries() -> None:
    """Hard negatives add product rows: a rank's products are then counted on their own."""
    results = run_ranks(_match_more_products, 2)
    queries = QUERIES[[0, 1, 8, 9]]
    assert all(as_dict(pairs) == slow_pairs(queries, PRODUCTS) for pairs in results)


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


@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_gets_what_all_hold_of_its_columns_and_sends_gradients_back(world: int) -> None:
    """Rank r holds r * 100 + column; its gradient at another rank's column is what that rank weighs row r with."""
    for rank, (received, gradient) in enumerate(run_ranks(_exchanged, world)):
        columns = torch.arange(rank * 2, rank * 2 + 2)
        assert torch.equal(received, 100.0 * torch.arange(world)[:, None] + columns)
        owner = torch.arange(world * 2) // 2
        assert torch.equal(gradient, 10.0 * owner + rank)


def _exchanged(rank: int, world: int) -> tuple[Tensor, Tensor]:
    own = (100.0 * rank + torch.arange(world * 2)).requires_grad_()
    received = exchange_columns(own)
    (received * (10.0 * rank + torch.arange(world)[:, None])).sum().backward()
    assert own.grad is not None
    return received.detach(), own.grad


@pytest.mark.parametrize("lengths", [[3, 0], [1, 4]])
def test_gradients_of_ragged_rows_flow_back(lengths: list[int]) -> None:
    weight = torch.arange(sum(lengths), dtype=torch.float64)
    first, second = run_ranks(_ragged_gradient, 2, lengths)
    assert torch.equal(torch.cat([first, second]), 3 * weight)


def _ragged_gradient(rank: int, world: int, lengths: list[int]) -> Tensor:
    rows = torch.ones(lengths[rank], dtype=torch.float64, requires_grad=True)
    weight = torch.arange(sum(lengths), dtype=torch.float64)
    (gather_ragged(rows) * weight * (rank + 1)).sum().backward()
    assert rows.grad is not None
    return rows.grad
