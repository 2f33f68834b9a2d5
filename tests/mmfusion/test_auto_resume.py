"""RESUME=auto: which run and which checkpoint it takes, in each case; what it goes on with ends as the straight run."""

import csv
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import wandb
from lightning import Callback

from mmfusion.checkpoints import BEFORE, LAST, WholeFiles
from mmfusion.cli import main
from mmfusion.resume import DECIDED, start_of
from mmfusion.state import RunState, mark, read_state
from tests.ddp import RankError, run_ranks
from tests.small_run import small_shards

ROOT = Path(__file__).parents[2]
LAUNCHERS = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*LAUNCHERS, DECIDED, "MMFUSION_VERSION"):
        monkeypatch.setenv(name, "")  # which is put back, whatever the code sets
        monkeypatch.delenv(name)


def make_run(
    folder: Path, status: str | None = "stopped", ago: float = 300, steps: tuple[int, ...] = (1, 2), **more
) -> Path:
    """A run that was last heard of `ago` seconds ago; without state.json where the status is None."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    files, then = WholeFiles(), time.time() - ago
    for step in steps:
        files.save_checkpoint({"step": step}, folder / "checkpoints" / LAST)
    if status is not None:
        said = {"host": socket.gethostname(), "pid": 0, "job": None} | more
        said |= {"process": mark(said["pid"]) if said["host"] == socket.gethostname() else "there 1 1"}
        RunState(status, None, 2, 9, None, then, then, commit=None, message=None, **said).write(folder)
    for path in (folder / "config.yaml", *folder.glob("checkpoints/*")):
        os.utime(path, (then, then))
    return folder


def started(experiment: Path) -> tuple[str, str | None]:
    """Names of the run and of the checkpoint."""
    os.environ.pop(DECIDED, None)
    start = start_of(experiment, lambda: experiment / "new")
    assert start.checkpoint is None or start.checkpoint.parent == start.folder / "checkpoints"
    return start.folder.name, None if start.checkpoint is None else start.checkpoint.name


NEW = ("new", None)


def test_the_newest_that_is_not_done(tmp_path, caplog):
    assert started(tmp_path) == NEW
    assert f"no run in {tmp_path} is unfinished; a new one begins" in caplog.text
    make_run(tmp_path / "b", ago=500)
    make_run(tmp_path / "a", ago=400)
    make_run(tmp_path / "c", "done", ago=200)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "metrics.csv").touch()  # of a run that begins: its ranks have not met
    assert started(tmp_path) == ("a", LAST)
    make_run(tmp_path / "e", "failed", ago=150)
    assert started(tmp_path) == ("e", LAST)
    make_run(tmp_path / "f", "running", ago=130)
    assert started(tmp_path) == ("f", LAST), "lost"


def test_runs_of_a_version_before(tmp_path):
    make_run(tmp_path / "b", None, ago=500)
    assert started(tmp_path) == ("b", LAST)
    done = make_run(tmp_path / "c", None, ago=200)
    assert started(tmp_path) == ("c", LAST)
    (done / "results.json").write_text("{}")
    assert started(tmp_path) == ("b", LAST)
    (tmp_path / "b" / "checkpoints" / "SHA256SUMS").unlink()
    assert started(tmp_path) == ("b", LAST), "by its CRCs"


def test_the_newest_whole_checkpoint(tmp_path, caplog):
    run = make_run(tmp_path / "a")
    os.truncate(run / "checkpoints" / LAST, 200)
    assert started(tmp_path) == ("a", BEFORE)
    assert f"{run}/checkpoints/{LAST} is left out: its 200 bytes have the sha256" in caplog.text
    (run / "checkpoints" / LAST).unlink()
    assert started(tmp_path) == ("a", BEFORE)
    os.truncate(run / "checkpoints" / BEFORE, 200)
    assert started(tmp_path) == NEW
    assert f"{run} has no whole checkpoint; begins anew in {tmp_path / 'new'}" in caplog.text


def test_a_run_without_a_checkpoint_begins_anew_where_it_is_the_jobs_own(tmp_path, monkeypatch):
    make_run(tmp_path / "a", "failed", steps=(), job="7")
    assert started(tmp_path) == NEW
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert started(tmp_path) == ("a", None)


@pytest.mark.parametrize("variable", ["SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"])
@pytest.mark.parametrize("known", ["state", "name"])
def test_the_jobs_own_run_is_first(tmp_path, monkeypatch, variable, known):
    """By what it said of its job, or, where it died before that, by its folder."""
    monkeypatch.setenv(variable, "7")
    make_run(tmp_path / "newer", ago=200)
    assert started(tmp_path) == ("newer", LAST)
    make_run(tmp_path / "job-71-0", ago=250)
    if known == "state":
        make_run(tmp_path / "x", ago=300, job="7")
    else:
        make_run(tmp_path / "job-7-0", None, ago=300)
    assert started(tmp_path) == ("x" if known == "state" else "job-7-0", LAST)


def test_what_another_process_writes_is_refused(tmp_path, monkeypatch):
    make_run(tmp_path / "a", "running", ago=5, pid=os.getppid())
    with pytest.raises(ValueError, match=f"by process {os.getppid()} on {socket.gethostname()}, 5 s ago at step 2"):
        started(tmp_path)
    make_run(tmp_path / "b", "running", ago=3, host="node8", pid=12, job="6")
    with pytest.raises(ValueError, match="by process 12 on node8, job 6, 3 s ago"):
        started(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "6")
    assert started(tmp_path) == ("b", LAST), "our own, requeued on this machine"
    make_run(tmp_path / "c", "running", ago=1, pid=os.getppid(), job="6")
    with pytest.raises(ValueError, match=f"by process {os.getppid()}"):
        started(tmp_path)
    make_run(tmp_path / "d", "running", ago=0, pid=os.getpid(), job="5")
    monkeypatch.delenv("SLURM_JOB_ID")
    assert started(tmp_path) == ("d", LAST), "before this process had the number"


def test_a_job_that_is_started_again_when_all_is_done_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    make_run(tmp_path / "others")
    make_run(tmp_path / "own", "done", job="7", ago=100)
    assert started(tmp_path) == ("others", LAST), "a second command of the job"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(SystemExit) as end:
        started(tmp_path)
    assert end.value.code == 0


def test_ranks_that_are_started_by_this_one_take_its_decision(tmp_path):
    run = make_run(tmp_path / "a")
    for checkpoint in (LAST, None):
        first = start_of(tmp_path, lambda: tmp_path / "new")
        make_run(tmp_path / f"later-{checkpoint}", "done", ago=0)
        (run / "checkpoints" / LAST).unlink(missing_ok=True)
        (run / "checkpoints" / BEFORE).unlink(missing_ok=True)
        assert start_of(tmp_path, lambda: tmp_path / "other") == first
        assert (first.checkpoint and first.checkpoint.name) == checkpoint
        os.environ.pop(DECIDED)


# ---- the command -----------------------------------------------------------------------------------------------------

SMALL = [
    "--data.batch_size=16", "--data.streams=4", "--data.image_size=[32, 32]", "--trainer.max_steps=10",
    "--trainer.check_val_every_n_epoch=1", "--trainer.accelerator=cpu", "--checkpoint_steps=2",
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
]  # fmt: skip
PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


@pytest.fixture
def here(monkeypatch, tmp_path) -> Path:
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Die(Callback):
    """The run ends by an error, or all its ranks by SIGKILL, after a step or when it is evaluated (step 0)."""

    def __init__(self, step: int, kill: bool = False) -> None:
        self.step, self.kill = step, kill

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            self.die()

    def on_test_start(self, trainer, pl_module):
        if self.step == 0:
            self.die()

    def die(self):
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError(f"died at step {self.step}")


def dying(step: int, kill: bool = False) -> list[str]:
    name = f"{Die.__module__}.Die"
    return [f"--trainer.callbacks+={name}", f"--trainer.callbacks.step={step}", f"--trainer.callbacks.kill={kill}"]


def train(shards: Path, *args: str) -> None:
    for name in (DECIDED, "MMFUSION_VERSION"):
        os.environ.pop(name, None)
    sys.argv = ["mmfusion", "train", "--exp", "fusion_gated", "--data", str(shards), *SMALL, *args]
    main()


def end_of(run: Path) -> dict:
    checkpoint = torch.load(run / "checkpoints" / LAST, weights_only=True)
    return {part: checkpoint[part] for part in PARTS}


def same(got: object, expected: object) -> bool:
    if isinstance(expected, dict):
        return got.keys() == expected.keys() and all(same(got[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(got) == len(expected) and all(map(same, got, expected))
    return torch.equal(got, expected) if isinstance(expected, torch.Tensor) else got == expected


def validations(run: Path) -> list[tuple[str, str]]:
    """Step and value of each in metrics.csv."""
    with (run / "metrics.csv").open() as file:
        return [(row["step"], row["val/primary"]) for row in csv.DictReader(file) if row["val/primary"]]


@pytest.fixture
def argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


def test_interrupted_twice_and_gone_on_with_is_the_straight_run(here, shards, argv, monkeypatch, caplog):
    """Also past its training, and past a damaged checkpoint; in one folder, one W&B run, one metrics.csv."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(here))
    with pytest.raises(ValueError, match="died at step 7"):
        train(shards, "--resume=auto", *dying(7))
    wandb.finish()  # as the end of the process does
    (run,) = Path("runs/fusion_gated").iterdir()
    state = read_state(run)
    assert (state.status, state.step, state.message) == ("failed", 7, "died at step 7")
    os.truncate(run / "checkpoints" / LAST, 1000)
    with pytest.raises(ValueError, match="died at step 0"):
        train(shards, "--resume=auto", "--wandb.mode=disabled", *dying(0))
    assert f"{run}/checkpoints/{LAST} is left out" in caplog.text
    assert f"goes on from {run}/checkpoints/{BEFORE}" in caplog.text
    assert not (run / "results.json").exists()
    assert (read_state(run).status, read_state(run).step) == ("failed", 10)
    train(shards, "--resume=auto")
    assert list(Path("runs/fusion_gated").iterdir()) == [run]
    assert (read_state(run).status, read_state(run).step, read_state(run).stage) == ("done", 10, "fuse")
    train(shards, "--experiment=straight", "--wandb.mode=disabled")
    (straight,) = Path("runs/straight").iterdir()
    assert same(end_of(run), end_of(straight))
    got, expected = (json.loads((path / "results.json").read_text()) for path in (run, straight))
    assert got["test"] == expected["test"]
    parts = [path.name for path in run.glob("wandb/offline-run-*")]
    assert len(parts) == 2
    assert len({part.rpartition("-")[2] for part in parts}) == 1, "the first and the last have one id"
    assert [step for step, _ in validations(run)] == ["2", "5", "5", "8", "9"], "gone on with from step 4, appended"
    assert set(validations(run)) == set(validations(straight))


def rank(rank: int, world: int, shards: Path, *args: str) -> str:
    """The command on one of several ranks, of which the second decides late; "" or its error's text."""
    if rank:
        time.sleep(2)
    train(shards, "--wandb.mode=disabled", f"--trainer.devices={world}", "--trainer.strategy=ddp", *args)
    return ""


@pytest.mark.slow
def test_two_ranks_that_a_launcher_starts_agree_and_end_as_the_straight_run(here, shards, argv, monkeypatch):
    """Killed at once; each rank decides for itself, and rank 0 has begun to write when rank 1 does."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "9")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(rank, 2, shards, "--resume=auto", *dying(5, kill=True), timeout=300)
    run = Path("runs/fusion_gated/job-9")
    assert read_state(run).seen(time.time()) == "lost"
    assert run_ranks(rank, 2, shards, "--resume=auto", timeout=300) == ["", ""]
    assert list(Path("runs/fusion_gated").iterdir()) == [run]
    assert read_state(run).status == "done"
    run_ranks(rank, 2, shards, "--experiment=straight", timeout=300)
    assert same(end_of(run), end_of(Path("runs/straight/job-9")))
