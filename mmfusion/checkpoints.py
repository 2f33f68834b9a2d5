"""`last` for going on, `best` for everything else: the best validation of the primary view in the last stage."""

from pathlib import Path
from typing import cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mmfusion.stages import StagedModule

BEST, LAST = "best.ckpt", "last.ckpt"


class LastCheckpoint(ModelCheckpoint):
    """checkpoints/last.ckpt, at each epoch's end or, when asked, every so many steps; and at the end of training."""

    def __init__(self, folder: Path, every_n_train_steps: int | None = None) -> None:
        super().__init__(
            dirpath=folder, filename="last", monitor=None, save_top_k=1, every_n_train_steps=every_n_train_steps,
            every_n_epochs=None if every_n_train_steps else 1, save_on_train_epoch_end=True,
            enable_version_counter=False,
        )  # fmt: skip

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._last_global_step_saved != trainer.global_step:
            trainer.save_checkpoint(Path(cast(str, self.dirpath)) / LAST)


class BestCheckpoint(ModelCheckpoint):
    """checkpoints/best.ckpt: highest `val/primary` among validations in the last stage.

    Earlier stages do not count: there the primary view may not be trained yet, and a lucky early value would win.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(
            dirpath=folder,
            filename="best",
            monitor="val/primary",
            mode="max",
            save_top_k=1,
            enable_version_counter=False,
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _in_last_stage(trainer, pl_module):
            super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _in_last_stage(trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)


def _in_last_stage(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether the weights at hand were last moved by the last stage."""
    plan = cast(StagedModule, pl_module).stage_plan
    return plan.index(max(trainer.global_step - 1, 0)) == len(plan.ends) - 1


def best_of(run: Path) -> Path:
    """The checkpoint that a run is evaluated with: best, or last where the last stage was never validated."""
    for name in (BEST, LAST):
        if (run / "checkpoints" / name).is_file():
            return run / "checkpoints" / name
    raise FileNotFoundError(f"{run} holds no checkpoint ({run}/checkpoints/{BEST} or {LAST}): has it trained an epoch?")
