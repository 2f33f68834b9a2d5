"""How long the rest of a study takes, from the minutes of similar runs."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from mmfusion.study.jobs import Job


def time_left(
    waiting: Sequence[Job], spent: Mapping[Job, float], diary: Mapping[str, Mapping[str, Any]], slots: int
) -> float | None:
    """Minutes until all are done; None where nothing is known yet.

    spent: minutes that each running job has run so far. diary: of all jobs, as jobs.json.
    """
    done = [about for about in diary.values() if about["state"] == "done" and about["minutes"] > 0]
    if not done:
        return None
    running = [max(expected(job, done) - minutes, 0.0) for job, minutes in spent.items()]
    return (sum(running) + sum(expected(job, done) for job in waiting)) / slots


def expected(job: Job, done: Sequence[Mapping[str, Any]]) -> float:
    """Minutes of a job: the mean of the same arm's, else of all that share as it does, else of all."""
    same = [about["minutes"] for about in done if about["arm"] == job.arm]
    alike = [about["minutes"] for about in done if bool(about["branched_from"]) == (job.prefix is not None)]
    return mean(same or alike or [about["minutes"] for about in done])
