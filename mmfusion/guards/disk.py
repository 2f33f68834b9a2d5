"""Room for checkpoints: asked for before one is written, and told of where the disk is full all the same."""

import errno
import shutil
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mmfusion.checkpoints import WholeFiles

SPARE = 1.2  # of a checkpoint's tensors: its other content, and what others write meanwhile
FULL = (errno.ENOSPC, errno.EDQUOT)
WHAT_TO_DO = "Make room there, then go on from the checkpoint before with RESUME=auto"


class RoomFirst(Checkpoint):
    """Raises ValueError on all ranks, before anything is written, where `folder` has no room for a checkpoint.

    A checkpoint's callback by its base, for those come last: what others add, such as averaged weights, is counted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        found = (free_bytes(self.folder), int(SPARE * size_of(checkpoint))) if trainer.is_global_zero else (0, 0)
        free, needed = trainer.strategy.broadcast(found)  # rank 0 writes
        if free < needed:
            raise ValueError(
                f"{self.folder} has {_told(free)} free, and the checkpoint of step {trainer.global_step} needs "
                f"{_told(needed)} beside the one before, which stays whole. {WHAT_TO_DO}"
            )


class RoomyFiles(WholeFiles):
    """WholeFiles that says what to do where the disk, or the user's share of it, is full in the middle of a save."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        try:
            super().save_checkpoint(checkpoint, path, storage_options)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise ValueError(
                f"{path}: {error.strerror}. A checkpoint takes {_told(size_of(checkpoint))}, and "
                f"{_told(free_bytes(Path(path).parent))} are free; what was saved before is whole. {WHAT_TO_DO}"
            ) from error


def size_of(checkpoint: dict[str, Any]) -> int:
    """Bytes of its tensors as torch.save writes them: memory that several share, once and whole."""
    tensors = [leaf for leaf in tree_leaves(checkpoint) if isinstance(leaf, Tensor)]
    storages = {(tensor.device, tensor.untyped_storage().data_ptr()): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def free_bytes(folder: Path) -> int:
    """That this user may write where `folder` is, or is going to be."""
    return shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free


def _told(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
