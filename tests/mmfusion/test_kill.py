"""kill -9 of a real run at random moments: what goes on from last.ckpt ends as the straight run, bit for bit.

The runs are processes of the fork server in tests/ddp.py, with the project's own checkpoints, validation, dropout,
augmentation and modality dropout. Each leader of a process group takes its workers with it when it is killed.
"""

import json
import os
import random
import resource
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.dataset  # noqa: F401  (reading a table imports it: now in the fork server, not in each process)
import pytest
import s3fs  # noqa: F401  (so does Lightning when it saves)
import torch
from lightning import Callback

import mmfusion.encoders.timm_model  # noqa: F401  (and small_module)
from mmfusion.checkpoints import BEST, LAST, BestCheckpoint, LastCheckpoint
from tests.ddp import RankError, run_ranks
from tests.small_run import small_data, small_module, small_shards, small_trainer, three_stages

STEPS, EVERY = 30, 4  # an epoch has 3 steps; a checkpoint every EVERY
VALIDATED = [9, 18, 27, STEPS]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


class Diary(Callback):
    """A line per step and validation, in a file of its own per attempt and rank.

    doomed: the run waits at its end to be killed.
    """

    def __init__(self, folder: Path, attempt: int, rank: int, doomed: bool) -> None:
        self.path, self.doomed = folder / f"diary-{attempt}-{rank}", doomed

    def on_fit_start(self, trainer, pl_module):
        os.setsid()  # a process group, so that workers are killed too
        self.write(pid=os.getpid())

    def write(self, **line: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss, ids = outputs["loss"].item().hex(), batch.product.id.tolist()
        self.write(step=trainer.global_step, stage=pl_module.stage_name, loss=loss, ids=ids)

    def on_validation_end(self, trainer, pl_module):
        self.write(validated=trainer.global_step, primary=float(trainer.callback_metrics["val/primary"]).hex())

    def on_train_end(self, trainer, pl_module):
        while self.doomed:
            time.sleep(1)


class DieInSave(Callback):
    """The kernel kills the process when the checkpoint that is written after `step` has grown to `part` of its size."""

    def __init__(self, folder: Path, step: int, part: float) -> None:
        self.folder, self.step, self.part = folder, step, part

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            former = shutil.copy(self.folder / LAST, self.folder / "former.ckpt")
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(self.part * former.stat().st_size), -1))


def run(
    rank: int, world: int, shards: Path, folder: Path, attempt: int, workers: int, doomed: bool, *more: Callback
) -> None:
    """Starts a run in `folder`, or goes on from its last checkpoint."""
    module = small_module(dropout=0.1, augment="light", modality_dropout=0.3, stages=three_stages(8, 18))
    trainer = small_trainer(
        folder, Diary(folder, attempt, rank, doomed), *more, BestCheckpoint(folder), LastCheckpoint(folder, EVERY),
        steps=STEPS, enable_checkpointing=True, limit_val_batches=1.0, check_val_every_n_epoch=3, devices=world,
        strategy="ddp" if world > 1 else "auto",
    )  # fmt: skip
    last, data = folder / LAST, small_data(shards, workers=workers)
    trainer.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=True)


def attempts(folder: Path) -> int:
    return len(list(folder.glob("diary-*-0")))


def lines(folder: Path, attempt: int, rank: int = 0) -> list[dict[str, Any]]:
    path = folder / f"diary-{attempt}-{rank}"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def steps(folder: Path, attempt: int, rank: int = 0) -> list[dict[str, Any]]:
    return [line for line in lines(folder, attempt, rank) if "step" in line]


def kill(shards: Path, folder: Path, step: int, delay: float, workers: int = 0, world: int = 1) -> None:
    """Goes on until `step` is done, and kills all ranks and workers `delay` seconds later."""
    attempt = attempts(folder)

    def strike() -> None:
        while not any(line["step"] >= step for line in steps(folder, attempt)):
            time.sleep(0.002)
        time.sleep(delay)
        for rank in range(world):
            os.killpg(lines(folder, attempt, rank)[0]["pid"], signal.SIGKILL)

    killer = threading.Thread(target=strike, daemon=True)
    killer.start()
    with pytest.raises(RankError, match=r"rank \d died with exit code -9"):
        run_ranks(run, world, shards, folder, attempt, workers, True)
    killer.join()


def finish(shards: Path, folder: Path, workers: int = 0, world: int = 1) -> None:
    run_ranks(run, world, shards, folder, attempts(folder), workers, False)


@pytest.fixture(scope="module")
def straight(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    finish(shards, folder)
    return folder


def assert_equal(got: Any, expected: Any, where: str = "") -> None:
    """Bit for bit, tensors within dicts and lists too."""
    assert type(got) is type(expected), where
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), where
    if isinstance(expected, dict | list | tuple):
        keys = expected if isinstance(expected, dict) else range(len(expected))
        for key in keys:
            assert_equal(got[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected), where
    else:
        assert got == expected, where


def assert_same_end(folder: Path, straight: Path) -> None:
    """Weights, optimizer, best checkpoint, and the loss of each step as often as it was made."""
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
    for name in (LAST, BEST):
        got, expected = (torch.load(path / name, weights_only=True) for path in (folder, straight))
        assert_equal({part: got[part] for part in parts}, {part: expected[part] for part in parts}, name)
    said = [
        {json.dumps(line) for attempt in range(attempts(path)) for line in lines(path, attempt)[1:]}
        for path in (folder, straight)
    ]
    assert said[0] == said[1], "a step has another loss than in the straight run, or the second time"


def test_the_straight_run_is_worth_the_comparison(straight):
    every = steps(straight, 0)
    assert [line["step"] for line in every] == list(range(1, STEPS + 1))
    assert [line["stage"] for line in every] == ["adapt"] * 8 + ["align"] * 10 + ["fuse"] * 12
    assert [line["validated"] for line in lines(straight, 0) if "validated" in line] == VALIDATED
    assert len({line["loss"] for line in every}) == STEPS


def test_killed_at_random_moments_with_other_workers_each_time(shards, straight, tmp_path):
    rng, workers = random.Random(4), [0, 2, 1, 0, 3]
    for step, helpers in zip(sorted(rng.sample(range(2, STEPS), len(workers))), workers, strict=True):
        kill(shards, tmp_path, step, delay=rng.uniform(0, 0.1), workers=helpers)
    finish(shards, tmp_path, workers=2)
    assert attempts(tmp_path) == len(workers) + 1
    assert_same_end(tmp_path, straight)


@pytest.mark.parametrize("part", [pytest.param(0.01, marks=pytest.mark.slow), 0.99])
def test_killed_while_a_checkpoint_is_written(shards, straight, tmp_path, part):
    with pytest.raises(RankError, match=f"rank 0 died with exit code -{signal.SIGXFSZ:d}"):
        run_ranks(run, 1, shards, tmp_path, 0, 0, False, DieInSave(tmp_path, 3 * EVERY, part))
    assert steps(tmp_path, 0)[-1]["step"] == 3 * EVERY
    assert (tmp_path / LAST).read_bytes() == (tmp_path / "former.ckpt").read_bytes()
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == 2 * EVERY
    finish(shards, tmp_path)
    assert_same_end(tmp_path, straight)


@pytest.mark.parametrize("worlds", [(1, 2), pytest.param((1, 2, 4), marks=pytest.mark.slow)], ids=str)
def test_other_ranks_go_on_with_the_same_global_batches(shards, straight, tmp_path, worlds):
    for attempt, world in enumerate(worlds[:-1]):
        kill(shards, tmp_path, step=6 + 8 * attempt, delay=0.02, workers=attempt, world=world)
    finish(shards, tmp_path, world=worlds[-1])
    expected = {line["step"]: line["ids"] for line in steps(straight, 0)}
    made = []
    for attempt, world in enumerate(worlds):
        together = list(zip(*(steps(tmp_path, attempt, rank) for rank in range(world)), strict=False))
        for first, *others in together:
            assert {line["step"] for line in others} <= {first["step"]}
            assert [id for line in (first, *others) for id in line["ids"]] == expected[first["step"]]
        made.append([first["step"] for first, *_ in together])
    starts = [part[0] for part in made]
    assert starts[0] == 1, "the first from the start"
    assert starts == sorted(set(starts)), "each other from a checkpoint of the one before"
    assert {part[0] % EVERY for part in made} == {1}
    assert all(part == list(range(part[0], part[-1] + 1)) for part in made)
    assert made[-1][-1] == STEPS
