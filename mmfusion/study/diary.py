"""study.json, what runs were made by; jobs.json, what became of them and what they cost."""

import contextlib
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmfusion.options import shown
from mmfusion.retrieval.files import replaced
from mmfusion.speed.callback import FILE as SPEED
from mmfusion.study.jobs import Job, Plan
from mmfusion.study.parameters import FILE as PARAMETERS

STUDY, JOBS = "study.json", "jobs.json"


def read_json(path: Path) -> dict[str, Any]:
    """{} where there is no file, and, with a warning, where it is damaged: it tells of costs alone."""
    try:
        return _read(path)
    except ValueError as error:
        print(f"{error}: what it told of minutes and failures is lost; the runs themselves are whole", file=sys.stderr)
        return {}


def _read(path: Path) -> dict[str, Any]:
    """Raises ValueError on a file that is damaged; {} where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not JSON of names and values")
    return found


def recorded(folder: Path) -> dict[str, Any]:
    """study.json: {"study", "data", "manifest", "seeds", "jobs": {name: {"definition"}}}; {} where there is none.

    Raises ValueError where it is damaged: by it alone runs of another definition are told apart.
    """
    try:
        return _read(folder / STUDY)
    except ValueError as error:
        raise ValueError(
            f"{error}: it holds what the runs beside it were made by, and they are whole. Restore it from a copy, or "
            f"move {folder} away whole and keep it: all begins anew in its place"
        ) from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    with replaced(path) as beside:
        beside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def definitions(folder: Path) -> dict[str, Any]:
    """By name of the job, as `Job.definition` was when the job was last planned."""
    return {name: job["definition"] for name, job in recorded(folder).get("jobs", {}).items()}


def write_study_file(plan: Plan, jobs: Iterable[Job]) -> None:
    """Jobs that are not planned this time keep their place: other seeds come back."""
    before = recorded(plan.folder).get("jobs", {})
    now = {job.name: before.get(job.name, {}) | {"definition": job.definition()} for job in jobs}
    about = {"study": plan.study.name, "data": shown(plan.data), "manifest": plan.manifest, "seeds": list(plan.seeds)}
    write_json(plan.folder / STUDY, about | {"jobs": before | now})


class Diary:
    """jobs.json: {name: {"arm", "variant", "seed", "state": "running" | "done" | "failed" | "stopped", "rc", "tail",
    "attempts": [[start, end]] in seconds since 1970, "jobs", "minutes", "branched_from", "shared_minutes", "commits",
    "samples_per_s": {stage: n}, "parameters": {"head", "rest", "all"}}}.

    minutes: of all attempts. shared_minutes: what the runs that it branched from took until there, to be added for a
    run from scratch. commits: of all attempts, and of the runs that it branched from; none outside a checkout. jobs:
    how many ran side by side. head, rest: what the last stage trains; all: the whole model.
    """

    def __init__(self, folder: Path, commit: str | None = None) -> None:
        """commit: of the code that runs now."""
        self.path, self.commit = folder / JOBS, commit
        self.jobs = {name: about for name, about in read_json(self.path).items() if isinstance(about, dict)}

    def starts(self, job: Job, command: list[str], branched_from: tuple[Job, str] | None, side_by_side: int) -> None:
        """branched_from: the job and the stage whose checkpoint it goes on from."""
        about = self._about(job)
        if branched_from is not None:
            other, stage = branched_from
            checkpoint = other.stage_checkpoint(stage)
            about["branched_from"] = str(checkpoint)
            about["shared_minutes"] = self._minutes_until(other, checkpoint.stat().st_mtime)
            about["commits"] = list(self._about(other)["commits"])
        elif not job.last.is_file():
            about |= {"branched_from": None, "shared_minutes": 0.0, "commits": []}
        if self.commit is not None and self.commit not in about["commits"]:
            about["commits"].append(self.commit)
        now = time.time()
        about |= {
            "state": "running",
            "rc": None,
            "tail": [],
            "jobs": side_by_side,
            "command": [shown(part) for part in command],
        }
        about["attempts"].append([now, now])
        self._write()

    def ends(self, job: Job, state: str, rc: int | None, tail: list[str]) -> None:
        about = self._about(job)
        if about["attempts"]:  # none where jobs.json was lost meanwhile
            about["attempts"][-1][1] = time.time()
        about |= {"state": state, "rc": rc, "tail": [] if state == "done" else tail}
        about["minutes"] = _minutes(about["attempts"])
        self.cost(job)

    def cost(self, job: Job) -> None:
        """What parameters.json and speed.json of the run tell."""
        about = self._about(job)
        parameters, speed = read_json(job.run / PARAMETERS), read_json(job.run / SPEED)
        with contextlib.suppress(KeyError, TypeError, AttributeError, IndexError):  # damaged: the run is whole
            *_, last = parameters["stages"].values()
            about["parameters"] = {"head": last["head"], "rest": last["rest"], "all": parameters["parameters"]}
        with contextlib.suppress(KeyError, TypeError, AttributeError):
            about["samples_per_s"] = {name: stage["samples_per_s"] for name, stage in speed["stages"].items()}
        self._write()

    def _about(self, job: Job) -> dict[str, Any]:
        new = {"arm": job.arm, "variant": job.variant, "seed": job.seed, "state": "new", "attempts": []}
        new |= {"minutes": 0.0, "shared_minutes": 0.0, "branched_from": None, "commits": []}
        self.jobs[job.name] = about = new | self.jobs.get(job.name, {})
        return about

    def _minutes_until(self, job: Job, moment: float) -> float:
        """What a job had taken at a moment, from scratch."""
        about = self._about(job)
        attempts = [list(attempt) for attempt in about["attempts"]]
        if about["state"] == "running" and attempts:
            attempts[-1][1] = time.time()
        return about["shared_minutes"] + _minutes([[start, min(end, moment)] for start, end in attempts])

    def _write(self) -> None:
        write_json(self.path, self.jobs)


def _minutes(attempts: list[list[float]]) -> float:
    return sum(max(0.0, end - start) for start, end in attempts) / 60
