"""The stages that all trials share, trained once: by one command, on all its cores, while others wait."""

import time
from pathlib import Path

from mmfusion.study.jobs import Job
from mmfusion.study.processes import Child, is_alive, start, stop
from mmfusion.study.signals import Signals
from mmfusion.study.slots import environment
from mmfusion.sweep.book import Book
from mmfusion.sweep.queue import LEFT, PAUSE, say


def trained(job: Job, stage: str, book: Book, signals: Signals) -> Path | None:
    """The checkpoint at the end of `stage`, once it is there; None where a signal came first.

    Raises ValueError where the run fails, with the last lines that it wrote.
    """
    checkpoint, child, told = job.stage_checkpoint(stage), None, False
    try:
        while not checkpoint.is_file() and not signals.asked:
            if child is not None and child.process.poll() in LEFT:
                child = None  # it had to leave, and is begun again
            if child is not None and child.process.poll() is not None:
                last = "\n".join(f"    {line}" for line in child.tail())
                raise ValueError(f"the stages that all trials share cannot be trained ({job.log}):\n{last}")
            if child is None:
                child = _begun(job, stage, book)
            if not told:
                does = "is trained" if child else "is trained by another command"
                say(f"{job.name}, until the end of {stage}, {does}; log: {job.log}")
                told = True
            time.sleep(PAUSE)
    finally:
        if child is not None:  # what comes after the stage is the trials' own
            stop([child], lambda: signals.asked > 1)
    return checkpoint if checkpoint.is_file() else None


def _begun(job: Job, stage: str, book: Book) -> Child | None:
    """None where another command trains it."""
    with book.alone():
        if is_alive(job.log):
            return None
        job.clear()
        return start(job.command(None, [stage]), job.log, {"MMFUSION_VERSION": job.run.name, **environment(0, 1)})
