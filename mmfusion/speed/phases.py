"""Lightning's training loop as parts of a timeline."""

from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import Profiler
from torch import Tensor

from mmfusion.speed import timeline as line
from mmfusion.speed.flops import Flops
from mmfusion.speed.timeline import Timeline


class Phases(Profiler):
    """Lightning tells its profiler of each action's start and end: those that are parts go onto the timeline.

    What lies in the optimizer's step, and neither in the forward nor in the backward pass, is the optimizer's: it
    clips gradients there too.
    """

    def __init__(self, timeline: Timeline, trainer: Trainer) -> None:
        super().__init__()
        strategy, module = type(trainer.strategy).__name__, type(trainer.lightning_module).__name__
        self.timeline = timeline
        self.flops: Flops | None = None  # what counts in this step
        self.parts = {
            "[_TrainingEpochLoop].train_dataloader_next": line.DATA,
            f"[Strategy]{strategy}.batch_to_device": line.DATA,
            f"[Strategy]{strategy}.training_step": line.FORWARD,
            f"[Strategy]{strategy}.backward": line.BACKWARD,
            f"[LightningModule]{module}.optimizer_step": line.OPTIMIZER,
            "save_checkpoint": line.PAUSE,
        }

    def start(self, action_name: str) -> None:
        part = self.parts.get(action_name)
        if part is None:
            return
        self.timeline.enter(part)
        if self.flops is not None and part in (line.FORWARD, line.BACKWARD):
            self.flops.backward = part == line.BACKWARD
            self.flops.__enter__()

    def stop(self, action_name: str) -> None:
        part = self.parts.get(action_name)
        if part is None:
            return
        if self.flops is not None and part in (line.FORWARD, line.BACKWARD):
            self.flops.__exit__(None, None, None)
        self.timeline.leave()


class Phased(Callback):
    """Keeps a timeline while it trains. To come first of the callbacks after StageSwitch.

    Communication is what ranks wait for: the losses' collectives, and of DDP's reduction of gradients that part which
    comes after the backward pass, where nothing is left for it to hide behind.
    """

    timeline: Timeline
    phases: Phases

    def __init__(self) -> None:
        self.runs = False

    def new_timeline(self, device: torch.device) -> Timeline:
        return Timeline(device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.timeline = self.new_timeline(trainer.strategy.root_device)
        self.phases = Phases(self.timeline, trainer)
        loop: Any = trainer  # Lightning sets its profiler by this name, which its types do not know
        self._before, loop.profiler = loop.profiler, self.phases
        line.run(self.timeline)
        self.runs = True

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if trainer.world_size > 1 and loss.requires_grad:
            loss.register_hook(self._wait_after_backward)

    def _wait_after_backward(self, gradient: Tensor) -> None:
        """Autograd calls back when its graph is done, in the order in which it was asked: us first, DDP last."""
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(lambda: self.timeline.enter(line.COMMUNICATION))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.timeline.part == line.COMMUNICATION:
            self.timeline.leave()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.runs:
            self.timeline.enter(line.PAUSE)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.runs:
            self.timeline.leave()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        if self.runs:
            self.runs = False
            line.run(None)
            loop: Any = trainer
            loop.profiler = self._before
