"""What a scheduler's signal does to a process: while a step is made it is noted, at other times it ends the process.

Heard are SIGTERM (the machine is wanted) and SIGUSR1 (the time limit is near: sbatch --signal=USR1@seconds). Schedulers
send them to every process there is, twice at times: what comes again within SAME seconds is the same signal.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

HEARD = (signal.SIGTERM, signal.SIGUSR1)  # of what ranks heard, the last in this list counts
SAME = 3.0  # seconds
ALONE = 30.0  # seconds after which a rank that leaves at once knows that rank 0 was not told to
GO_ON = 75  # exit code: EX_TEMPFAIL of sysexits.h
QUEUE_AGAIN = 76  # that and: the job's script is to do so (experiments/clusters/slurm.sbatch)
PARENT = "MMFUSION_PARENT"  # for the ranks that Lightning starts: the process that did


class Preempted(SystemExit):
    """The run has to leave the machine, and can be gone on with; str() says what came.

    The code is GO_ON, or QUEUE_AGAIN. Where a launcher kills what is left as soon as one process ends with a code
    (srun, Lightning's own), that is rank 0's alone, and the others end with 0: rank 0 still has to say where the run
    stands. Under srun a rank that was told alone has a code, after ALONE seconds: nobody else would end the job.
    """

    status = "preempted"

    def __init__(self, message: str = "preempted") -> None:
        super().__init__(0 if _rank() != 0 and (_in_slurm() or _is_child()) else GO_ON)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Notice:
    """What the scheduler told this process.

    asked: the signal that came. held: a step is being made; a first signal waits for its end, see SaveAndLeave.
    children: processes that are told what this one is told, when it leaves at once.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.held = False
        self.children: Sequence[subprocess.Popen[Any]] = ()
        self._since = 0.0  # of the clock time.monotonic
        self._leaves = False
        self._at_once = False
        self._pid = os.getpid()

    @contextmanager
    def caught(self, run: Path) -> Iterator[None]:
        """Hears signals, for the run in that folder. Says how a run that was preempted goes on, and queues it again
        where its time was up."""
        self.asked, self.held, self._leaves, self._at_once, self._pid = None, False, False, False, os.getpid()
        former = {number: signal.signal(number, self._receive) for number in HEARD}
        if not _is_child():
            os.environ[PARENT] = str(self._pid)
        try:
            yield
        except Preempted as error:
            for number in HEARD:  # it is leaving: it may be told so again
                former[number] = signal.SIG_IGN
                signal.signal(number, signal.SIG_IGN)
            if _rank() == 0:
                self._say(error, run)
            elif self._at_once and _in_slurm() and os.environ["SLURM_PROCID"] != "0":  # else it is the shell's
                self._await_the_first(error)
            raise
        finally:
            for number, handler in former.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            if os.environ[PARENT] == str(self._pid):
                del os.environ[PARENT]

    def _say(self, error: Preempted, run: Path) -> None:
        if "wandb" in sys.modules:  # before SLURM is asked to start the job again: that ends W&B's service
            from mmfusion.loggers import leave_wandb  # noqa: PLC0415

            leave_wandb(GO_ON)
        print(f"{error}. {_kept(run)} {self._queued_again(error, run)}", file=sys.stderr, flush=True)

    def _await_the_first(self, error: Preempted) -> None:
        """Rank 0, if it was told too, ends meanwhile, and srun ends this process: by SIGTERM, or without a word."""
        ended: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
        until = time.monotonic() + ALONE
        while not ended and time.monotonic() < until:
            time.sleep(0.1)
        if not ended:
            error.code = QUEUE_AGAIN if self.asked == signal.SIGUSR1 else GO_ON
            print(f"{error}, on rank {_rank()} alone", file=sys.stderr, flush=True)

    def leave(self, how: str) -> Preempted:
        """To be raised. how: what became of the step at hand."""
        self._leaves = True
        assert self.asked is not None
        return Preempted(f"{self.asked.name} came: {how}")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a worker that reads data, as it begins: see datamodules/stream/workers.py
            return
        now = time.monotonic()
        again = self.asked is not None and now - self._since > SAME
        first, self.asked = self.asked is None, self.asked or signal.Signals(number)
        if first:
            self._since = now
        if not self._leaves and (again or (first and not self.held)):
            for child in self.children:
                child.send_signal(number)
            self._at_once = True
            raise self.leave("the run stopped at once")

    def _queued_again(self, error: Preempted, run: Path) -> str:
        """Only where the time was up: what SLURM preempts it queues again itself, and what scancel ends is to end."""
        by_hand = f"`make train EXP={run.parent.name} RESUME=auto` goes on, with the other options as they were"
        job = os.environ.get("SLURM_JOB_ID")
        if self.asked != signal.SIGUSR1 or job is None:
            return by_hand
        try:
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
            failed = done.stderr.strip() or f"exit code {done.returncode}" if done.returncode else None
        except FileNotFoundError:
            error.code = QUEUE_AGAIN
            return f"Here is no scontrol: exit code {QUEUE_AGAIN} asks the job's script for it. Else {by_hand}"
        except (OSError, subprocess.TimeoutExpired) as refusal:
            failed = str(refusal)
        if failed is None:
            return f"Job {job} is queued again and goes on by itself"
        return f"`scontrol requeue {job}` failed ({failed}): {by_hand}"


NOTICE = Notice()


def _kept(run: Path) -> str:
    from mmfusion.checkpoints import LAST  # noqa: PLC0415  (the command hears signals before it has the time for this)

    last = run / "checkpoints" / LAST
    return f"{last} holds what was saved." if last.is_file() else "Nothing was saved yet."


def _rank() -> int:
    """In a shell that SLURM started, the ranks that Lightning starts have its SLURM_PROCID."""
    return int(next((os.environ[n] for n in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if os.environ.get(n)), "0"))


def _in_slurm() -> bool:
    return "SLURM_PROCID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ


def _is_child() -> bool:
    return os.environ.get(PARENT) == str(os.getppid())
