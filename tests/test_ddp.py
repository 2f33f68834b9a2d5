import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from mmfusion.losses.pairs import equal_pairs
from tests.ddp import RankError, run_ranks


def _sum(rank: int, world: int, base: torch.Tensor) -> dict:
    total = base + rank
    dist.all_reduce(total)
    return {"total": total, "rank": int(os.environ["LOCAL_RANK"]), "threads": torch.get_num_threads()}


def _raise_on_last(rank: int, world: int) -> None:
    if rank == world - 1:
        raise ValueError("the last rank's own error")
    dist.barrier()


def _hang_on_last(rank: int, world: int) -> None:
    if rank == world - 1:
        time.sleep(600)


def _die_on_last(rank: int, world: int) -> None:
    if rank == world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_return_their_results_in_order(world: int) -> None:
    results = run_ranks(_sum, world, torch.tensor([10.0, 20.0]))
    assert [result["rank"] for result in results] == list(range(world))
    assert all(result["threads"] == 1 for result in results)
    expected = world * torch.tensor([10.0, 20.0]) + sum(range(world))
    assert all(torch.equal(result["total"], expected) for result in results)


def test_an_exception_comes_with_the_traceback_of_its_rank() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 raised.*in _raise_on_last.*the last rank's own error"):
        run_ranks(_raise_on_last, 2)


def test_a_hang_is_killed_and_says_where() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)ranks \[1\] of 2 still ran after 3 s.*_hang_on_last"):
        run_ranks(_hang_on_last, 2, timeout=3)
    assert time.monotonic() - start < 10


def test_a_death_is_reported() -> None:
    with pytest.raises(RankError, match="rank 1 died with exit code -9"):
        run_ranks(_die_on_last, 2)


def test_ranks_see_the_environment_of_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMFUSION_TEST", "seen")
    assert run_ranks(_environment, 1, "MMFUSION_TEST") == ["seen"]


def _environment(rank: int, world: int, name: str) -> str:
    return os.environ[name]


def test_ranks_check_shapes_at_run_time() -> None:
    with pytest.raises(RankError, match="TypeCheckError"):
        run_ranks(_wrong_shape, 1)


def _wrong_shape(rank: int, world: int) -> torch.Tensor:
    return equal_pairs(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
