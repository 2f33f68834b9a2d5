"""A scheduler's signals: what a run saves, on which ranks it ends, with which code, and that it goes on exactly."""

import os
import signal
import subprocess
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback

from mmfusion import preemption
from mmfusion.checkpoints import LAST, BestCheckpoint, LastCheckpoint
from mmfusion.preemption import NOTICE, Preempted
from mmfusion.save_and_leave import SaveAndLeave
from tests.ddp import run_ranks as run_ranks_for
from tests.small_run import small_data, small_module, small_shards, small_trainer, three_stages, weights

run_ranks = partial(run_ranks_for, timeout=600)  # also where other tests keep the processors busy
TERM, USR1 = signal.SIGTERM, signal.SIGUSR1
STEPS = 8  # stages end after 2, 5 and 8 steps, an epoch has 3


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


class Send(Callback):
    """Sends `number` to this process in the hook `hook` of step `step` (of the first, of hooks that are no step's)."""

    def __init__(self, hook: str, step: int, number: int = TERM, times: int = 1) -> None:
        self.step, self.left = step, times
        self.number = number
        self.seen: list[tuple[str, int]] = []
        setattr(self, hook, self.send)

    def send(self, trainer, pl_module, *args: Any) -> None:
        if trainer.global_step >= self.step and self.left:
            self.left -= 1
            os.kill(os.getpid(), self.number)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(("step", trainer.global_step))

    def on_validation_end(self, trainer, pl_module):
        self.seen.append(("validated", trainer.global_step))


def train(
    folder: Path,
    shards: Path,
    *more: Callback,
    workers: int = 0,
    steps: int = STEPS,
    tests: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Trains in `folder`, or goes on in it; what became of it, and the weights."""
    place = folder / "checkpoints"
    module = small_module(dropout=0.1, augment="light", modality_dropout=0.3)
    last = LastCheckpoint(place)
    trainer = small_trainer(
        folder,
        SaveAndLeave(last),
        *more,
        BestCheckpoint(place),
        last,
        enable_checkpointing=True,
        steps=steps,
        **options,
    )
    data = small_data(shards, workers=workers)
    said: dict[str, Any] = {"left": None, "code": None}
    try:
        with NOTICE.caught(folder):
            path = place / LAST if (place / LAST).exists() else None
            trainer.fit(module, data, ckpt_path=path, weights_only=True)
            if tests:
                trainer.test(module, data, verbose=False)
    except Preempted as error:
        said |= {"left": str(error), "code": error.code}
    saved = torch.load(place / LAST, weights_only=True)["global_step"] if (place / LAST).exists() else 0
    return said | {"weights": weights(module), "step": trainer.global_step, "saved": saved}


def children() -> list[int]:
    """Processes of this one, those included that have ended and that nobody has waited for."""
    task = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(child) for child in task.read_text().split()]


def cut(rank: int, world: int, shards: Path, folder: Path, on: dict[int, tuple], options: dict) -> tuple[dict, list]:
    """A run in which some ranks are sent a signal: `on` holds Send's arguments by rank."""
    sent = Send(*on.get(rank, ("on_fit_start", 10**9)))
    return train(folder, shards, sent, **options), sent.seen


def go_on(rank: int, world: int, shards: Path, folder: Path, options: dict) -> dict:
    return train(folder, shards, **options)


@pytest.fixture(scope="module")
def straight(shards, tmp_path_factory):
    def run(world: int, **options: Any) -> dict:
        key = (world, tuple(sorted(options.items())))
        if key not in made:
            made[key] = run_ranks(go_on, world, shards, tmp_path_factory.mktemp("straight"), ranked(world, options))[0]
        return made[key]

    made: dict[Any, dict] = {}
    return run


def ranked(world: int, options: dict) -> dict:
    return options | ({"devices": world, "strategy": "ddp"} if world > 1 else {})


def assert_ends_as(shards: Path, folder: Path, world: int, expected: dict, options: dict) -> None:
    for end in run_ranks(go_on, world, shards, folder, ranked(world, options)):
        assert end["left"] is None
        assert [
            name for name in end["weights"] if not torch.equal(end["weights"][name], expected["weights"][name])
        ] == []


@pytest.mark.parametrize(
    ("number", "hook", "step", "saved"),
    [
        (TERM, "on_train_batch_start", 3, 4),
        (USR1, "on_train_batch_end", 3, 4),
        (TERM, "on_before_optimizer_step", 5, 7),
    ],
)
def test_it_saves_and_goes_on_exactly(shards, tmp_path, straight, number, hook, step, saved):
    """The ranks ask each other from the backward pass on: what comes later counts at the next step."""
    ((said, _),) = run_ranks(cut, 1, shards, tmp_path, {0: (hook, step, number)}, {})
    assert said["left"] == f"{signal.Signals(number).name} came: the run stopped after step {saved} of {STEPS}"
    assert (said["code"], said["step"], said["saved"]) == (75, saved, saved)
    assert_ends_as(shards, tmp_path, 1, straight(1), {})


def test_two_ranks_leave_at_the_same_step_when_one_is_told(shards, tmp_path, straight):
    both = run_ranks(cut, 2, shards, tmp_path, {1: ("on_train_batch_end", 3)}, ranked(2, {}))
    assert [(said["step"], said["saved"], said["code"]) for said, _ in both] == [(4, 4, 75)] * 2
    assert {said["left"] for said, _ in both} == {f"SIGTERM came: the run stopped after step 4 of {STEPS}"}
    assert_ends_as(shards, tmp_path, 2, straight(2), {})


def test_ranks_that_hear_different_signals_agree_on_the_one_that_queues_again(shards, tmp_path):
    on = {0: ("on_train_batch_end", 3, TERM), 1: ("on_train_batch_end", 3, USR1)}
    both = run_ranks(cut, 2, shards, tmp_path, on, ranked(2, {}))
    assert {said["left"] for said, _ in both} == {f"SIGUSR1 came: the run stopped after step 4 of {STEPS}"}


def test_not_within_the_batches_whose_gradients_are_added_up(shards, tmp_path):
    options = {"accumulate_grad_batches": 2, "steps": 6}  # an epoch has 3 batches: 2 steps
    ((said, seen),) = run_ranks(cut, 1, shards, tmp_path, {0: ("on_train_batch_start", 3)}, options)
    assert seen == [("step", step) for step in (0, 1, 2, 2, 3, 4)], (
        "signalled in a batch that makes its epoch's last step"
    )
    assert (said["step"], said["saved"]) == (4, 4)


def test_in_a_validation_it_leaves_after_it(shards, tmp_path):
    options = {"limit_val_batches": 1.0, "check_val_every_n_epoch": 1}
    ((said, seen),) = run_ranks(cut, 1, shards, tmp_path, {0: ("on_validation_batch_start", 3)}, options)
    assert seen[-3:] == [("step", 3), ("validated", 3), ("step", 4)]
    assert (said["step"], said["saved"]) == (4, 4)


def test_in_the_last_validation_the_test_is_left_to_who_goes_on(shards, tmp_path):
    options = {"limit_val_batches": 1.0, "check_val_every_n_epoch": 1, "steps": 6, "tests": True}
    ((said, seen),) = run_ranks(cut, 1, shards, tmp_path, {0: ("on_validation_batch_start", 6)}, options)
    assert seen[-1] == ("validated", 6)
    assert said["left"] == "SIGTERM came: the run stopped before its next part"
    assert (said["code"], said["saved"]) == (75, 6)


@pytest.mark.parametrize(("hook", "saved"), [("on_fit_start", 0), ("on_test_batch_start", STEPS)])
def test_outside_training_it_leaves_at_once(shards, tmp_path, hook, saved):
    ((said, _),) = run_ranks(cut, 1, shards, tmp_path, {0: (hook, 0)}, {"tests": True})
    assert said["left"] == "SIGTERM came: the run stopped at once"
    assert (said["code"], said["saved"]) == (75, saved)


class InStageSwitch(Callback):
    """A signal while the second stage's features would be built, which can take longer than a scheduler waits."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            os.kill(os.getpid(), TERM)


def at_a_switch(rank: int, world: int, shards: Path, folder: Path) -> dict:
    return train(folder, shards, InStageSwitch())


def test_where_a_stage_begins_it_leaves_at_once_as_the_end_of_the_one_before_is_saved(shards, tmp_path, straight):
    (said,) = run_ranks(at_a_switch, 1, shards, tmp_path)
    assert said["left"] == "SIGTERM came: the run stopped at once"
    assert said["saved"] == three_stages()["adapt"].until.steps == 2
    assert_ends_as(shards, tmp_path, 1, straight(1), {})


class Twice(Callback):
    """A second signal, `apart` seconds after the first, both within one step."""

    def __init__(self, apart: float) -> None:
        self.apart = apart

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 3:
            os.kill(os.getpid(), USR1)
            time.sleep(self.apart)
            os.kill(os.getpid(), TERM)


def twice(rank: int, world: int, shards: Path, folder: Path, apart: float) -> dict:
    preemption.SAME = 0.2
    return train(folder, shards, Twice(apart))


@pytest.mark.parametrize(
    ("apart", "left", "saved"), [(0, f"after step 5 of {STEPS}", 5), (0.3, "at once", 3)], ids=["again", "second"]
)
def test_a_second_signal_ends_it_at_once_unless_it_is_the_first_again(shards, tmp_path, apart, left, saved):
    (said,) = run_ranks(twice, 1, shards, tmp_path, apart)
    assert (said["left"], said["saved"], said["code"]) == (f"SIGUSR1 came: the run stopped {left}", saved, 75)


class ToAll(Callback):
    """srun sends a signal to every process of the step: to those that read data too."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 4:
            self.told = children()
            for number in (USR1, TERM):  # by another process: torch's workers heed their parent in another way
                everyone = [str(process) for process in (*self.told, os.getpid())]
                subprocess.run(["kill", f"-{number}", *everyone], check=True)
            time.sleep(0.2)


def to_all(rank: int, world: int, shards: Path, folder: Path) -> tuple[dict, list[int]]:
    tell = ToAll()
    return train(folder, shards, tell, workers=2), tell.told


def test_workers_that_read_data_hear_it_and_read_on_and_none_is_left(shards, tmp_path):
    ((said, told),) = run_ranks(to_all, 1, shards, tmp_path)
    assert len(told) >= 2
    assert (said["left"], said["saved"]) == (f"SIGUSR1 came: the run stopped after step 5 of {STEPS}", 5)
    end = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in told):
        assert time.monotonic() < end, "a worker is left"
        time.sleep(0.1)


def last_words(number: int, run: Path, capsys, code: int = 75) -> str:
    def hear() -> None:
        with NOTICE.caught(run):
            os.kill(os.getpid(), number)
            time.sleep(1)

    with pytest.raises(Preempted) as left:
        hear()
    assert left.value.code == code
    for heard in preemption.HEARD:
        signal.signal(heard, signal.SIG_DFL)
    return capsys.readouterr().err.strip()


@pytest.fixture
def scontrol(tmp_path, monkeypatch) -> Path:
    """A command on the path that writes down its arguments."""
    place = tmp_path / "bin" / "scontrol"
    place.parent.mkdir()
    place.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n')
    place.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    return place


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "runs" / "fusion_gated" / "job-12"
    (folder / "checkpoints").mkdir(parents=True)
    return folder


def test_the_time_limit_queues_a_slurm_job_again(tmp_path, run, scontrol, capsys):
    assert last_words(USR1, run, capsys) == (
        "SIGUSR1 came: the run stopped at once. Nothing was saved yet. Job 12 is queued again and goes on by itself"
    )
    assert (tmp_path / "called").read_text() == "requeue 12\n"


def test_what_is_cancelled_is_not_queued_again(tmp_path, run, scontrol, capsys):
    (run / "checkpoints" / LAST).touch()
    assert last_words(TERM, run, capsys) == (
        f"SIGTERM came: the run stopped at once. {run}/checkpoints/last.ckpt holds what was saved. "
        "`make train EXP=fusion_gated RESUME=auto` goes on, with the other options as they were"
    )
    assert not (tmp_path / "called").exists()


def test_a_job_that_cannot_be_queued_again_says_so(run, scontrol, capsys):
    scontrol.write_text("#!/bin/sh\necho 'Requeue is disabled' >&2; exit 1\n")
    assert "`scontrol requeue 12` failed (Requeue is disabled): `make train EXP=fusion_gated RESUME=auto` goes on" in (
        last_words(USR1, run, capsys)
    )


def test_without_scontrol_the_jobs_script_is_asked_to_queue_it_again(run, scontrol, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(scontrol.parent.parent))
    assert "exit code 76 asks the job's script for it" in last_words(USR1, run, capsys, code=76)
    assert last_words(TERM, run, capsys).endswith("goes on, with the other options as they were")


def test_only_rank_0_queues_again_and_only_its_code_ends_a_slurm_step(tmp_path, run, scontrol, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "1")
    step_ends = threading.Timer(0.5, os.kill, (os.getpid(), TERM))  # by srun, as rank 0 has left
    step_ends.start()
    assert last_words(USR1, run, capsys, code=0) == ""
    step_ends.join()
    assert not (tmp_path / "called").exists()
    assert Preempted().code == 0, "of ranks that leave together"
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert Preempted().code == 75


@pytest.mark.parametrize(("number", "code"), [(USR1, 76), (TERM, 75)])
def test_a_rank_that_is_told_alone_ends_the_slurm_step(run, capsys, monkeypatch, number, code):
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setattr("mmfusion.preemption.ALONE", 0.2)
    said = last_words(number, run, capsys, code=code)
    assert said == f"{signal.Signals(number).name} came: the run stopped at once, on rank 1 alone"


def test_ranks_that_lightning_starts_in_a_shell_of_slurm_are_not_all_rank_0(run, scontrol, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")  # of the shell
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert last_words(USR1, run, capsys, code=0) == ""


def test_handlers_are_what_they_were_once_the_run_is_over(run):
    before = [signal.getsignal(number) for number in preemption.HEARD]
    with NOTICE.caught(run):
        assert signal.getsignal(TERM) == NOTICE._receive
    assert [signal.getsignal(number) or signal.SIG_DFL for number in preemption.HEARD] == before
    assert preemption.PARENT not in os.environ
