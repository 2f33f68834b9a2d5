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
from mmfusion.sums import Summed, damage, read_sums, write_sums

BEST, LAST, BEFORE = "best.ckpt", "last.ckpt", "before.ckpt"  # BEFORE: the last but one


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: whoever looks, or goes on after a crash, finds a whole one.

    Lightning writes to the system's folder of temporary files first, and where that is another disk copies over the
    former checkpoint, which a crash leaves in pieces. SHA256SUMS tells, years later too, what is whole; the former
    `last` stays as `before`, if this process knows it to be whole.
    """

    def __init__(self) -> None:
        self._whole: set[Path] = set()  # what this process wrote, or found whole

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f"{place.name}.partial")
        try:
            with partial.open("wb") as file:
                summed = Summed(file)
                try:
                    torch.save(checkpoint, cast(Any, summed))
                except RuntimeError as error:
                    raise summed.error or error from None
                file.flush()
                os.fsync(file.fileno())  # else a power cut may keep the new name and lose the content
            self._replace(place, partial, summed.sum)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def _replace(self, place: Path, partial: Path, new: str) -> None:
        folder, former, sums = place.parent, place.with_name(BEFORE), read_sums(place.parent)
        after = {name: digests for name, digests in sums.items() if (folder / name).is_file()} | {place.name: {new}}
        keep = place.name == LAST in sums and place.resolve() in self._whole and place.is_file()
        if keep:
            after[BEFORE] = sums[LAST]
        write_sums(folder, {name: digests | sums.get(name, set()) for name, digests in after.items()})
        _sync(folder)
        if keep:
            _rename_over(place, former)
        os.replace(partial, place)
        _sync(folder)
        write_sums(folder, after)
        self._whole.add(place.resolve())

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Raises ValueError for a file that is damaged, and FileNotFoundError for none."""
        place = Path(path)
        if place.is_file() and (what := damage(place)):
            raise ValueError(f"{place} is damaged: {what}. {_what_helps(place)}")
        self._whole.add(place.resolve())
        return super().load_checkpoint(path, *args, **kwargs)


def _what_helps(place: Path) -> str:
    """Against a checkpoint that is damaged."""
    whole = [str(other) for other in sorted(place.parent.glob("*.ckpt")) if other != place and not damage(other)]
    if not whole:
        return f"No other checkpoint in {place.parent} is whole: train the run again"
    said = f"Whole are {', '.join(whole)}; "
    if place.name in (LAST, BEFORE):
        return said + "RESUME=auto goes on from the newest that is"
    if place.name == BEST:
        return said + f"move {BEST} away, and make eval and RESUME=auto take {LAST}, the weights of the last step"
    return said + f"{place.name} is made anew by training the run again alone"


def _rename_over(place: Path, former: Path) -> None:
    """`former` becomes what `place` is, which keeps its name too where the disk has links."""
    link = former.with_name(f"{former.name}.partial")
    link.unlink(missing_ok=True)
    try:
        os.link(place, link)
    except OSError:
        os.replace(place, former)
        return
    os.replace(link, former)
    link.unlink(missing_ok=True)  # it is left where both were the same file already


def _sync(folder: Path) -> None:
    """Makes names last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
        self._before = 0
        self._stepped = False  # whether the batch at hand made an optimizer step, and not only gradients

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """With max_steps Lightning 2.6 ends a finished epoch again, as the first thing after a resume. It counts that
        epoch twice then, and after some resumes max_epochs would end the run early: counted once here, again there."""
        if trainer.max_steps == -1:
            return
        for count in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
            if count["processed"] == count["started"] == count["completed"] + 1:
                count["processed"] -= 1

    @property
    def saved_step(self) -> int:
        """The optimizer step of the last checkpoint that this process saved; 0 before."""
        return self._last_global_step_saved

    def due_now(self) -> None:
        """Asks, on every rank, for a checkpoint as soon as one may be: after the optimizer step at hand or the next,
        and after the validation or epoch's end that follows that."""
        self._due = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every, step = self._every_n_train_steps, trainer.global_step
        self._stepped = step > self._before
        self._due |= self._stepped and every > 0 and step % every == 0
        if not (trainer.is_last_batch or _validates_next(trainer)):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_last_batch:
            self._save_if_due(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_if_due(trainer)
        super().on_train_epoch_end(trainer, pl_module)

    def _save_if_due(self, trainer: Trainer) -> None:
        if self._due and self._stepped:
            self._due = False
            if not self._should_skip_saving_checkpoint(trainer):
                self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.saved_step != trainer.global_step:
            self._save_checkpoint(trainer, str(Path(cast(str, self.dirpath)) / LAST))


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
    The run's last step is validated however seldom others are: the rates have come down there, and the weights are
    mostly the best.
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

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == cast(StagedModule, pl_module).stage_plan.ends[-1]:
            trainer.should_stop = True  # which Lightning validates before, in an epoch that is due
            if trainer.check_val_every_n_epoch is not None:
                trainer.check_val_every_n_epoch = 1
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

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
