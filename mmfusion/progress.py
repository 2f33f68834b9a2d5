"""One progress bar for the whole run, named by its stage, with the time left; another for each pass over the corpus."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

INTERVAL_ON_TERMINAL, INTERVAL_IN_LOG = 0.5, 20.0


class RunProgress(ProgressBar):
    """Counts optimizer steps of the run, so that the time left is the run's and not the epoch's."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self.run_bar: tqdm | None = None
        self.pass_bar: tqdm | None = None

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def _bar(self, total: int | None, description: str, unit: str, leave: bool) -> tqdm:
        terminal = sys.stderr.isatty()
        return tqdm(
            total=total, desc=description, unit=unit, leave=leave, disable=not self.enabled, dynamic_ncols=terminal,
            mininterval=INTERVAL_ON_TERMINAL if terminal else INTERVAL_IN_LOG, file=sys.stderr,
        )  # fmt: skip

    @contextmanager
    def counting(self, description: str, total: int, unit: str) -> Iterator[tqdm]:
        """A bar for work that is not in batches; it goes when the work is done."""
        bar = self._bar(total, description, unit, leave=False)
        try:
            yield bar
        finally:
            bar.close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run_bar = self._bar(int(trainer.estimated_stepping_batches), "train", "step", leave=True)
        self.run_bar.update(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.run_bar is not None
        self.run_bar.set_description(f"stage {pl_module.stage_name}, epoch {trainer.current_epoch}", refresh=False)
        shown = {"loss": outputs["loss"], "val": trainer.callback_metrics.get("val/primary")}
        self.run_bar.set_postfix({k: f"{float(v):.3f}" for k, v in shown.items() if v is not None}, refresh=False)
        self.run_bar.update(trainer.global_step - self.run_bar.n)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.run_bar is not None:
            self.run_bar.close()

    def _start_pass(self, trainer: Trainer, description: str, batches: list[int | float] | int | float) -> None:
        counts = batches if isinstance(batches, list) else [batches]
        self.pass_bar = self._bar(int(sum(counts)), description, "batch", leave=False)

    def _end_pass(self) -> None:
        if self.pass_bar is not None:
            self.pass_bar.close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._start_pass(trainer, "validation: queries and corpus", trainer.num_val_batches)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if self.pass_bar is not None:
            self.pass_bar.update(1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_pass()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_pass(trainer, "evaluation: queries and corpus", trainer.num_test_batches)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if self.pass_bar is not None:
            self.pass_bar.update(1)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_pass()
