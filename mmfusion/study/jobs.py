"""The runs of a study: what decides each, its command, and how far it is on disk."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from mmfusion.checkpoints import LAST, stage_file
from mmfusion.options import shown
from mmfusion.retrieval.side import flattened
from mmfusion.study.definition import LOGS, Study, unfit
from mmfusion.study.preflight import parse
from mmfusion.study.processes import is_alive

State = Literal["done", "resume", "new"]
EXPERIMENTS = Path("experiments")
CALLBACK = "mmfusion.study.parameters.Parameters"


@dataclass(frozen=True, eq=False)
class Plan:
    """What a study is asked to do.

    folder: of its runs. more: options of all arms, from the command line. program: what trains, given its options.
    parse: gives them resolved, and raises ValueError for those that it would refuse. recorded: the hash of the data
    where they are not here.

    Raises ValueError for options that are the study's own to give.
    """

    study: Study
    folder: Path
    data: str
    seeds: tuple[int, ...]
    more: tuple[str, ...] = ()
    program: tuple[str, ...] = (sys.executable, "-m", "mmfusion.cli", "train")
    parse: Callable[[Sequence[str]], Any] = parse
    recorded: str | None = None

    def __post_init__(self) -> None:
        for option in self.more:
            if why := unfit(option):
                raise ValueError(f"ARGS holds {option!r}: {why}")

    @cached_property
    def manifest(self) -> str | None:
        """The hash of the data; None where they are not on this machine: then their address counts."""
        path = Path(self.data) / "manifest.json"
        if "://" in self.data or self.data.startswith("pipe:"):
            return None
        if not path.is_file() and self.recorded is not None:
            return self.recorded
        if not path.is_file():
            raise FileNotFoundError(
                f"DATA={self.data} holds no manifest.json: expected a folder that `make data` wrote"
            )
        return str(json.loads(path.read_text(encoding="utf-8")).get("hash"))

    def jobs(self) -> list["Job"]:
        """Seed by seed, so that the table has every arm early; within a variant in the order of the file."""
        arms = self.study.trained()
        return [
            Job(self, arm, variant, seed)
            for seed in self.seeds
            for variant in self.study.variants
            for arm in arms
            if variant in self.study.trained_on(arm)
        ]

    def with_seeds_on_disk(self) -> "Plan":
        """Results are means over these seeds: of the plan, and of all runs of its arms that are there."""
        found = set(self.seeds)
        for arm in self.study.trained():
            for variant in self.study.trained_on(arm):
                names = (path.name for path in (self.folder / arm).glob(f"{variant}-*"))
                matches = (re.fullmatch(re.escape(variant) + r"-([0-9]+)", name) for name in names)
                found |= {int(match[1]) for match in matches if match}
        return replace(self, seeds=tuple(sorted(found)))

    def stages(self, arm: str) -> list[str]:
        """Names of the stages that an arm trains, in order: those of the last file that names any."""
        named: list[str] = []
        for content in self.files(arm).values():
            named = list((content.get("model") or {}).get("stages") or named)
        return named

    def files(self, arm: str) -> dict[str, dict[str, Any]]:
        """The files that an arm's options come from, by their place in experiments/."""
        names = ("base", f"encoders/{self.study.encoders}", self.study.arms[arm].experiment)
        paths = {name: EXPERIMENTS / f"{name}.yaml" for name in names}
        for path in paths.values():
            if not path.is_file():
                there = ", ".join(sorted(other.stem for other in path.parent.glob("*.yaml")))
                raise FileNotFoundError(f"{self.study.name}, {arm}: there is no {path}, only {there}")
        return {name: yaml.safe_load(path.read_text(encoding="utf-8")) or {} for name, path in paths.items()}


@dataclass(frozen=True, eq=False)
class Job:
    """One run: an arm on a variant with a seed."""

    plan: Plan
    arm: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return self.plan.study.job_name(self.arm, self.variant, self.seed)

    @property
    def prefix(self) -> str | None:
        return self.plan.study.arms[self.arm].prefix

    @property
    def run(self) -> Path:
        return self.plan.study.run_folder(self.plan.folder, self.arm, self.variant, self.seed)

    @property
    def log(self) -> Path:
        return self.plan.folder / LOGS / f"{self.name}.log"

    @property
    def last(self) -> Path:
        return self.run / "checkpoints" / LAST

    def stage_checkpoint(self, stage: str) -> Path:
        return self.run / "checkpoints" / stage_file(stage)

    def state(self) -> State:
        """From what is on disk: `done` once the numbers and what the report needs of them are whole."""
        if (self.run / "per_query.parquet").is_file() and _whole(self.run / "results.json"):
            return "done"
        return "resume" if self.last.is_file() else "new"

    def options(self) -> list[str]:
        """What decides the run, apart from data and seed. The last of two equal options counts."""
        study = self.plan.study
        own = study.arms[self.arm].args
        return [*study.args, *study.variants[self.variant], *own, *self.plan.more]

    def definition(self) -> dict[str, Any]:
        """What must not change between a study's commands, as JSON."""
        return {
            "data": self.plan.manifest or shown(self.plan.data),
            "seed": self.seed,
            "options": [shown(option) for option in self.options()],
            "files": flattened(self.plan.files(self.arm)),
        }

    def command(self, branch: Path | None, checkpoint_stages: Sequence[str]) -> list[str]:
        """branch: the checkpoint to go on from where the run has none of its own."""
        start = [f"--resume={self.last}"] if self.state() == "resume" else [f"--branch={branch}"] if branch else []
        stages = [f"--checkpoint_stages=[{','.join(checkpoint_stages)}]"] if checkpoint_stages else []
        return [*self.plan.program, *self.arguments(), *stages, *start]

    def arguments(self) -> list[str]:
        """What the program is given however far the run is."""
        study = self.plan.study
        return [
            "--exp", study.arms[self.arm].experiment, "--encoders", study.encoders, "--data", self.plan.data,
            f"--experiment={self.arm}", f"--runs={self.plan.folder}", *self.options(),
            f"--seed_everything={self.seed}", f"--trainer.callbacks+={CALLBACK}",
        ]  # fmt: skip

    def clear(self) -> None:
        """Removes what a run left that was stopped before its first checkpoint: it starts anew."""
        if self.state() == "new" and self.run.exists():
            shutil.rmtree(self.run)


def _whole(results: Path) -> bool:
    try:
        return "run" in json.loads(results.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False


def shared_stages(jobs: Iterable[Job]) -> dict[Job, list[str]]:
    """For each job the stages whose ends it shares with others of its variant and seed, in order.

    A job may go on from the checkpoint of any of them, whichever of the others made it.

    Raises ValueError for a prefix that is none of an arm's stages, or the last of them.
    """
    jobs = list(jobs)
    upto = {job: _stages_until_prefix(job) for job in jobs if job.prefix is not None}
    shared = {}
    for job in jobs:
        beside = [other for other in upto if (other.variant, other.seed) == (job.variant, job.seed)]
        others = [other for other in beside if other is not job]
        prefixes = {other.prefix for other in [job, *others]}
        theirs = {stage for other in others for stage in upto[other]}
        shared[job] = [stage for stage in upto.get(job, []) if stage in prefixes & theirs]
    return shared


def _stages_until_prefix(job: Job) -> list[str]:
    stages = job.plan.stages(job.arm)
    if job.prefix not in stages[:-1]:
        raise ValueError(
            f"study {job.plan.study.name}: arm {job.arm} has the prefix {job.prefix!r}, expected one of its stages "
            f"before the last ({', '.join(stages)}), or prefix: null"
        )
    return stages[: stages.index(job.prefix) + 1]


def changes(jobs: Iterable[Job], recorded: dict[str, Any]) -> dict[Job, str]:
    """The runs on disk that were made by another definition, or by none that is known, and what differs.

    recorded: definitions by name of the job, as the study's folder holds them.
    """
    changed = {}
    for job in jobs:
        if not (job.run / "results.json").exists() and not any(job.run.glob("checkpoints/*")) and not is_alive(job.log):
            continue  # nothing of it will be used
        before, now = (flattened(d) for d in (recorded.get(job.name, {}), job.definition()))
        keys = [key for key in now.keys() | before.keys() if now.get(key) != before.get(key)]
        if keys:
            told = [f"{key} was {before.get(key)}, is {now.get(key)}" for key in sorted(keys)[:3]]
            changed[job] = "; ".join(told + ([f"and {len(keys) - 3} more"] if len(keys) > 3 else []))
    return changed


def refuse_changes(plan: Plan, recorded: dict[str, Any]) -> None:
    """Raises ValueError where runs on disk are of another definition: of other seeds too, for results hold them all."""
    changed = [
        f"  {job.arm} ({job.run}): {why}" for job, why in changes(plan.with_seeds_on_disk().jobs(), recorded).items()
    ]
    if changed:
        raise ValueError(
            "these runs were made by another definition or on other data:\n" + "\n".join(changed[:8])
            + (f"\n  and {len(changed) - 8} more" if len(changed) > 8 else "")
            + "\nMake it as it was, or give the study another name (copy its file) and keep these; only where they are "
            "not wanted any more, delete their folders"
        )  # fmt: skip


def refuse_mistakes(jobs: Iterable[Job]) -> None:
    """Parses the options of each arm and variant that is not done, before hours of others. Raises ValueError."""
    seen = set()
    for job in jobs:
        if (job.arm, job.variant) in seen or job.state() == "done":
            continue
        seen.add((job.arm, job.variant))
        try:
            job.plan.parse(job.arguments())
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"study {job.plan.study.name}, arm {job.arm} on {job.variant}: {error}") from error
