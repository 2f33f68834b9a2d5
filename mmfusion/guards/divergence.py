"""Proof in between that all ranks hold the same weights; StageSwitch has it at stages' borders and validations."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mmfusion.ranks import check_ranks_agree


class RanksAgree(Callback):
    """Raises GuardError on all ranks where, after every `every` optimizer steps, what is trained differs in any bit."""

    def __init__(self, every: int) -> None:
        self.every, self._proved = every, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every == 0 and step != self._proved:  # a batch that only accumulates makes no step
            check_ranks_agree(pl_module, f"after step {step}", trained_only=True)
            self._proved = step
