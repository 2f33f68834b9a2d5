import pytest
import torch
from torch import Tensor

from mmfusion.losses.ring import blocks, pass_on
from tests.ddp import run_ranks


def _blocks(rank: int, world: int) -> tuple[list[int], list[Tensor], Tensor]:
    seen = [(owner, block.clone()) for owner, block in blocks(torch.full((3, 2), 10.0 * rank))]
    return [owner for owner, _ in seen], [block for _, block in seen], pass_on(torch.tensor([float(rank)]))()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_each_rank_sees_the_blocks_of_all_its_own_first(world: int) -> None:
    for rank, (owners, seen, before) in enumerate(run_ranks(_blocks, world)):
        assert owners == [(rank - step) % world for step in range(world)]
        assert torch.equal(torch.stack(seen), 10.0 * torch.tensor(owners)[:, None, None].expand(-1, 3, 2))
        assert before.item() == (rank - 1) % world


def test_without_a_group_there_is_one_block() -> None:
    own = torch.randn(2, 3)
    assert [(rank, block is own) for rank, block in blocks(own)] == [(0, True)]
    assert pass_on(own)() is own


def _gradients_home(rank: int, world: int) -> Tensor:
    """What the backward pass of Sigmoid does: something is added to each block's share on the way."""
    found = None
    for owner, _ in blocks(torch.zeros(2)):
        share = torch.tensor([10.0**rank, 100.0 * owner])
        if found is not None:
            share += found()
        found = pass_on(share)
    assert found is not None
    return found()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_what_is_passed_on_after_each_block_comes_home(world: int) -> None:
    for rank, total in enumerate(run_ranks(_gradients_home, world)):
        assert total.tolist() == [sum(10.0**r for r in range(world)), 100.0 * rank * world]
