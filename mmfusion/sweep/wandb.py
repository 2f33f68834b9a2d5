"""A sweep file as configurations of Weights & Biases' sweeps, whose agents run `mmfusion fit` with the same options."""

import itertools
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mmfusion.cli import fit_arguments
from mmfusion.options import shown
from mmfusion.retrieval.files import replaced
from mmfusion.study.jobs import Plan
from mmfusion.sweep.definition import Sweep
from mmfusion.sweep.space import Parameter
from mmfusion.sweep.trials import Trial, prefix_of

NAME = "wandb-sweep"
METHODS = {"tpe": "bayes", "random": "random"}
DISTRIBUTIONS = {"uniform": "uniform", "loguniform": "log_uniform_values", "int": "int_uniform"}


def write_wandb(sweep: Sweep, plan: Plan) -> list[Path]:
    """Writes <sweep>/wandb-sweep.yaml; where options have conditions, which W&B has not, one per name of the choices
    that they hang on: wandb-sweep-<name>.yaml. Raises ValueError where the command would hold keys."""
    paths = []
    for names, content in translated(sweep, plan).items():
        stem = re.sub(r"[^\w.-]", "_", "-".join([NAME, *names]))  # a choice may be named as a path is
        path = plan.folder / f"{stem}.yaml"
        with replaced(path) as beside:
            beside.write_text(yaml.safe_dump(content, sort_keys=False, width=110), encoding="utf-8")
        paths.append(path)
    return paths


def translated(sweep: Sweep, plan: Plan) -> dict[tuple[str, ...], dict[str, Any]]:
    """By names of the choices that conditions hang on, which share the trials; () where there are none."""
    conditions = {option for parameter in sweep.parameters for option in parameter.when}
    choices = [one for one in sweep.parameters if one.option in conditions]
    every = list(itertools.product(*(choice.choices for choice in choices)))
    share = math.ceil(sweep.trials / len(every))
    found = {}
    for names in every:
        fixed = dict(zip((choice.option for choice in choices), names, strict=True))
        found[names] = _configuration(sweep, plan, fixed, share)
    return found


def _configuration(sweep: Sweep, plan: Plan, fixed: Mapping[str, str], trials: int) -> dict[str, Any]:
    pruner = (
        {"early_terminate": {"type": "hyperband", "min_iter": 3}} if sweep.pruner == "median" and sweep.prefix else {}
    )
    return {
        "name": "-".join([sweep.name, *fixed.values()]),
        "program": "mmfusion",
        "command": [*_command(sweep, plan), "${args}"],
        "method": METHODS[sweep.sampler],
        "metric": {"name": sweep.metric, "goal": "maximize"},
        "run_cap": trials,
        **pruner,
        "parameters": {one.option: _parameter(one, fixed) for one in sweep.parameters if one.exists(fixed)},
    }


def _parameter(parameter: Parameter, fixed: Mapping[str, str]) -> dict[str, Any]:
    if parameter.option in fixed:
        return {"value": parameter.choices[fixed[parameter.option]]}
    if parameter.kind == "choice":
        return {"values": list(parameter.choices.values())}
    return {"distribution": DISTRIBUTIONS[parameter.kind], "min": parameter.low, "max": parameter.high}


def _command(sweep: Sweep, plan: Plan) -> Sequence[str]:
    """What agents run, before the options that they add: a trial's command, begun where the trials begin."""
    arguments, _ = fit_arguments(Trial.of(plan, sweep, 0, {}).arguments())
    checkpoint = prefix_of(plan).stage_checkpoint(sweep.prefix) if sweep.prefix else None
    branch = [f"--branch={checkpoint}"] if checkpoint and checkpoint.is_file() else []
    if hidden := [part for part in arguments if shown(part) != part]:
        raise ValueError(
            f"{shown(hidden[0])}: agents run a command in a file and on W&B's page, where keys have readers; give them "
            "by the environment"
        )
    return [sys.executable, "-m", "mmfusion.cli", "fit", *arguments, "--experiment=wandb", *branch]
