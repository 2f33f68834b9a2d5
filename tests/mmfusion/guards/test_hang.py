"""A run of two ranks in which one hangs: both end with their stacks and the exit code 70, and slow work is let be."""

import itertools
import json
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pyarrow.dataset  # noqa: F401  (reading a table imports it: now in the fork server, not in each process)
import pytest
from lightning import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy

import mmfusion.encoders.timm_model  # noqa: F401  (and small_module)
from mmfusion.checkpoints import BestCheckpoint
from mmfusion.guards import hang
from mmfusion.guards.hang import HUNG, HangWatch, Watch, main_frame, place, wait_longer_than
from mmfusion.guards.pulse import PULSE
from mmfusion.state import KeepState, read_state
from tests.ddp import RankError, run_ranks
from tests.small_run import small_data, small_module, small_shards, small_trainer

MINUTES = 0.05


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


class FromStepTwo(HangWatch):
    """The first steps may take their time, on a machine that is busy with other tests."""

    def setup(self, trainer, pl_module, stage):
        pass

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            super().setup(trainer, pl_module, "fit")


class Stuck(Callback):
    """Never gives its batch away."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            stay_here()


def stay_here() -> None:
    while True:
        time.sleep(60)


def stderr_into(folder: Path, rank: int) -> None:
    os.dup2(os.open(folder / f"stderr-{rank}", os.O_CREAT | os.O_WRONLY), 2)


def one_hangs(rank: int, world: int, shards: Path, run: Path) -> None:
    stderr_into(run, rank)
    stuck = [Stuck()] if rank == 1 else []
    watch = FromStepTwo(run / "stacks", MINUTES)
    trainer = small_trainer(
        run, watch, *stuck, BestCheckpoint(run), KeepState(run), enable_checkpointing=True,
        devices=world, strategy="ddp", steps=6,
    )  # fmt: skip
    trainer.fit(small_module(), small_data(shards))


def test_every_rank_ends_and_leaves_its_stacks(shards, tmp_path):
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks" / "rank-1.txt").write_text("of an earlier life\n")
    with pytest.raises(RankError, match=f"died with exit code {HUNG}"):
        run_ranks(one_hangs, 2, shards, tmp_path, timeout=60)
    stacks = [(tmp_path / "stacks" / f"rank-{rank}.txt").read_text() for rank in range(2)]
    for rank, stack in enumerate(stacks):
        assert stack.startswith(f"rank {rank} of 2 (process ")
        assert "train, after step 2, waits in " in stack.splitlines()[0]
        assert "Current thread" in stack
        assert "(most recent call first)" in stack
    assert "in stay_here" in stacks[1]
    assert "in stay_here" not in stacks[0]
    said = "".join((tmp_path / f"stderr-{rank}").read_text() for rank in range(2))
    assert said.count("error: the run hangs: for 0.05 minutes no batch") == 1, "one rank tells of all"
    lines = {line.split()[1]: line for line in said.splitlines() if line.startswith("  rank")}
    assert "test_hang.py" in lines["1"]
    assert "stay_here" in lines["1"]
    assert "waits in torch/" in lines["0"]
    state = read_state(tmp_path)
    assert state is not None
    assert state.status == "failed"
    assert "hung: no work was finished for 0.05 minutes" in str(state.message)


def at_work(rank: int, world: int, folder: Path) -> list[str]:
    """Three times the limit, in pieces that finish."""
    watch = Watch(small_trainer(folder), folder / "stacks", 1.0)
    watch.start()
    for _ in range(30):
        time.sleep(0.1)
        PULSE.beat()
    return ["still here"]


def test_slow_work_that_goes_on_is_let_be(tmp_path):
    assert run_ranks(at_work, 1, tmp_path) == [["still here"]]
    assert not (tmp_path / "stacks").exists()


def test_batches_of_training_and_validation_give_signs_of_life(shards, tmp_path):
    counted = []

    class Count(Callback):
        def on_train_batch_end(self, *_):
            counted.append(PULSE.beats)

        on_validation_batch_end = on_train_batch_end

    watch = HangWatch(tmp_path / "stacks", 10)
    trainer = small_trainer(tmp_path, watch, Count(), steps=6, limit_val_batches=1.0, val_check_interval=3)
    trainer.fit(small_module(), small_data(shards, eval_batch_size=16))
    assert len(counted) > 6 + 2 * 4
    assert all(later > earlier for earlier, later in itertools.pairwise(counted))
    assert watch._watch is None, "it ends with the run"


def watched(rank: int, world: int, folder: Path, seconds: float, own: str) -> list[str]:
    """Sleeps under a watch of half a second, which nothing keeps quiet."""
    stderr_into(folder, rank)
    hang.LAST_RESORT = 1.0
    (folder / "pid").write_text(str(os.getpid()))
    trainer = small_trainer(folder)
    trainer.__class__ = type("OneOfThree", (Trainer,), {"world_size": 3})
    Watch(trainer, folder / own, 0.5).start()
    time.sleep(seconds)
    return ["still here"]


def test_ranks_that_wrote_nothing_are_named(tmp_path):
    with pytest.raises(RankError, match=f"exit code {HUNG}"):
        run_ranks(watched, 1, tmp_path, 30.0, "stacks")
    said = (tmp_path / "stderr-0").read_text()
    assert "rank 0 of 3" in said
    assert "setting up, after step 0, waits in tests/mmfusion/guards/test_hang.py" in said
    for other in (1, 2):
        assert f"  rank {other} wrote nothing: its process is gone" in said


def test_a_folder_that_cannot_be_written_does_not_keep_it_from_ending(tmp_path):
    (tmp_path / "stacks").touch()
    with pytest.raises(RankError, match=f"exit code {HUNG}"):
        run_ranks(watched, 1, tmp_path, 30.0, "stacks")
    assert "in watched" in (tmp_path / "stderr-0").read_text(), "the stacks are on the terminal"


def test_a_disk_that_hangs_does_not_keep_it_from_ending(tmp_path):
    (tmp_path / "stacks").mkdir()
    os.mkfifo(tmp_path / "stacks" / "rank-0.txt")  # opening it waits for a reader that never comes
    with pytest.raises(RankError, match=r"exit code 1$"):
        run_ranks(watched, 1, tmp_path, 30.0, "stacks")
    assert "in watched" in (tmp_path / "stderr-0").read_text()


def test_a_process_that_was_suspended_does_not_hang(tmp_path):
    def suspend() -> None:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.005)
        pid = int((tmp_path / "pid").read_text())
        os.kill(pid, signal.SIGSTOP)
        time.sleep(2)
        os.kill(pid, signal.SIGCONT)

    suspending = threading.Thread(target=suspend, daemon=True)
    suspending.start()
    assert run_ranks(watched, 1, tmp_path, 0.3, "stacks") == [["still here"]]
    suspending.join()


def test_the_watch_ends_with_a_run_that_fails(tmp_path):
    watch = HangWatch(tmp_path, 10)
    trainer = small_trainer(tmp_path)
    watch.setup(trainer, small_module(), "fit")
    thread = watch._watch
    assert thread is not None
    assert thread.is_alive()
    watch.on_exception(trainer, small_module(), ValueError("a mistake"))
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_searches_and_builds_give_signs_of_life(shards, tmp_path):
    import torch

    from mmfusion.retrieval.baselines import BM25
    from mmfusion.retrieval.topk import search, tie_ranks

    before = PULSE.beats
    search(torch.eye(4), torch.eye(4), torch.arange(4), tie_ranks(list("abcd")), 2, chunk=1)
    assert PULSE.beats == before + 4
    BM25(["red shoe", "blue"]).search(["red"], tie_ranks(["a", "b"]), 1)
    assert PULSE.beats == before + 5


def test_a_collective_waits_longer_than_the_watch_unless_told_how_long():
    for given, minutes, expected in [({}, 30, 40), ({}, 5, 30), ({"timeout": timedelta(minutes=3)}, 30, 3)]:
        strategy = DDPStrategy(**cast(Any, given))
        wait_longer_than(minutes, strategy)
        assert strategy._timeout == timedelta(minutes=expected)


def test_a_place_is_the_innermost_and_the_innermost_of_our_own():
    assert place(main_frame()).startswith("mmfusion/guards/hang.py:")
    found = []
    json.loads("[1]", object_hook=None, parse_int=lambda text: found.append(place(main_frame())) or int(text))
    assert "test_a_place_is" not in found[0].partition(", called from ")[2], "tests are not our own code"
