"""A run that has become slow says so once a stage, with what it waits for: data or the computation."""

import logging
import time
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mmfusion.losses.gather import gather_rows
from mmfusion.stages import StagedModule

WINDOW = 20  # batches
log = logging.getLogger("lightning.pytorch")  # on the terminal, as what Lightning says itself


@dataclass
class Course:
    """Medians of one rank, in ms a batch: now and before, and the part of each that was spent waiting for data."""

    now: float
    before: float
    data_now: float
    data_before: float

    @property
    def waits(self) -> bool:
        """Whether most of the slowdown is waiting for data."""
        return self.data_now - self.data_before > (self.now - self.before) / 2


class SlowdownWarning(Callback):
    """Warns, once a stage, when the last batches take `slower` times as long as the stage's did before, at the median.

    Every WINDOW batches the ranks exchange four numbers, so that the one that all the others wait for is named. What
    lies between epochs, and validations, is no batch's time.
    """

    def __init__(self, slower: float) -> None:
        self.slower = slower
        self._stage: str | None = None

    def _begin(self, stage: str) -> None:
        self._stage, self._warned = stage, False
        self._batches: list[tuple[float, float]] = []  # seconds, and those of them that data took, since the last look
        self._looks: list[tuple[float, float]] = []  # medians of WINDOW batches each

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = time.perf_counter()  # a run that goes on within an epoch starts none

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stage = cast(StagedModule, pl_module).stage_name
        if stage != self._stage:
            self._begin(stage)
        now = time.perf_counter()
        self._batches.append((now - self._ended, self._began - self._ended))
        self._ended = now
        if len(self._batches) == WINDOW:
            self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        last = _medians(self._batches)
        self._batches = []
        if self._looks and not self._warned:
            before = _medians(self._looks)
            own = torch.tensor([[last[0], before[0], last[1], before[1]]], device=pl_module.device) * 1e3
            ranks = [Course(*row) for row in gather_rows(own).tolist()]
            self._warned = max(course.now / course.before for course in ranks) > self.slower
            if self._warned and trainer.is_global_zero:
                log.warning(told(ranks, f"stage {self._stage}, step {trainer.global_step}"))
        self._looks.append(last)


def _medians(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    first, second = zip(*pairs, strict=True)
    return median(first), median(second)


def told(ranks: list[Course], where: str) -> str:
    """The warning. A rank that waits for data makes the others wait for it: it counts before them."""
    rank, slowest = max(enumerate(ranks), key=lambda item: item[1].data_now - item[1].data_before)
    if slowest.waits:
        cause = (
            f"waits for its data: {slowest.data_now:.0f} ms of a batch, {slowest.data_before:.0f} before. Is the disk "
            "or network that holds the shards slow, or the processor busy with other work? More --data.workers may help"
        )
    else:
        rank, slowest = max(enumerate(ranks), key=lambda item: item[1].now / item[1].before)
        cause = (
            f"has its data in time ({slowest.data_now:.0f} ms): it is the computation, or the exchange between ranks. "
            "Is another process on the same device, is it throttled (nvidia-smi -q -d PERFORMANCE), is a link slow?"
        )
    name = f"Rank {rank} of {len(ranks)}" if len(ranks) > 1 else "It"
    return (
        f"{where}: the run has become slow: {slowest.now:.0f} ms a batch over the last {WINDOW}, "
        f"{slowest.before:.0f} before in this stage. {name} {cause}"
    )
