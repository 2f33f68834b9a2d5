"""state.json: it says what the run does while it does it; a run that died is seen as such; one process writes a run."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from lightning import Callback

import mmfusion.state as state_module
from mmfusion.checkpoints import BestCheckpoint, LastCheckpoint
from mmfusion.preemption import Preempted
from mmfusion.state import CLAIM, STATE, KeepState, RunState, mark, read_state, written_by_another
from tests.ddp import run_ranks
from tests.small_run import small_data, small_module, small_shards, small_trainer, three_stages

HERE = socket.gethostname()


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


def state(**changes) -> RunState:
    now = time.time()
    said = RunState("running", "adapt", 3, 8, None, now - 60, now, HERE, os.getpid(), None, None, None)
    said = replace(said, **changes)
    return said if "process" in changes else replace(said, process=mark(said.pid))


class Probe(Callback):
    """What state.json says at each batch, and after each validation; raises `error` at a step."""

    def __init__(self, run: Path, error: BaseException | None = None, at: int = 3) -> None:
        self.run, self.error, self.at = run, error, at
        self.said: list[tuple[int, RunState | None]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.said.append((trainer.global_step, read_state(self.run)))
        if trainer.global_step == self.at and self.error is not None:
            raise self.error


def fit(shards: Path, run: Path, *callbacks: Callback, since: Path | None = None, **options) -> None:
    module = small_module(stages=three_stages(2, 5))
    trainer = small_trainer(
        run, *callbacks, BestCheckpoint(run / "checkpoints"), LastCheckpoint(run / "checkpoints", 2), KeepState(run),
        enable_checkpointing=True, limit_val_batches=1.0, check_val_every_n_epoch=1, **options,
    )  # fmt: skip
    trainer.fit(module, small_data(shards), ckpt_path=since, weights_only=True)


def test_it_says_where_the_run_is(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    probe = Probe(tmp_path)
    fit(shards, tmp_path, probe)
    seen = {step: said for step, said in probe.said if said is not None}
    assert list(seen) == list(range(1, 9))
    assert [seen[step].stage for step in (1, 3, 6)] == ["adapt", "align", "fuse"], "from the stage's first batch on"
    assert {said.status for said in seen.values()} == {"running"}
    end = read_state(tmp_path)
    assert (end.step, end.steps, end.stage, end.host, end.pid, end.job) == (8, 8, "fuse", HERE, os.getpid(), "41")
    assert seen[6].best is None, "the validation after step 6 is the first in the last stage"
    assert seen[7].best is not None, "and is told with the best that it made"
    assert end.best is not None
    assert end.started < end.updated <= time.time()
    assert end.seen(time.time()) == "running", "until its results are written"


def test_it_beats_while_nothing_else_happens(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("mmfusion.state.BEAT", 0.01)
    updated = []

    class Idle(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            for _ in range(2):
                updated.append(read_state(tmp_path).updated)
                deadline = time.monotonic() + 10
                while read_state(tmp_path).updated == updated[-1] and time.monotonic() < deadline:
                    time.sleep(0.005)

    fit(shards, tmp_path, Idle(), steps=6)
    assert updated == sorted(set(updated))


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("the loss is not finite\nat step 3"), "failed", "the loss is not finite"),
        (AssertionError(), "failed", "AssertionError"),
        (KeyboardInterrupt(), "stopped", None),
        (SystemExit(3), "stopped", None),
        (Preempted(), "preempted", None),
    ],
    ids=repr,
)
def test_it_says_how_a_run_ended(shards, tmp_path, error, status, message):
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else type(error)):
        fit(shards, tmp_path, Probe(tmp_path, error))
    said = read_state(tmp_path)
    assert (said.status, said.message, said.step) == (status, message, 3)


def test_an_error_beside_the_trainer_is_told_and_done_is_the_last_word(shards, tmp_path):
    keep = KeepState(tmp_path)
    keep.end("done")
    assert not (tmp_path / STATE).exists(), "of a run that has not begun"
    trainer = small_trainer(tmp_path, BestCheckpoint(tmp_path), keep, enable_checkpointing=True)
    trainer.fit(small_module(), small_data(shards))
    with pytest.raises(OSError, match="disk"), keep.told():
        raise OSError("disk")
    assert (read_state(tmp_path).status, read_state(tmp_path).message) == ("failed", "disk")
    keep.end("done")
    assert read_state(tmp_path).status == "failed"


def test_a_zero_shot_test_before_training_is_no_beginning_of_the_run(tmp_path):
    """RESUME=auto would not find it, and a job that is started again would take another run."""
    keep = KeepState(tmp_path)
    trainer, module = small_trainer(tmp_path, BestCheckpoint(tmp_path), keep, enable_checkpointing=True), small_module()
    keep.on_test_start(trainer, module)
    assert not (tmp_path / STATE).exists()
    (tmp_path / "config.yaml").touch()
    keep.on_test_start(trainer, module)
    assert read_state(tmp_path).status == "running", "of a run that goes on to its evaluation"
    keep.end("done")


def test_a_start_that_is_refused_leaves_the_state_as_it_was(shards, tmp_path):
    fit(shards, tmp_path)
    before = (tmp_path / STATE).read_bytes()
    trainer = small_trainer(tmp_path, BestCheckpoint(tmp_path), KeepState(tmp_path), enable_checkpointing=True)
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match="seed"):
        trainer.fit(small_module(), small_data(shards, seed=3), ckpt_path=last, weights_only=True)
    assert (tmp_path / STATE).read_bytes() == before


@pytest.fixture
def other():
    """A process that lives."""
    process = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"], stdout=-1)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_run_that_died_is_seen_as_lost(other):
    now = time.time()
    living = state(pid=other.pid, updated=now)
    assert living.seen(now) == "running"
    assert living.seen(now + 119) == "running"
    assert living.seen(now + 121) == "lost", "silent"
    before = living.process.rpartition(" ")[0] + " 1"
    assert replace(living, process=before).seen(now) == "lost", "the number is another process's by now"
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    assert living.seen(time.time()) == "lost", "dead, though its parent has not asked"
    other.wait()
    assert living.seen(time.time()) == "lost"
    for boot, container in [("another", None), (None, "another")]:  # of the same name
        here = living.process.split()
        there = f"{boot or here[0]} {container or here[1]} {here[2]}"
        assert replace(living, process=there).seen(now) == "running", "who can tell?"
    assert replace(living, process=None).seen(now) == "running", "by a version before"
    assert replace(living, status="stopped").seen(now + 999) == "stopped"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", json.dumps({"status": "running"})])
def test_what_cannot_be_read_is_no_state(tmp_path, content):
    (tmp_path / STATE).write_text(content)
    assert read_state(tmp_path) is None
    assert read_state(tmp_path / "none") is None


def test_a_state_of_another_version_is_read(tmp_path):
    said = asdict(state())
    (tmp_path / STATE).write_text(json.dumps(said | {"more": 1}))
    assert read_state(tmp_path).step == 3
    del said["process"]
    (tmp_path / STATE).write_text(json.dumps(said))
    assert read_state(tmp_path).step == 3


def test_a_run_that_is_taken_and_not_trained_is_left_as_it_was(shards, tmp_path):
    state(status="failed", step=7, best=0.5).write(tmp_path)
    before, seen = (tmp_path / STATE).read_bytes(), []
    module = small_module()

    def refuse() -> None:
        seen.append(read_state(tmp_path))
        raise ValueError("features take more than their limit")

    module.on_fit_start = refuse
    trainer = small_trainer(tmp_path, BestCheckpoint(tmp_path), KeepState(tmp_path), enable_checkpointing=True)
    with pytest.raises(ValueError, match="features"):
        trainer.fit(module, small_data(shards))
    assert [(said.status, said.step, said.best, said.pid) for said in seen] == [("running", 7, 0.5, os.getpid())]
    assert (tmp_path / STATE).read_bytes() == before


def take(rank: int, world: int, run: Path) -> str:
    """All find the run free in the same moment, where nothing keeps them apart."""

    def slowly(run: Path) -> str | None:
        found = written_by_another(run)
        time.sleep(0.5)
        return found

    state_module.written_by_another = slowly
    keep, trainer = KeepState(run), small_trainer(run)
    torch.distributed.barrier()
    try:
        keep.on_fit_start(trainer, small_module())
    except ValueError as error:
        return str(error)
    return ""


def test_of_starts_in_the_same_moment_one_has_the_run(tmp_path):
    state(status="failed").write(tmp_path)
    told = run_ranks(take, 3, tmp_path)
    assert sorted("is being written: by process" in said for said in told) == [False, True, True], told
    assert told.count("") == 1
    assert not (tmp_path / CLAIM).exists()


def test_what_a_killed_start_left_does_not_stay_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("mmfusion.state.TAKING", 0.2)
    state(status="failed").write(tmp_path)
    (tmp_path / CLAIM).touch()
    keep = KeepState(tmp_path)
    keep.on_fit_start(small_trainer(tmp_path), small_module())
    assert read_state(tmp_path).status == "running"
    assert not (tmp_path / CLAIM).exists()
    keep.end("stopped")


def two_fits(rank: int, world: int, shards: Path, run: Path) -> tuple[str, int | None]:
    try:
        fit(shards, run, devices=world, strategy="ddp")
    except ValueError as error:
        return str(error), None
    return "", os.getpid()


def test_of_two_ranks_the_first_writes_and_all_are_refused(shards, tmp_path, other):
    (told, first), _ = run_ranks(two_fits, 2, shards, tmp_path, timeout=300)
    assert told == ""
    assert read_state(tmp_path).pid == first
    state(pid=other.pid, updated=time.time() + 600).write(tmp_path)  # however slow this machine is
    for told, _ in run_ranks(two_fits, 2, shards, tmp_path, timeout=300):
        assert f"is being written: by process {other.pid} on {HERE}, " in told
    assert read_state(tmp_path).pid == other.pid


def test_a_state_that_cannot_be_written_stops_nothing(shards, tmp_path, capfd):
    class Remove(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            shutil.rmtree(tmp_path / "run", ignore_errors=True)

    trainer = small_trainer(
        tmp_path, Remove(), BestCheckpoint(tmp_path), KeepState(tmp_path / "run"), enable_checkpointing=True
    )
    trainer.fit(small_module(), small_data(shards))
    assert trainer.global_step == 8
    assert capfd.readouterr().err.count("state.json cannot be written") == 1
