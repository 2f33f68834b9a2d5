"""A run that its scheduler tells to go saves after the step at hand, on all ranks at once, and leaves."""

from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, distributed

from mmfusion.checkpoints import LastCheckpoint
from mmfusion.preemption import HEARD, NOTICE
from mmfusion.ranks import has_ranks
from mmfusion.stages import StagedModule


class SaveAndLeave(Callback):
    """Raises Preempted on all ranks once `last` holds the step at which they agreed that one of them was told to go.

    Each optimizer step they exchange one integer through the processors' memory, during the backward pass: no device
    waits for it. A signal in a validation counts at the next step. While a stage begins (its features may take hours),
    before training and after it nothing is lost, as a stage's end is always saved: there a signal counts at once.
    To come first among the callbacks.
    """

    def __init__(self, last: LastCheckpoint) -> None:
        self.last = last
        self._group: Any = None  # of the ranks
        self._said: Tensor | None = None
        self._work: Any = None  # what fills it
        self._agreed = 0  # on which signal, from 1 on
        self._stage: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning's own handlers send to the other ranks from within a signal, out of turn, and would requeue a job
        before it is saved; and its loop asks rank 0 before every batch, for which the device waits. Private names of
        Lightning 2.6, covered by tests/mmfusion/test_preemption.py."""
        trainer._signal_connector = _NoHandlers()  # type: ignore[assignment]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        NOTICE.children = getattr(trainer.strategy.launcher, "procs", ())
        if has_ranks() and self._group is None:
            waits = getattr(trainer.strategy, "_timeout", None)  # as long as for all else (see --guards.hang_minutes)
            self._group = distributed.new_group(backend="gloo", timeout=waits)
        self._stage = None
        self._leave_if_agreed("the run stopped before its next part")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step, plan = trainer.global_step, cast(StagedModule, pl_module).stage_plan
        if self._agreed:
            raise NOTICE.leave(f"the run stopped after step {step} of {plan.ends[-1]}")
        if (stage := plan.index(step)) != self._stage:
            self._stage = stage
            self._leave_if_agreed(f"the run stopped before stage {plan.names[stage]}")
            NOTICE.held = False

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        NOTICE.held = True
        if self._work is None:
            self._ask()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Where gradients of several batches are added up, once for all of these."""
        self._agreed = max(self._agreed, self._answer())
        ends = trainer.global_step + 1 in cast(StagedModule, pl_module).stage_plan.ends
        if self._agreed or ends:
            self.last.due_now()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        NOTICE.held = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        NOTICE.held = False

    def _leave_if_agreed(self, how: str) -> None:
        self._ask()
        if self._answer():
            raise NOTICE.leave(how)

    def _ask(self) -> None:
        heard = 0 if NOTICE.asked is None else 1 + HEARD.index(NOTICE.asked)
        self._said = torch.tensor(heard)
        if self._group is not None:
            self._work = distributed.all_reduce(self._said, distributed.ReduceOp.MAX, self._group, async_op=True)

    def _answer(self) -> int:
        if self._work is not None:
            self._work.wait()
            self._work = None
        agreed = int(self._said) if self._said is not None else 0
        if agreed:
            NOTICE.asked = HEARD[agreed - 1]
        return agreed


class _NoHandlers:
    """In place of Lightning's signal connector."""

    received_sigterm = False

    def register_signal_handlers(self) -> None: ...

    def teardown(self) -> None: ...
