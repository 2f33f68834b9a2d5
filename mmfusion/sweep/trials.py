"""The runs of a sweep: a trial's, and that of the stages that all trials share. A study's jobs in other folders."""

import csv
import itertools
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfusion.options import shown
from mmfusion.retrieval.examples import main_metric
from mmfusion.retrieval.report import primary_view, read_results
from mmfusion.retrieval.side import flattened
from mmfusion.state import read_state
from mmfusion.study.definition import EVERYTHING, LOGS, Arm, Study
from mmfusion.study.jobs import Job, Plan
from mmfusion.sweep.definition import PRIMARY, Sweep
from mmfusion.sweep.space import Setting, arguments

TRIALS, PREFIX = "trials", "prefix"
OTHERWISE = ("name", "trials", "parameters", "args", "trial_args")  # of a sweep: no part of its definition as they are
VAL_ALONE = "--data.test_splits=[val]"  # test is for what the sweep found, and for once


def plan_of(sweep: Sweep, folder: Path, data: str, more: tuple[str, ...] = (), **options: Any) -> Plan:
    """The plan that a sweep's runs belong to. more: options of all of them, from the command line.

    Raises ValueError where it holds an option that is varied or that is not a user's to give, and for a prefix that is
    none of the experiment's stages, or the last.
    """
    arm = Arm(experiment=sweep.experiment, prefix=sweep.prefix)
    study = Study(
        sweep.name, TRIALS, {TRIALS: arm, PREFIX: arm}, sweep.encoders, sweep.experiment,
        (*sweep.args, *sweep.trial_args),
    )  # fmt: skip
    plan = Plan(study, folder, data, (sweep.seed,), more, **options)
    varied = {f"--{parameter.option}" for parameter in sweep.parameters}
    for option in more:
        if option.partition("=")[0] in varied:
            raise ValueError(f"ARGS holds {option!r}: the sweep {sweep.name} varies it; take it out of one of the two")
    stages = plan.stages(TRIALS)
    if sweep.prefix is not None and sweep.prefix not in stages[:-1]:
        raise ValueError(
            f"sweep {sweep.name}: prefix is {sweep.prefix!r}, expected one of the stages of {sweep.experiment} before "
            f"the last ({', '.join(stages)}), or prefix: null"
        )
    return plan


def prefix_of(plan: Plan) -> Job:
    """The run that is trained until the end of the stages that all trials share."""
    return Job(plan, PREFIX, EVERYTHING, plan.seeds[0])


@dataclass(frozen=True, eq=False)
class Trial(Job):
    """The run of a trial, <sweep>/trials/<number>. setting: what it was given of the sweep's parameters."""

    sweep: Sweep
    number: int
    setting: Setting

    @classmethod
    def of(cls, plan: Plan, sweep: Sweep, number: int, setting: Setting) -> "Trial":
        return cls(plan, TRIALS, EVERYTHING, sweep.seed, sweep, number, setting)

    @property
    def run(self) -> Path:
        return self.plan.folder / TRIALS / str(self.number)

    @property
    def log(self) -> Path:
        return self.plan.folder / LOGS / f"{self.number}.log"

    @property
    def kept(self) -> Path:
        """The file that the command which looks after the trial holds locked."""
        return self.log.with_suffix(".lock")

    def options(self) -> list[str]:
        return [*super().options(), VAL_ALONE, *arguments(self.sweep.parameters, self.setting)]

    def measured(self) -> Mapping[str, Any]:
        """{"value", "low", "high"} of the sweep's metric. Raises ValueError where the results have no number for it."""
        found = cell(read_results(self.run / "results.json"), self.sweep.metric)
        if found["value"] is None:
            raise ValueError(f"{self.sweep.metric} is the mean over no query")
        return found

    def validations(self) -> dict[int, float]:
        """The metric after each validation so far, by optimizer step; none until one was in the last stage.

        Before that the primary view may not be trained: a pruner would compare what is yet to come.
        """
        state, found = read_state(self.run), dict[int, float]()
        if state is None or state.best is None:
            return found
        with suppress(OSError), (self.run / "metrics.csv").open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            # a smaller corpus is named in the column: val/fused/relevance/ndcg@10 in judged+1000
            columns = [name for name in rows.fieldnames or [] if name.partition(" in ")[0] == self.sweep.metric]
            for row, column in itertools.product(rows, columns):
                with suppress(TypeError, ValueError):  # a row of other values, or one that is being written
                    found[int(row["step"])] = float(row[column])
        return found


def cell(results: Mapping[str, Any], metric: str) -> Mapping[str, Any]:
    """Of results.json. Raises ValueError that lists what there is."""
    views = results.get("val", {})
    if metric == PRIMARY and views:
        view = views[results["run"].get("primary") or primary_view(views)]
        return view[main_metric(view)]
    _, _, rest = metric.partition("/")
    view, _, name = rest.partition("/")
    if name not in views.get(view, {}):
        there = [f"val/{view}/{name}" for view, metrics in views.items() for name in metrics]
        raise ValueError(f"the results have no {metric}, only {', '.join(there) or 'nothing on val'}")
    return views[view][name]


def reported(sweep: Sweep) -> dict[str, Any]:
    """What a report of the trials reads in the sweep's file, as flat JSON."""
    parameters = {
        one.option: {key: list(value) if isinstance(value, tuple) else value for key, value in vars(one).items()}
        for one in sweep.parameters
    }
    order = [one.option for one in sweep.parameters]
    return flattened({"metric": sweep.metric, "parameters": parameters, "order": order})


def definition(sweep: Sweep, plan: Plan) -> dict[str, Any]:
    """What must not change while a sweep goes on, as flat JSON; how many trials there are may."""
    rest = {key: value for key, value in vars(sweep).items() if key not in OTHERWISE}
    args = [shown(option) for option in (*sweep.args, *plan.more)]
    trial_args = [shown(option) for option in sweep.trial_args]
    data = plan.manifest or shown(plan.data)
    return reported(sweep) | flattened(
        {**rest, "args": args, "trial_args": trial_args, "data": data, "files": plan.files(TRIALS)}
    )
