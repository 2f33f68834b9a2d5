"""What a trial would be refused for, at its start or at its end, known before any is trained."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from mmfusion.branch import COURSE, HEAD, Branch, Course, stage_courses
from mmfusion.contract import contract
from mmfusion.optim import check_rates
from mmfusion.retrieval import score_fusion
from mmfusion.retrieval.evaluation import BASELINES, Evaluation
from mmfusion.stages import Group, LossWeights, Stage, Until
from mmfusion.study.jobs import Plan
from mmfusion.sweep.definition import PRIMARY, Sweep
from mmfusion.sweep.space import Setting, arguments, extremes
from mmfusion.sweep.trials import Trial, prefix_of
from mmfusion.terms import active_terms

Labels = Mapping[str, Mapping[str, float]]  # by label column, what each label is worth
Options = Mapping[str, Any]  # of a run, resolved
PARTS = [
    f"{tower}.{part}." for tower in ("query", "product.text", "product.image") for part in ("encoder", "projection")
]


def refuse_mistakes(sweep: Sweep, plan: Plan) -> None:
    """Parses each end of each distribution as a run would.

    Raises ValueError for what a run would refuse, for a metric that its results would not hold, and for parameters that
    change the stages until the prefix.
    """
    shared = None if sweep.prefix is None else plan.parse(prefix_of(plan).arguments())
    labels = _labels(plan.data)
    for setting in extremes(sweep.parameters):
        told = f"a trial with {' '.join(arguments(sweep.parameters, setting))}"
        try:
            options = plan.parse(Trial.of(plan, sweep, 0, setting).arguments())
            if sweep.metric != PRIMARY:
                refuse_metric(sweep.metric, options["model"], labels)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"sweep {sweep.name}, {told}: {error}") from error
        if shared is None:
            continue
        try:
            refuse_another_past(options, shared, str(sweep.prefix))
        except ValueError as error:
            names = _changing(sweep, plan, setting, shared)
            raise ValueError(
                f"sweep {sweep.name}: all trials share the stages until {sweep.prefix}, and {' and '.join(names)} "
                f"change{'s'[len(names) > 1 :]} them: take that out of the parameters, or have an earlier prefix, or "
                f"prefix: null. Of {told}:\n{error}"
            ) from error


# ---- the metric ------------------------------------------------------------------------------------------------------


def refuse_metric(metric: str, model: Mapping[str, Any], labels: Labels | None) -> None:
    """metric: val/<view>/<label column>/<name>. model: its options. labels: None where the data are not here.

    Raises ValueError with the nearest name where an evaluation on val would have no such view or metric.
    """
    evaluation = Evaluation(**model["evaluation"])
    fused = ["fused"] * (len(model["modalities"]) == 2)
    baselines = [*BASELINES, score_fusion.NAME] if evaluation.baselines else []
    view, _, name = metric.removeprefix("val/").partition("/")
    _among(metric, view.partition("@")[0], [*model["modalities"], *fused, *baselines])  # fused@64: by fewer dimensions
    column, _, bare = name.rpartition("/")
    if labels is not None or not bare.startswith("share_"):
        columns = {column: {}} if labels is None else labels
        _among(metric, name, [f"{one}/{other}" for one, worth in columns.items() for other in evaluation.names(worth)])


def _among(metric: str, part: str, names: Sequence[str]) -> None:
    if part not in names:
        near = difflib.get_close_matches(part, names, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"the sweep's metric {metric} names {part!r}: there are {', '.join(names)}{hint}")


def _labels(data: str) -> Labels | None:
    manifest = Path(data, "manifest.json")
    told = json.loads(manifest.read_text(encoding="utf-8")).get("labels") if manifest.is_file() else None
    return told and {column: label.get("gains") or {} for column, label in told.items()}


# ---- the stages that all trials share --------------------------------------------------------------------------------


def _changing(sweep: Sweep, plan: Plan, setting: Setting, shared: Options) -> list[str]:
    """The options of a setting that are refused with those before them that are not."""
    kept: Setting = {}
    for option, value in setting.items():
        with suppress(ValueError, FileNotFoundError):
            some = kept | {option: value}
            refuse_another_past(plan.parse(Trial.of(plan, sweep, 0, some).arguments()), shared, str(sweep.prefix))
            kept = some
    return [option for option in setting if option not in kept]


def refuse_another_past(options: Options, shared: Options, stage: str) -> None:
    """Raises ValueError as a run with these options does that branches off from one with `shared` at a stage's end.

    It is the run's own check, of a checkpoint without weights. What options do not tell is left to the run: the rate of
    a group that is less than one of PARTS.
    """
    theirs, _ = _courses(shared)
    ours, assigned = _courses(options)
    ends = {name: place for place, name in enumerate(theirs, 1)}
    checkpoint = {
        "contract": contract(dict(shared)), COURSE: {"stages": theirs, "ends": ends}, "global_step": ends[stage],
        "state_dict": {},
    }  # fmt: skip
    Branch(f"stage-{stage}").take(checkpoint, nn.Module(), contract(dict(options)), ours, assigned)


def _courses(options: Options) -> tuple[dict[str, Course], dict[str, str]]:
    """What decides how each stage trains, by name, its end too; and the group of each of PARTS, the head and losses."""
    model = options["model"]
    groups = {name: Group(**told) for name, told in model["groups"].items()}
    stages = {
        name: Stage(**told | {"until": Until(**told["until"]), "losses": LossWeights(**told["losses"])})
        for name, told in model["stages"].items()
    }
    check_rates(groups, stages)
    matched = {
        part: [name for name, group in groups.items() if re.search(group.match, part)]
        for part in [*PARTS, *HEAD, *(f"losses.{term}." for term in active_terms(stages))]
    }
    assigned = {part: names[0] for part, names in matched.items() if names}
    courses = stage_courses(stages, groups, assigned)
    return {name: told | {"until": model["stages"][name]["until"]} for name, told in courses.items()}, assigned
