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


PAIRS = Pairs(torch.tensor([[0, 0], [0, 3], [1, 1], [2, 0]]), torch.tensor([[1, 2], [2, 3]]))


def test_between_keeps_pairs_of_two_true_rows() -> None:
    kept = PAIRS.between(torch.tensor([True, False, True]), torch.tensor([False, True, True, True]))
    assert (kept.positive.tolist(), kept.ignored.tolist()) == ([[0, 3]], [[2, 3]])


def test_of_rows_counts_from_the_first_row() -> None:
    own = PAIRS.of_rows(range(1, 3))
    assert (own.positive.tolist(), own.ignored.tolist()) == ([[0, 1], [1, 0]], [[0, 2], [1, 3]])


def test_swapped_and_diagonal() -> None:
    assert PAIRS.swapped().positive.tolist() == [[0, 0], [3, 0], [1, 1], [0, 2]]
    assert PAIRS.swapped().ignored.tolist() == [[2, 1], [3, 2]]
    assert PAIRS.diagonal().positive.tolist() == [[0, 0], [1, 1]]
    assert PAIRS.diagonal().ignored.shape == (0, 2)
