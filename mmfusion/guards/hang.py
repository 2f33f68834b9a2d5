"""A run that hangs ends, on every rank, with the stacks of all of them: where one waits, and for whom, is in there.

A rank that hangs can neither be asked nor raise: it may be in a collective, which no exception interrupts. So a thread
of each rank watches its pulse, writes what the others cannot see, and ends the process.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import LightningModule, Trainer
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, Strategy

from mmfusion.guards.pulse import PULSE
from mmfusion.state import KeepState

HUNG = 70  # exit code
LOOK = 5.0  # seconds between looks, at most
LAST_RESORT = 60.0  # seconds that writing the stacks may take
ROOT = Path(__file__).parents[2]
OWN = (str(ROOT / "mmfusion"), str(ROOT / "datamodules"))


class HangWatch(Callback):
    """Ends the process with exit code HUNG when for `minutes` no work was finished: see mmfusion/guards/pulse.py.

    Time counts from the setup of a fit or test to its end. folder: for stacks, rank-<R>.txt of each rank.
    """

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder, self.minutes = folder, minutes
        self._watch: Watch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()
        self._watch = Watch(trainer, self.folder, 60 * self.minutes)
        self._watch.start()

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        PULSE.beat()

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        PULSE.beat()

    def on_test_batch_end(self, *_: Any, **__: Any) -> None:
        PULSE.beat()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._watch is not None:
            self._watch.over.set()
            self._watch = None


class Watch(threading.Thread):
    """Time is counted by looks, not by the clock: a process that was suspended for hours does not hang."""

    def __init__(self, trainer: Trainer, folder: Path, limit: float) -> None:
        """limit: in seconds."""
        super().__init__(name="hang watch", daemon=True)
        self.trainer, self.folder, self.limit = trainer, folder, limit
        self.every = min(LOOK, limit / 10)
        self.over = threading.Event()
        self.began = time.time()

    def run(self) -> None:
        still, beats = 0.0, PULSE.beats
        while not self.over.wait(self.every):
            still, beats = (still + self.every if PULSE.beats == beats else 0.0), PULSE.beats
            if still >= self.limit:
                self._end()

    def _end(self) -> None:
        """Tells where this rank is, lets the others do so, and the first of them tells of all."""
        grace = 6 * self.every  # the ranks' last beats and looks are not at the same moment
        faulthandler.dump_traceback_later(grace + LAST_RESORT, exit=True, file=2)  # should the run's disk hang too
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        doing = self.trainer.state.stage.value if self.trainer.state.stage else "setting up"
        said = (
            f"rank {rank} of {ranks} (process {os.getpid()} on {socket.gethostname()}): {doing}, after step "
            f"{self.trainer.global_step}, waits in {place(main_frame())}"
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._of(rank).open("w") as file:
                print(f"{said}\n", file=file, flush=True)
                faulthandler.dump_traceback(file)
            time.sleep(grace)
            told = {other: self._told(other) for other in range(ranks)}
        except OSError as error:
            print(f"error: the run hangs: {said}; {self.folder}: {error.strerror}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(2)
            os._exit(HUNG)
        if rank == min(other for other, line in told.items() if line):
            print(self._summary(told), file=sys.stderr, flush=True)
        for part in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(part, KeepState):
                part.end("failed", f"hung: no work was finished for {self.limit / 60:g} minutes; see {self.folder}")
        os._exit(HUNG)

    def _summary(self, told: dict[int, str | None]) -> str:
        silent = "wrote nothing: its process is gone, its machine or disk hangs, or it still works"
        return "\n".join(
            [
                f"error: the run hangs: for {self.limit / 60:g} minutes no batch, nor part of other work, was finished",
                *(f"  {line or f'rank {rank} {silent}'}" for rank, line in told.items()),
                "A rank that waits elsewhere than in torch/distributed or torch/autograd keeps the others waiting. The "
                f"stacks of all threads are in {self.folder}. RESUME=auto goes on from the last checkpoint; if the "
                "work is only slow, raise --guards.hang_minutes",
            ]
        )

    def _told(self, rank: int) -> str | None:
        """The line of a rank that has ended, or is about to; what it wrote in an earlier life does not count."""
        path = self._of(rank)
        if not path.is_file() or path.stat().st_mtime < self.began:
            return None
        return path.read_text(errors="replace").partition("\n")[0]

    def _of(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.txt"


def main_frame() -> FrameType:
    """Where the process's first thread is."""
    return sys._current_frames()[threading.main_thread().ident or 0]


def place(frame: FrameType | None) -> str:
    """The innermost place of a stack, and the innermost in our own code where that is another."""
    found: list[str] = []
    while frame is not None and len(found) < 2:
        code = frame.f_code
        if not found or code.co_filename.startswith(OWN):
            path = code.co_filename.rpartition("site-packages/")[2].removeprefix(f"{ROOT}/")
            found.append(f"{path}:{frame.f_lineno} {code.co_name}")
            if code.co_filename.startswith(OWN):
                break
        frame = frame.f_back
    return ", called from ".join(found)


def wait_longer_than(minutes: float, strategy: Strategy) -> None:
    """Lets collectives wait for longer than the watch does, where nobody has said how long they may.

    They would end one rank by their own time-out, with nothing told of the others. A private name of Lightning 2.6,
    covered by tests/mmfusion/guards/test_hang.py.
    """
    if isinstance(strategy, DDPStrategy) and strategy._timeout == default_pg_timeout:
        strategy._timeout = max(default_pg_timeout, timedelta(minutes=minutes + 10))
