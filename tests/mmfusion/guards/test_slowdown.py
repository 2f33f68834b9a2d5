"""A run that becomes slow says so once a stage, and names the rank that makes the others wait."""

import logging
from pathlib import Path
from typing import Any

import pyarrow.dataset  # noqa: F401  (reading a table imports it: now in the fork server, not in each process)
import pytest
from lightning import Callback

import mmfusion.encoders.timm_model  # noqa: F401  (and small_module)
from datamodules.tuples import TupleDataModule
from mmfusion.guards import slowdown
from mmfusion.guards.slowdown import Course, SlowdownWarning, told
from mmfusion.stages import LossWeights, Stage, Until
from tests.ddp import run_ranks
from tests.small_run import BATCH, small_module, small_shards, small_trainer

WINDOW, FROM = 4, 13  # batches; slow from this step on


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


class Clock:
    """Stands still but for what the parts below add: what is measured does not depend on how busy the machine is."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Data(TupleDataModule):
    """Takes 10 ms a batch, and `slow` on the last rank from step FROM on."""

    def __init__(self, shards: Path, clock: Clock, slow: float) -> None:
        super().__init__(path=str(shards), batch_size=BATCH, image_size=32, streams=4)
        self.clock, self.slow = clock, slow

    def on_before_batch_transfer(self, batch, dataloader_idx):
        rank = self.trainer.global_rank == self.trainer.world_size - 1
        self.clock.now += self.slow if rank and self.trainer.global_step >= FROM else 0.01
        return batch


class Step(Callback):
    """Takes 90 ms, and `slow` from step FROM on; a validation takes a minute."""

    def __init__(self, clock: Clock, slow: float) -> None:
        self.clock, self.slow = clock, slow

    def on_before_backward(self, trainer, pl_module, loss):
        self.clock.now += self.slow if trainer.global_step >= FROM else 0.09

    def on_validation_start(self, trainer, pl_module):
        self.clock.now += 60


def fitted(
    rank: int, world: int, shards: Path, folder: Path, data: float, step: float, ends: int = 2, **options: Any
) -> list[str]:
    """What is said of a slowdown, where from step FROM on data and step take so many seconds."""
    said: list[str] = []
    clock, handler = Clock(), logging.Handler(level=logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    stages = {
        name: Stage(until, LossWeights(query_text=1.0))
        for name, until in {"first": Until(steps=ends), "second": Until(fraction=1.0)}.items()
    }
    chosen = {"devices": world, "strategy": "ddp" if world > 1 else "auto", "steps": FROM + 9, **options}
    slowdown.log.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slowdown, "WINDOW", WINDOW)
        patch.setattr(slowdown, "time", clock)
        trainer = small_trainer(folder, SlowdownWarning(3.0), Step(clock, step), **chosen)
        trainer.fit(small_module(stages=stages), Data(shards, clock, data))
    slowdown.log.removeHandler(handler)
    return [line for line in said if "become slow" in line]


def test_the_rank_that_waits_for_data_is_named_once(shards, tmp_path):
    first, other = run_ranks(fitted, 2, shards, tmp_path, 0.51, 0.09)
    assert other == []
    (said,) = first
    assert said.startswith(
        f"stage second, step {2 + 4 * WINDOW}: the run has become slow: 600 ms a batch over the last"
    )
    assert f"the last {WINDOW}, 100 before in this stage" in said
    assert "Rank 1 of 2 waits for its data: 510 ms of a batch, 10 before" in said
    assert "--data.workers" in said


def test_slow_computation_is_told_from_waiting_for_data(shards, tmp_path):
    (said,) = fitted(0, 1, shards, tmp_path, 0.01, 0.59)
    assert "It has its data in time (10 ms): it is the computation" in said


@pytest.mark.parametrize(
    ("ends", "options"),
    [(2, {"limit_val_batches": 1.0, "val_check_interval": 1}), (FROM, {})],
    ids=["validations", "a slower stage"],
)
def test_what_is_no_slowdown_is_not_told(shards, tmp_path, ends, options):
    slow = 0.28 if ends == 2 else 0.9  # a little below 3 times, or a stage of its own
    assert fitted(0, 1, shards, tmp_path, 0.01, slow, ends, **options) == []


def test_data_counts_before_the_wait_for_it():
    """Rank 0 waits in the exchange for rank 1, which waits for its data: in ms (now, before, data now, data before)."""
    said = told([Course(1000, 100, 10, 10), Course(1000, 100, 900, 20)], "here")
    assert said.startswith("here: the run has become slow: 1000 ms a batch over the last 20, 100 before in this stage")
    assert "Rank 1 of 2 waits for its data: 900 ms of a batch, 20 before" in said
    alike = told([Course(400, 100, 10, 10), Course(500, 100, 30, 20)], "here")
    assert "Rank 1 of 2 has its data in time (30 ms)" in alike
