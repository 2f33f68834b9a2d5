"""Runs as processes: each writes a log that it holds locked while it lives, so that a later command knows of it."""

import fcntl
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mmfusion.options import shown

TAIL = 15  # lines that tell why a run failed
PATIENCE = 30.0  # seconds that a run has to stop before it is killed
END = 16_384  # bytes of a log's end, in which its bars are
ALONE = {  # what SLURM told this command of its place among a job's tasks; each run is a task by itself
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1",
}  # fmt: skip


@dataclass
class Child:
    """A run that this command started. offset: where its part of the log begins. started: seconds since 1970."""

    process: subprocess.Popen[bytes]
    log: Path
    offset: int
    started: float

    def said(self, end: int | None = None) -> str:
        """All that it wrote, or the last `end` bytes; "" where the log cannot be read."""
        with suppress(OSError), self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(self.offset if end is None else max(self.offset, size - end))
            return file.read().decode("utf-8", "replace")
        return ""

    def tail(self) -> list[str]:
        """The last lines that it wrote; of a line that was written over and over, its last state."""
        lines = self.said().split("\n")
        return [line.rstrip().rpartition("\r")[2] for line in lines if line.strip()][-TAIL:]


def lock(file: IO[bytes]) -> bool:
    """Locks an open file, until all who inherit it have closed it; False where others hold it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_alive(log: Path) -> bool:
    """Whether the run that writes this log still lives, whoever started it."""
    if not log.is_file():
        return False
    with log.open("ab") as file:
        return not lock(file)


def start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Child:
    """Starts a run in a session of its own: Ctrl-C reaches this command alone, which stops it in its own way."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        if not lock(file):
            raise ValueError(f"{log} is written by a run that another command started just now: wait for it")
        offset = file.seek(0, os.SEEK_END)
        settings = [f"{name}={value}" for name, value in environment.items()]
        said = " ".join([*settings, shlex.join(map(shown, command))])
        file.write(f"$ {said}\n".encode())
        file.flush()
        alone = {name: value for name, value in ALONE.items() if name in os.environ}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **alone, **environment},
        )  # fmt: skip
    return Child(process, log, offset, time.time())


def stop(children: Sequence[Child], hurry: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Asks all to stop, as Ctrl-C does; kills those that have not within `patience` seconds, and what they started.

    hurry: whether not to wait any longer. Signals must not raise in here.
    """
    for child in children:
        child.process.send_signal(signal.SIGINT)
    until = time.monotonic() + patience
    while any(child.process.poll() is None for child in children) and time.monotonic() < until and not hurry():
        time.sleep(0.05)
    for child in children:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.process.pid, signal.SIGKILL)
        child.process.wait()
