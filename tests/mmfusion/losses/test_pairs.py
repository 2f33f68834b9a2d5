import pytest
import torch

from mmfusion.losses.pairs import Pairs, equal_pairs


@pytest.mark.parametrize(("left", "right"), [(0, 0), (0, 5), (5, 0), (7, 4), (30, 40)])
def test_equal_pairs_is_the_join_of_two_loops(left: int, right: int) -> None:
    generator = torch.Generator().manual_seed(left)
    a = torch.randint(-3, 6, (left,), generator=generator)
    b = torch.randint(-3, 6, (right,), generator=generator)
    expected = [[i, j] for i in range(left) for j in range(right) if a[i] == b[j]]
    assert equal_pairs(a, b).tolist() == expected


ROWS = [[2, 0], [0, 0], [0, 3], [1, 1], [1, 2], [2, 3]]
GAIN = [1.0, 1.0, 2.0, 1.0, 0.1, 0.01]
PAIRS = Pairs(torch.tensor(ROWS), torch.tensor(GAIN), torch.tensor(GAIN) >= 1)


def told(pairs: Pairs) -> list[tuple[list[int], float, bool]]:
    gain = [round(value, 6) for value in pairs.gain.tolist()]
    return list(zip(pairs.rows.tolist(), gain, pairs.positive.tolist(), strict=True))


def test_between_keeps_pairs_of_two_true_rows() -> None:
    kept = PAIRS.between(torch.tensor([True, False, True]), torch.tensor([False, True, True, True]))
    assert told(kept) == [([0, 3], 2.0, True), ([2, 3], 0.01, False)]


def test_of_rows_counts_from_the_first_row() -> None:
    own = PAIRS.of_rows(range(1, 3))
    assert told(own) == [([1, 0], 1.0, True), ([0, 1], 1.0, True), ([0, 2], 0.1, False), ([1, 3], 0.01, False)]


def test_swapped_and_sorted() -> None:
    assert PAIRS.swapped().rows.tolist() == [[0, 2], [0, 0], [3, 0], [1, 1], [2, 1], [3, 2]]
    assert torch.equal(PAIRS.swapped().gain, PAIRS.gain)
    assert told(PAIRS.sorted()) == sorted(told(PAIRS))


def test_above_makes_negatives_of_what_is_worth_no_more() -> None:
    assert len(PAIRS.above(0.0)) == 6
    assert told(PAIRS.above(0.01)) == told(PAIRS)[:5]
    assert told(PAIRS.above(0.5)) == told(PAIRS)[:4]
    assert told(PAIRS.above(1.5)) == told(PAIRS)[:4], "a positive stays one"


def test_own_are_the_tuples_positives_of_every_rank() -> None:
    """Two ranks of 2 left and 3 right rows: row 0 with 0, 1 with 1, 2 with 3, 3 with 4."""
    every = torch.cartesian_prod(torch.arange(4), torch.arange(6))
    positive = torch.ones(len(every), dtype=torch.bool)
    pairs = Pairs(every, torch.ones(len(every)), positive)
    assert pairs.own(2, 3).rows.tolist() == [[0, 0], [1, 1], [2, 3], [3, 4]]
    positive[0] = False
    assert pairs.own(2, 3).rows.tolist() == [[1, 1], [2, 3], [3, 4]]
