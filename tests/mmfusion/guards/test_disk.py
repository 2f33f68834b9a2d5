"""A disk without room for a checkpoint: said before and while it is written, and what was saved stays whole."""

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pyarrow.dataset  # noqa: F401  (reading a table imports it: now in the fork server, not in each process)
import pytest
import s3fs  # noqa: F401  (Lightning imports it when it saves)
import torch
from lightning import Callback

import mmfusion.encoders.timm_model  # noqa: F401  (and small_module)
from mmfusion.checkpoints import LAST, LastCheckpoint
from mmfusion.ema import UNAVERAGED
from mmfusion.guards import disk
from mmfusion.guards.disk import SPARE, RoomFirst, RoomyFiles, free_bytes, size_of
from tests.ddp import run_ranks
from tests.small_run import small_data, small_module, small_shards, small_trainer

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


class FullAfter(Callback):
    """Rank 0, which writes, finds 1,000 bytes free from step 3 on; rank 1's disk has room."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2 and trainer.is_global_zero:
            disk.shutil.disk_usage = lambda _: Usage(0, 0, 1000)  # type: ignore[assignment]


def filling(rank: int, world: int, shards: Path, folder: Path) -> str:
    found = shutil.disk_usage
    trainer = small_trainer(
        folder, FullAfter(), RoomFirst(folder), LastCheckpoint(folder, 1), steps=6, enable_checkpointing=True,
        devices=world, strategy="ddp", plugins=[RoomyFiles()],
    )  # fmt: skip
    try:
        with pytest.raises(ValueError, match="free, and the checkpoint of step 3 needs") as error:
            trainer.fit(small_module(), small_data(shards))
    finally:
        shutil.disk_usage = found
    return str(error.value)


def test_all_ranks_end_before_anything_is_written(shards, tmp_path):
    said = run_ranks(filling, 2, shards, tmp_path)
    assert said[0] == said[1]
    assert said[0].startswith(f"{tmp_path} has 0.0 MiB free")
    assert "RESUME=auto" in said[0]
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == 2
    assert not list(tmp_path.glob("*.partial"))


class FullInSave(Callback):
    """What is written beside last.ckpt goes to a device that is always full, from step 3 on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            (self.folder / f"{LAST}.partial").symlink_to("/dev/full")


def test_a_disk_that_fills_up_in_a_save_leaves_the_former_checkpoint(shards, tmp_path):
    trainer = small_trainer(
        tmp_path, FullInSave(tmp_path), RoomFirst(tmp_path), LastCheckpoint(tmp_path, 1), steps=6,
        enable_checkpointing=True, plugins=[RoomyFiles()],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"last.ckpt: No space left on device\. A checkpoint takes .* RESUME=auto"):
        trainer.fit(small_module(), small_data(shards))
    assert RoomyFiles().load_checkpoint(tmp_path / LAST)["global_step"] == 2
    assert not list(tmp_path.glob("*.partial"))


def test_other_trouble_with_files_is_not_called_a_full_disk(tmp_path):
    (tmp_path / "place").touch()
    with pytest.raises(FileExistsError):
        RoomyFiles().save_checkpoint({}, tmp_path / "place" / LAST)


def test_the_size_is_that_of_the_file(shards, tmp_path):
    found = {}

    class Notes(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            found[trainer.global_step] = size_of(checkpoint)

    trainer = small_trainer(tmp_path, Notes(), LastCheckpoint(tmp_path, 6), steps=6, enable_checkpointing=True)
    trainer.fit(small_module(), small_data(shards))
    assert found[6] <= os.path.getsize(tmp_path / LAST)
    whole = {"one": torch.zeros(1_000_000)}
    whole["again"], whole["part"] = whole["one"], whole["one"][:10]  # torch.save writes memory once, and all of it
    torch.save(whole, tmp_path / "large")
    assert size_of(whole) == 4_000_000
    assert os.path.getsize(tmp_path / "large") < SPARE * size_of(whole)


def test_averaged_weights_are_counted(shards, tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(disk, "size_of", lambda checkpoint: counted.append(set(checkpoint)) or 0)
    trainer = small_trainer(tmp_path, RoomFirst(tmp_path), LastCheckpoint(tmp_path), enable_checkpointing=True)
    trainer.fit(small_module(ema=0.9), small_data(shards))
    assert counted
    assert all({"optimizer_states", UNAVERAGED} <= keys for keys in counted)


def test_room_is_asked_for_where_the_folder_will_be(tmp_path):
    assert free_bytes(tmp_path / "not" / "yet") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)
