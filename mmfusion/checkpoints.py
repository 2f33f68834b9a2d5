"""`last` for going on, `best` for everything else: the best validation of the primary view in the last stage.

And on request `stage-<name>`, at the end of a stage, for other runs to branch off from.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mmfusion.stages import StagedModule

BEST, LAST = "best.ckpt", "last.ckpt"


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: whoever looks, or goes on after a crash, finds a whole one.

    Lightning writes to the system's folder of temporary files first, and where that is another disk copies over the
    former checkpoint, which a crash leaves in pieces.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f"{place.name}.partial")
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may keep the new name and lose the content
        partial.replace(place)
        folder = os.open(place.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # and this the new name
        finally:
            os.close(folder)


class LastCheckpoint(ModelCheckpoint):
    """checkpoints/last.ckpt, at each epoch's end or, when asked, every so many steps; and at the end of training.

    What is due at a step that a validation or the epoch's end follows is saved after these. Going on from before,
    Lightning 2.6 would leave out the validation (and `best` with it), and miscount the epochs from there on: of a run
    that was resumed twice an epoch came again.
    """

    def __init__(self, folder: Path, every_n_train_steps: int | None = None) -> None:
        super().__init__(
            dirpath=folder, filename="last", monitor=None, save_top_k=1, every_n_train_steps=every_n_train_steps,
            every_n_epochs=None if every_n_train_steps else 1, save_on_train_epoch_end=True,
            enable_version_counter=False,
        )  # fmt: skip
        self._due = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = self._every_n_train_steps
        if trainer.is_last_batch or _validates_next(trainer):
            self._due = every > 0 and trainer.global_step % every == 0
        else:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._due and not trainer.is_last_batch:
            self._save_now(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._due:
            self._save_now(trainer)
        super().on_train_epoch_end(trainer, pl_module)

    def _save_now(self, trainer: Trainer) -> None:
        self._due = False
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._last_global_step_saved != trainer.global_step:
            trainer.save_checkpoint(Path(cast(str, self.dirpath)) / LAST)


class StageCheckpoints(Checkpoint):
    """checkpoints/stage-<name>.ckpt after the last optimizer step of each stage in `names`, mid-epoch too.

    Saved when LastCheckpoint would save. To come before it among the callbacks: a run that goes on from a `last` past
    the stage's end has saved the stage then.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, names
        self._before = 0
        self._due: str | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        plan = cast(StagedModule, pl_module).stage_plan
        ended = dict(zip(plan.ends, plan.names, strict=True)).get(trainer.global_step)
        if ended in self.names and trainer.global_step > self._before:  # a batch that only accumulates makes no step
            self._due = ended
            if not (trainer.is_last_batch or _validates_next(trainer)):
                self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if self._due is not None:
            name, self._due = self._due, None
            trainer.save_checkpoint(self.folder / stage_file(name))


def stage_file(stage: str) -> str:
    """The name, among a run's checkpoints, of the one at the end of a stage."""
    return f"stage-{stage}.ckpt"


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


def _validates_next(trainer: Trainer) -> bool:
    """Whether a validation follows the step just done. A private call of Lightning 2.6, covered by test_kill.py."""
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def best_of(run: Path) -> Path:
    """The checkpoint that a run is evaluated with: best, or last where the last stage was never validated."""
    for name in (BEST, LAST):
        if (run / "checkpoints" / name).is_file():
            return run / "checkpoints" / name
    raise FileNotFoundError(f"{run} holds no checkpoint ({run}/checkpoints/{BEST} or {LAST}): has it trained an epoch?")
