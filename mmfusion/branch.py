"""A new run that goes on from the end of a stage of another: the past must be the same, what comes may differ.

The checkpoint is turned into the one that the new run, trained straight, would have saved there: what the stages behind
could train keeps its weights and its optimizer state, by name; the rest (a head, the losses of later terms) is as the
new run has initialised it, and so are the rates. From there on it is resumed as any other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mmfusion.contract import Differences, refuse, refuse_another_past
from mmfusion.optim import rate_of
from mmfusion.retrieval.side import flattened
from mmfusion.stages import Group, Stage, StagedModule, StagePlan
from mmfusion.terms import sides

COURSE = "course"
Course = dict[str, Any]
HEAD = ("product.fusion.", "product.text.token_projection.", "product.image.token_projection.")  # the fused view's own
NEW_RUN = "the run cannot branch off here; make these equal, or train it from the start:"


@dataclass(frozen=True)
class Past:
    """What lies behind the end of a stage: the names of the stages in order, and the loss terms that they trained."""

    stages: list[str]
    terms: set[str]

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any], where: str) -> "Past":
        """Raises ValueError for a checkpoint that is not at the end of a stage, or of a version before branches."""
        if COURSE not in checkpoint:
            raise ValueError(
                f"{where} lacks what a branch needs to know of its run: it is of a version before --branch. "
                "Train that run again"
            )
        ends, step = checkpoint[COURSE]["ends"], checkpoint["global_step"]
        if step not in ends.values():
            laid = ", ".join(f"{name} at step {end}" for name, end in ends.items())
            raise ValueError(
                f"{where} is at step {step}, and a run branches off where a stage ends ({laid}): train with "
                "--checkpoint_stages=[STAGE] and branch from its checkpoints/stage-STAGE.ckpt"
            )
        names = [name for name, end in ends.items() if end <= step]
        return cls(names, {term for name in names for term in checkpoint[COURSE]["stages"][name]["losses"]})

    @property
    def fused(self) -> bool:
        """Whether the head was trained."""
        return "fused" in sides(self.terms)

    def later(self, name: str) -> bool:
        """Whether a parameter or buffer is of a part that no stage behind could train."""
        part, _, rest = name.partition(".")
        if part == "losses":
            return rest.partition(".")[0] not in self.terms
        return not self.fused and name.startswith(HEAD)


def stage_courses(
    stages: Mapping[str, Stage], groups: Mapping[str, Group], assigned: Mapping[str, str]
) -> dict[str, Course]:
    """By stage, in order: what decides how it trains each parameter, apart from its end."""
    return {
        name: {
            "losses": stage.losses.active(), "warmup": stage.warmup, "decay": stage.decay,
            "rates": {parameter: rate_of(groups, stage, group) for parameter, group in assigned.items()},
        }
        for name, stage in stages.items()
    }  # fmt: skip


def course(plan: StagePlan, stages: dict[str, Course], module: nn.Module, optimizer: Optimizer) -> Course:
    """What a checkpoint keeps for those that branch off from it."""
    return {
        "stages": stages,
        "ends": dict(zip(plan.names, plan.ends, strict=True)),
        "optimizer": parameter_names(module, optimizer),
    }


def parameter_names(module: nn.Module, optimizer: Optimizer) -> list[str]:
    """Of the optimizer's parameters, as its state numbers them."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


class Branch(Callback):
    """Makes the checkpoint that a fit goes on from the beginning of another run.

    `step` is where it branched off; 0 before.

    Args:
        path: the checkpoint, for messages and for what is told of the run
    """

    def __init__(self, path: str) -> None:
        self.path, self.step = path, 0
        self._checkpoint: dict[str, Any] = {}

    def take(
        self,
        checkpoint: dict[str, Any],
        module: nn.Module,
        contract: Mapping[str, Any],
        stages: Mapping[str, Course],
        assigned: Mapping[str, str],
    ) -> None:
        """Turns the weights; the module's own on_load_checkpoint calls it. Raises ValueError where the past differs."""
        self.past = past = Past.of(checkpoint, f"--branch={self.path}")
        theirs = checkpoint[COURSE]["stages"]
        differs = _differing_stages(past, stages, theirs, assigned)
        refuse_another_past(dict(contract), checkpoint.get("contract", {}), past.terms, past.fused, differs, NEW_RUN)
        if len(stages) == len(past.stages):
            raise ValueError(
                f"--branch={self.path} is at the end of stage {past.stages[-1]}, this run's last: nothing is left to "
                f"train. Branch off at an earlier stage, or give the run more than {', '.join(past.stages)}"
            )
        ours = module.state_dict()
        kept = {name: value for name, value in checkpoint["state_dict"].items() if not past.later(name)}
        checkpoint["state_dict"] = kept | {name: value for name, value in ours.items() if past.later(name)}
        # what a callback that saves has saved lies in the other run's folder
        states = checkpoint.get("callbacks", {})
        checkpoint["callbacks"] = {name: state for name, state in states.items() if "dirpath" not in state}
        self._checkpoint, self.step = checkpoint, checkpoint["global_step"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Turns the state of optimizer and schedule, which Lightning has made by now and restores next."""
        checkpoint, self._checkpoint = self._checkpoint, {}
        plan = cast(StagedModule, pl_module).stage_plan
        optimizer, schedule = trainer.optimizers[0], cast(LambdaLR, trainer.lr_scheduler_configs[0].scheduler)
        theirs, ours = checkpoint[COURSE]["optimizer"], parameter_names(pl_module, optimizer)
        ends = zip(self.past.stages, plan.ends, strict=False)
        differs: Differences = {
            f"the end of stage {name}, in steps": (checkpoint[COURSE]["ends"][name], end)
            for name, end in ends
            if checkpoint[COURSE]["ends"][name] != end
        }
        orders = tuple([name for name in names if not self.past.later(name)] for names in (theirs, ours))
        if orders[0] != orders[1]:  # then sums over parameters (gradient clipping) round otherwise
            differs["the order of model.groups"] = ("one order of parameters", "another")
        refuse(differs, NEW_RUN)
        (scheduled,) = checkpoint["lr_schedulers"]
        rates = [rate(scheduled["last_epoch"]) for rate in schedule.lr_lambdas]
        counted = {name: scheduled[name] for name in ("last_epoch", "_step_count")}
        checkpoint["lr_schedulers"] = [schedule.state_dict() | counted | {"_last_lr": rates}]
        (state,) = checkpoint["optimizer_states"]
        checkpoint["optimizer_states"] = [_moved(state["state"], theirs, ours, optimizer, rates)]


def _differing_stages(
    past: Past, ours: Mapping[str, Course], theirs: Mapping[str, Course], assigned: Mapping[str, str]
) -> Differences:
    """Their value and ours, by option, of what the stages behind did; rates are compared by their parameters."""
    if past.stages != list(ours)[: len(past.stages)]:
        return {"model.stages until there": (past.stages, list(ours)[: len(past.stages)])}
    differs: Differences = {}
    for name in past.stages:
        own, other = dict(ours[name]), dict(theirs[name])
        our_rates, their_rates = own.pop("rates"), other.pop("rates")
        flat, their_flat = flattened(own), flattened(other)
        for key in sorted(flat.keys() | their_flat.keys()):
            if flat.get(key) != their_flat.get(key):
                differs[f"model.stages.{name}.{key}"] = (their_flat.get(key, 0.0), flat.get(key, 0.0))
        for parameter, rate in their_rates.items():
            if not past.later(parameter) and rate != our_rates.get(parameter):
                group = assigned.get(parameter, parameter)
                differs.setdefault(f"the rate of {group} in stage {name}", (rate, our_rates.get(parameter)))
    return differs


def _moved(
    state: Mapping[int, Any], theirs: list[str], ours: list[str], optimizer: Optimizer, rates: list[float]
) -> dict[str, Any]:
    """The state of an optimizer whose parameters have other numbers: `ours` where it had `theirs`."""
    number = {name: place for place, name in enumerate(ours)}
    groups = [group | {"lr": rate} for group, rate in zip(optimizer.state_dict()["param_groups"], rates, strict=True)]
    return {
        "state": {number[name]: state[place] for place, name in enumerate(theirs) if place in state},
        "param_groups": groups,
    }
