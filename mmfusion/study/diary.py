"""study.json, what runs were made by; jobs.json, what became of them and what they cost."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmfusion.options import shown
from mmfusion.retrieval.files import replaced
from mmfusion.study.cost import FILE
from mmfusion.study.jobs import Job, Plan

STUDY, JOBS = "study.json", "jobs.json"


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError on a file that is not JSON; {} where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): delete the study's folder, or restore the file") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    with replaced(path) as beside:
        beside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def definitions(folder: Path) -> dict[str, Any]:
    """By name of the job, as `Job.definition` was when the job was last planned."""
    return {name: job["definition"] for name, job in read_json(folder / STUDY).get("jobs", {}).items()}


def write_study_file(plan: Plan, jobs: Iterable[Job]) -> None:
    """Jobs that are not planned this time keep their place: other seeds come back."""
    before = read_json(plan.folder / STUDY).get("jobs", {})
    now = {job.name: before.get(job.name, {}) | {"definition": job.definition()} for job in jobs}
    about = {"study": plan.study.name, "data": shown(plan.data), "manifest": plan.manifest, "seeds": list(plan.seeds)}
    write_json(plan.folder / STUDY, about | {"jobs": before | now})


class Diary:
    """jobs.json: {name: {"arm", "variant", "seed", "state": "running" | "done" | "failed" | "stopped", "rc", "tail",
    "attempts": [[start, end]] in seconds since 1970, "jobs", "minutes", "branched_from", "shared_minutes",
    "samples_per_s": {stage: n}, "parameters": {"head", "rest", "all"}}}.

    minutes: of all attempts. shared_minutes: what the runs that it branched from took until there, to be added for a
    run from scratch. jobs: how many ran side by side. head, rest: what the last stage trains; all: the whole model.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOBS
        self.jobs: dict[str, Any] = read_json(self.path)

    def starts(self, job: Job, command: list[str], branched_from: tuple[Job, str] | None, side_by_side: int) -> None:
        """branched_from: the job and the stage whose checkpoint it goes on from."""
        about = self._about(job)
        if branched_from is not None:
            other, stage = branched_from
            checkpoint = other.stage_checkpoint(stage)
            about["branched_from"] = str(checkpoint)
            about["shared_minutes"] = self._minutes_until(other, checkpoint.stat().st_mtime)
        elif not job.last.is_file():
            about |= {"branched_from": None, "shared_minutes": 0.0}
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
        about["attempts"][-1][1] = time.time()
        about |= {"state": state, "rc": rc, "tail": [] if state == "done" else tail}
        about["minutes"] = _minutes(about["attempts"])
        self.cost(job)

    def cost(self, job: Job) -> None:
        """What cost.json of the run tells."""
        about, cost = self._about(job), read_json(job.run / FILE)
        if stages := cost.get("stages"):
            *_, last = stages.values()
            about["parameters"] = {"head": last["head"], "rest": last["rest"], "all": cost["parameters"]}
            rates = {name: s["samples"] / s["seconds"] for name, s in stages.items() if s["seconds"] > 0}
            about["samples_per_s"] = rates
        self._write()

    def _about(self, job: Job) -> dict[str, Any]:
        new = {"arm": job.arm, "variant": job.variant, "seed": job.seed, "state": "new", "attempts": []}
        return self.jobs.setdefault(job.name, new | {"minutes": 0.0, "shared_minutes": 0.0, "branched_from": None})

    def _minutes_until(self, job: Job, moment: float) -> float:
        """What a job had taken at a moment, from scratch."""
        about = self._about(job)
        attempts = [list(attempt) for attempt in about["attempts"]]
        if about["state"] == "running":
            attempts[-1][1] = time.time()
        return about["shared_minutes"] + _minutes([[start, min(end, moment)] for start, end in attempts])

    def _write(self) -> None:
        write_json(self.path, self.jobs)


def _minutes(attempts: list[list[float]]) -> float:
    return sum(max(0.0, end - start) for start, end in attempts) / 60
