"""The command behind `make study`: trains what is not done yet, then reports; what is on disk is the state."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmfusion.options import shown
from mmfusion.study.diary import Diary, definitions, write_study_file
from mmfusion.study.jobs import Job, Plan, changes, refuse_changes, refuse_mistakes, shared_stages
from mmfusion.study.processes import lock
from mmfusion.study.queue import GOES_ON, Queue
from mmfusion.study.signals import Interrupted, Signals


def run_study(plan: Plan, side_by_side: int = 1) -> list[Job]:
    """Trains and evaluates what is not done yet; returns the jobs that failed.

    Raises ValueError for runs of another definition, for options that a run would refuse, and where another command
    runs the same study; Interrupted or KeyboardInterrupt where it is asked to stop.
    """
    from mmfusion.environment import commit  # noqa: PLC0415  (it takes seconds, and a report needs it not)

    jobs = plan.jobs()
    shared = shared_stages(jobs)
    with _alone(plan.folder), Signals().caught() as signals:
        refuse_mistakes(jobs)
        refuse_changes(plan, definitions(plan.folder))
        write_study_file(plan, jobs)
        return Queue(jobs, shared, Diary(plan.folder, commit()), side_by_side, signals).run()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("ab") as file:
        if not lock(file):
            raise ValueError(f"another command runs the study in {folder}: wait for it, or stop it with Ctrl-C")
        yield


def run_and_report(plan: Plan, side_by_side: int, report_only: bool) -> int:
    """Runs a study and writes its report; gives the exit code."""
    from mmfusion.study.report import write_study  # noqa: PLC0415

    failed: list[Job] = []
    changed: dict[str, str] = {}
    try:
        if report_only:
            changed = _changed(plan)
        else:
            failed = run_study(plan, side_by_side)
        print(f"report: {write_study(plan.folder, plan.study, shown(plan.data), changed=changed)}")
    except Interrupted:
        return 130
    except KeyboardInterrupt:
        print(f"stopped; {GOES_ON}", file=sys.stderr)
        return 130
    if failed:
        names = ", ".join(job.name for job in failed)
        print(f"failed: {names}; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


def _changed(plan: Plan) -> dict[str, str]:
    """By name of the job: why a run that is there is not one of this study any more."""
    found = changes(plan.with_seeds_on_disk().jobs(), definitions(plan.folder))
    return {job.name: f"was made by another definition or on other data: {why}" for job, why in found.items()}
