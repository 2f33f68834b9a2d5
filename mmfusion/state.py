"""state.json: how far a run is, for those who look from outside. It is told by rank 0, at least every BEAT seconds."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from mmfusion.checkpoints import BestCheckpoint
from mmfusion.environment import commit

STATE = "state.json"
CLAIM = "state.json.claim"  # is there while a process takes a run
BEAT = 30.0  # seconds
LOST = 120.0  # seconds of silence after which a run that says that it runs does not
REACHED = ("stage", "step", "steps", "best")
TAKING = 10.0  # seconds that a process has for it; then it was killed over it
Status = Literal["running", "preempted", "stopped", "failed", "done"]


@dataclass(frozen=True)
class RunState:
    """What a run last said of itself.

    stage: None before the first. step: optimizer steps made, of `steps` (0 before training). best: the best validation
    in the last stage. started: when this process began to train; updated: when this was written; both in seconds since
    1970. host, pid: of rank 0. job: of the cluster. message: why it failed, in a line. process: rank 0's `mark`.
    """

    status: Status
    stage: str | None
    step: int
    steps: int
    best: float | None
    started: float
    updated: float
    host: str
    pid: int
    job: str | None
    commit: str | None
    message: str | None
    process: str | None = None

    @property
    def is_near(self) -> bool:
        """Whether this process would see the one that writes the run."""
        here, there = ((process or "").rpartition(" ")[0] for process in (mark(os.getpid()), self.process))
        return here == there != ""

    @property
    def is_own(self) -> bool:
        """Whether this process writes the run."""
        return (self.host, self.pid, self.process) == (socket.gethostname(), os.getpid(), mark(os.getpid()))

    def seen(self, now: float) -> str:
        """The status as one sees it: `lost` where a run that says that it runs is silent, or its process is gone."""
        if self.status != "running":
            return self.status
        gone = self.is_near and mark(self.pid) != self.process
        return "lost" if gone or now - self.updated > LOST else "running"

    def write(self, run: Path) -> None:
        """Beside its place, and renamed: whoever reads finds it whole. The folder has to be there."""
        partial = run / f"{STATE}.partial"
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        partial.replace(run / STATE)


def read_state(run: Path) -> RunState | None:
    """None where the run is of a version before, or the file cannot be read."""
    try:
        content = json.loads((run / STATE).read_text(encoding="utf-8"))
        return RunState(**{field.name: content[field.name] for field in fields(RunState) if field.name in content})
    except (OSError, ValueError, TypeError):
        return None


def own_job() -> str | None:
    """The cluster's name for what this process is part of; it stays when the job is requeued or its ranks restarted."""
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
    return None if job == "none" else job  # torchrun's where it was given none


def mark(pid: int) -> str | None:
    """What no other process ever has; None of one that has ended, and on systems without /proc.

    The machine's start and the container's list of processes (two may share a host's name, and number alike), and when
    it began, in ticks since the machine did.
    """
    try:
        boot, listed = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.stat("/proc/self/ns/pid").st_ino
        status, *_, began = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:20]
    except OSError:
        return None
    return None if status == "Z" else f"{boot} {listed} {began}"


class KeepState(Checkpoint):
    """Writes state.json while a run trains and is evaluated, until `end`: at changes and, by a thread, every BEAT.

    A checkpoint's callback by its base, for those come last: what it tells of a validation has the new best in it.
    A run that is there is taken before training begins, and left as it was where the start is refused after that.
    Raises ValueError, on all ranks, where another process writes it by then.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._state: RunState | None = None  # on rank 0
        self._former: RunState | None = None  # of a run that was taken, until training begins
        self._failed = False
        self._ended = threading.Event()
        self._one = threading.Lock()  # one thread writes at a time

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refusal = trainer.strategy.broadcast(self._take(trainer) if trainer.is_global_zero else None)
        if refusal is not None:
            raise ValueError(refusal)

    def _take(self, trainer: Trainer) -> str | None:
        """Why this process must not write the run; else it is this one's. A new run is nobody else's."""
        if self._state is not None or not any((self.run / name).is_file() for name in ("config.yaml", STATE)):
            return None
        made_by = commit()
        try:
            with _alone(self.run):
                refusal = written_by_another(self.run)
                if refusal is None:
                    self._former = former = read_state(self.run)
                    self._begin(trainer, made_by)
                    self._write(**{name: getattr(former, name) for name in REACHED} if former else {})
        except OSError as error:
            return f"{self.run} cannot be written: {error}"
        return refusal

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._state is not None and self._state.stage != _stage(trainer):
            self._keep(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._keep(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep(trainer)  # of a validation at the epoch's end, `best` is saved now

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (self.run / "config.yaml").is_file():  # else it is zero-shot, and the run has yet to begin
            self._keep(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end_by(exception)

    def _end_by(self, error: BaseException) -> None:
        """As the error's `status` says, if it has one; else stopped, by Ctrl-C or an exit, or failed."""
        status: Status = "failed" if isinstance(error, Exception) else "stopped"
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        self.end(getattr(error, "status", status), message if isinstance(error, Exception) else None)

    @contextmanager
    def told(self) -> Iterator[None]:
        """An error in here is the run's, though none of the trainer's."""
        try:
            yield
        except BaseException as error:
            self._end_by(error)
            raise

    def end(self, status: Status, message: str | None = None) -> None:
        """The last word; nothing where the run has not begun, or has ended."""
        if self._state is not None and not self._ended.is_set():
            self._ended.set()
            if self._former is None:
                self._write(status=status, message=message)
            else:
                self._put(self._former)

    def _keep(self, trainer: Trainer) -> None:
        self._former = None
        if self._state is None and trainer.is_global_zero:
            self._begin(trainer, commit())
        if self._state is not None and not self._ended.is_set():
            best = next(part for part in trainer.checkpoint_callbacks if isinstance(part, BestCheckpoint))
            score = best.best_model_score
            self._write(best=None if score is None else float(score))

    def _begin(self, trainer: Trainer, made_by: str | None) -> None:
        self.run.mkdir(parents=True, exist_ok=True)
        self._trainer, now, process = trainer, time.time(), os.getpid()
        self._state = RunState(
            "running", None, 0, 0, None, now, now, socket.gethostname(), process, own_job(), made_by, None,
            mark(process),
        )  # fmt: skip
        threading.Thread(target=self._beat, name="state.json", daemon=True).start()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            self._write()

    def _write(self, **changes: Any) -> None:
        with self._one:
            assert self._state is not None
            if self._ended.is_set() and "status" not in changes:  # the thread was waiting for `end`
                return
            if self._former is None:
                plan = getattr(self._trainer.lightning_module, "stage_plan", None)
                changes |= {"stage": _stage(self._trainer), "step": self._trainer.global_step}
                changes |= {"steps": plan.ends[-1] if plan else 0}
            self._state = replace(self._state, updated=time.time(), **changes)
            self._put(self._state)

    def _put(self, state: RunState) -> None:
        """Neither a full disk nor a folder that was removed stops a run for its state: it is said once."""
        try:
            state.write(self.run)
        except OSError as error:
            if not self._failed:
                print(f"{self.run / STATE} cannot be written: {error}. The run goes on", file=sys.stderr)
            self._failed = True


def _stage(trainer: Trainer) -> str | None:
    plan = getattr(trainer.lightning_module, "stage_plan", None)
    return plan.names[plan.index(trainer.global_step)] if plan else None


@contextmanager
def _alone(run: Path) -> Iterator[None]:
    """One process at a time, by a file that it makes: no file system, of several machines either, makes one twice.

    What a killed process left is taken away after TAKING seconds.
    """
    claim, patience = run / CLAIM, time.monotonic() + TAKING
    while True:
        try:
            claim.touch(exist_ok=False)
            break
        except FileExistsError:
            time.sleep(0.05)
        if time.monotonic() > patience:
            claim.unlink(missing_ok=True)
            patience += TAKING
    try:
        yield
    finally:
        claim.unlink(missing_ok=True)


def written_by_another(run: Path) -> str | None:
    """Why this process must not write the run, or None.

    Its own job's run is no other's, unless the process that writes it is there to see: a job that was requeued or
    restarted finds what it said last before.
    """
    state = read_state(run)
    if state is None or state.seen(time.time()) != "running" or state.is_own:
        return None
    if state.job is not None and state.job == own_job() and not state.is_near:
        return None
    ago = max(0, round(time.time() - state.updated))
    return (
        f"{run} is being written: by process {state.pid} on {state.host}"
        + (f", job {state.job}" if state.job else "")
        + f", {ago} s ago at step {state.step}. Wait for it, or stop it; a run that was killed on another machine, or "
        f"in another container, is known to be {LOST:.0f} s after it was last heard of. A new run needs no RESUME"
    )
