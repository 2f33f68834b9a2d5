"""How long the rest of a study takes, from the minutes of similar runs."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from mmfusion.study.jobs import Job


def time_left(
    waiting: Sequence[Job],
    spent: Mapping[Job, float],
    diary: Mapping[str, Mapping[str, Any]],
    slots: int,
    left: Mapping[Job, float] | None = None,
) -> float | None:
    """Minutes until all are done; None where nothing is known yet.

    spent: minutes that each running job has run so far. left: how many more it needs, where its steps tell. diary: of
    all jobs, as jobs.json. Before one is done, those that run tell how long the others take.
    """
    left = left or {}
    done = [about for about in diary.values() if about.get("state") == "done" and about.get("minutes", 0) > 0]
    done = done or [
        {"arm": job.arm, "minutes": spent[job] + more, "branched_from": diary[job.name]["branched_from"]}
        for job, more in left.items()
    ]
    if not done:
        return None
    running = [left.get(job, max(_expected(job, done) - minutes, 0.0)) for job, minutes in spent.items()]
    return (sum(running) + sum(_expected(job, done) for job in waiting)) / slots


def _expected(job: Job, done: Sequence[Mapping[str, Any]]) -> float:
    """Minutes of a job: the mean of the same arm's, else of all that share as it does, else of all."""
    same = [about["minutes"] for about in done if about["arm"] == job.arm]
    alike = [about["minutes"] for about in done if bool(about["branched_from"]) == (job.prefix is not None)]
    return mean(same or alike or [about["minutes"] for about in done])
