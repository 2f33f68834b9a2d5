"""The command behind `make study`: trains what is not done yet, then reports; what is on disk is the state."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mmfusion.options import shown
from mmfusion.study.diary import Diary, definitions, write_study_file
from mmfusion.study.jobs import Job, Plan, refuse_changes, shared_stages
from mmfusion.study.processes import lock
from mmfusion.study.queue import Interrupted, Queue


def run_study(plan: Plan, side_by_side: int = 1) -> list[Job]:
    """Trains and evaluates what is not done yet; returns the jobs that failed.

    Raises ValueError for runs of another definition, and where another command runs the same study.
    """
    jobs = plan.jobs()
    shared = shared_stages(jobs)
    with _alone(plan.folder), _signals():
        refuse_changes(jobs, definitions(plan.folder))
        write_study_file(plan, jobs)
        return Queue(jobs, shared, Diary(plan.folder), side_by_side).run()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("ab") as file:
        if not lock(file):
            raise ValueError(f"another command runs the study in {folder}: wait for it, or stop it with Ctrl-C")
        yield


@contextmanager
def _signals() -> Iterator[None]:
    """A closed terminal and a scheduler's signal stop the study as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # SIGINT too: a shell ignores it for what runs behind it
    before = {name: signal.signal(name, interrupt) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def run_and_report(plan: Plan, side_by_side: int, report_only: bool) -> int:
    """Runs a study and writes its report; gives the exit code."""
    from mmfusion.study.report import write_study  # noqa: PLC0415

    failed: list[Job] = []
    try:
        failed = [] if report_only else run_study(plan, side_by_side)
    except Interrupted:
        return 130
    print(f"report: {write_study(plan.folder, plan.study, shown(plan.data))}")
    if failed:
        names = ", ".join(job.name for job in failed)
        print(f"failed: {names}; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0
