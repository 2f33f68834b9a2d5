"""Reports a run's speed: to the loggers while it trains, at the end as a table and in speed.json."""

import contextlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from rich.console import Console

from mmfusion.retrieval.files import replaced
from mmfusion.speed.flops import Flops, compiled, peak
from mmfusion.speed.measured import Measured, measured
from mmfusion.speed.phases import Phased
from mmfusion.speed.table import speed_table
from mmfusion.speed.timeline import Mark
from mmfusion.stages import StagedModule

FILE = "speed.json"


class Speed(Phased):
    """Logs speed/... each time that Lightning logs: means over the steps since then and over ranks.

    A stage's first step, which makes ready what the others use, is left out, and so are validations and the writing of
    checkpoints. Where the device's peak is known, the operations of one step of each stage and epoch are counted; that
    step's time is left out too. A run that is resumed counts on.

    Args:
        run: the run's folder
    """

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.file = run / FILE
        self.stages: dict[str, Measured] = {}
        self.peak: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.stages = {}
        with contextlib.suppress(
            FileNotFoundError, ValueError, KeyError, TypeError, AttributeError
        ):  # damaged: not worth a run
            sums = json.loads(self.file.read_text(encoding="utf-8"))["sums"]
            self.stages = {name: Measured(**values) for name, values in sums.items()}
        device = trainer.strategy.root_device
        if device.type == "cuda" and not compiled(pl_module):
            self.peak = peak(torch.cuda.get_device_name(device), str(trainer.precision))
        self.stage: str | None = None
        self.step, self.samples = trainer.global_step, 0
        self.steps: list[tuple[list[Mark], int]] = []
        self.fresh = True  # the step at hand is the first of its stage
        self.flops, self.counted = 0.0, (-1, "")  # of a step, and in which epoch and stage that was found
        self.last = (-1, "")  # of the step before

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        name = cast(StagedModule, pl_module).stage_name
        if name != self.stage:
            self._flush(trainer, log=False)
            self.stage, self.fresh = name, True
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
        now = (trainer.current_epoch, name)
        if self.peak and not self.samples and self.last == now != self.counted:
            self.phases.flops = Flops()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.samples += len(batch)
        if trainer.global_step == self.step:  # gradients accumulate
            return
        assert self.stage is not None
        marks, flops = self.timeline.cut(), self.phases.flops
        self.last = (trainer.current_epoch, self.stage)
        if flops is not None:
            self.flops, self.counted, self.phases.flops = float(flops.total), self.last, None
        elif not self.fresh:
            self.steps.append((marks, self.samples))
        self.step, self.samples, self.fresh = trainer.global_step, 0, False
        if trainer._logger_connector.should_update_logs:
            self._flush(trainer, log=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush(trainer, log=False)
        self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush(trainer, log=False)
        self._write(trainer)
        if self.stages and trainer.is_global_zero:
            Console().print(speed_table(self._values(trainer)))
        super().on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.runs:
            with contextlib.suppress(OSError):  # a full disk has been told of by the exception at hand
                self._write(trainer)
        super().on_exception(trainer, pl_module, exception)

    def _flush(self, trainer: Trainer, log: bool) -> None:
        """Adds the steps since the last time to those of their stage; on every rank at once."""
        if not self.steps:
            return
        assert self.stage is not None
        found = measured(self.steps, self.flops, trainer.strategy.root_device)
        self.stages.setdefault(self.stage, Measured()).add(found)
        self.steps = []
        if log:
            values = {f"speed/{name}": value for name, value in found.values(self.peak).items()}
            for logger in trainer.loggers:  # LightningModule.log takes .4 ms a value
                logger.log_metrics(values, trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _values(self, trainer: Trainer) -> dict[str, dict[str, float]]:
        """Of Measured.values, and the minutes of an epoch, without its validation."""
        steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        found = {name: stage.values(self.peak) for name, stage in self.stages.items()}
        return {name: {**told, "epoch_minutes": told["step_ms"] * steps / 60_000} for name, told in found.items()}

    def _write(self, trainer: Trainer) -> None:
        if self.stages and trainer.is_global_zero:
            sums = {name: asdict(stage) for name, stage in self.stages.items()}
            with replaced(self.file) as beside:
                content = {"stages": self._values(trainer), "sums": sums}
                beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
