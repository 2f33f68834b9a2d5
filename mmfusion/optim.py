"""Parameter groups and learning-rate schedules: a table of regular expressions over names, rates per stage.

All groups exist from step 0 in a fixed order and the rate is a pure function of the step, so that a resumed run and a
straight one agree; the optimizer skips frozen parameters because their gradient is None.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from mmfusion.stages import Group, Rate, Stage, StagePlan


@dataclass
class Optim:
    """AdamW (Loshchilov & Hutter 2019).

    Args:
        weight_decay: of matrices; vectors (biases, norms, scales) are not decayed
        betas: decay rates of the two moments
        eps: added to the denominator
        layer_decay: factor on an encoder's rate from each layer to the one below, in (0, 1]: the top layer has the
            group's rate, the embeddings the lowest one (Howard & Ruder 2018, arXiv 1801.06146)
    """

    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.layer_decay <= 1:
            raise ValueError(
                f"model.optim.layer_decay is {self.layer_decay}; expected a factor in (0, 1], such as 0.8; 1.0 for none"
            )


def rate_of(groups: Mapping[str, Group], stage: Stage, group: str) -> Rate:
    return stage.rates.get(group, groups[group].rate)


def check_rates(groups: Mapping[str, Group], stages: Mapping[str, Stage]) -> None:
    """Raises ValueError for a rate that names no group, is negative, or for a bad regular expression."""
    for name, group in groups.items():
        try:
            re.compile(group.match)
        except re.error as error:
            raise ValueError(f"model.groups.{name}.match: {group.match!r} is no regular expression: {error}") from error
    for stage_name, stage in stages.items():
        for group_name in stage.rates:
            if group_name not in groups:
                near = difflib.get_close_matches(group_name, groups, 1)
                raise ValueError(
                    f"model.stages.{stage_name}.rates.{group_name}: there is no such group; "
                    f"model.groups has {', '.join(groups)}" + (f". Did you mean {near[0]}?" if near else "")
                )
    rates = [(f"model.groups.{name}.rate", group.rate) for name, group in groups.items()]
    rates += [(f"model.stages.{s}.rates.{g}", rate) for s, stage in stages.items() for g, rate in stage.rates.items()]
    for where, rate in rates:
        if rate != "frozen" and not rate > 0:
            raise ValueError(f"{where} must be positive, or `frozen`; received {rate}")


def assign(
    module: nn.Module, groups: Mapping[str, Group], stages: Mapping[str, Stage], switched_off: Sequence[str] = ()
) -> dict[str, str]:
    """The group of every parameter, by name: the first whose `match` is found in the name.

    A shared parameter is known by its first name; its other names must fall under the same rates in every stage.
    `switched_off` holds prefixes of parts that this model leaves out ("product.image.").

    Raises ValueError for a parameter that no group matches, and for a group that matches nothing, unless the part of
    the model that it names exists without parameters of its own, is switched off, or is shared under another name.
    """
    check_rates(groups, stages)
    aliases = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    group_of_alias = {
        name: next((g for g, group in groups.items() if re.search(group.match, name)), None) for name in aliases
    }
    unmatched = [name for name, group in group_of_alias.items() if group is None]
    if unmatched:
        raise ValueError(f"no group of model.groups ({', '.join(groups)}) matches the parameters {unmatched[:5]}")
    parts = [f"{name}." for name, _ in module.named_modules(remove_duplicate=False)] + list(switched_off)
    for name, group in groups.items():
        if not any(re.search(group.match, part) for part in [*aliases, *parts]):
            raise ValueError(
                f"model.groups.{name}.match: {group.match!r} matches no parameter; the parts of the model are "
                + ", ".join(sorted({".".join(alias.split(".")[:3]) for alias in aliases}))
            )
    assigned: dict[str, str] = {}
    first_name: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first = first_name.setdefault(id(parameter), name)
        own = group_of_alias[name]
        assert own is not None
        if first == name:
            assigned[name] = own
        for stage_name, stage in stages.items():
            rates = rate_of(groups, stage, assigned[first]), rate_of(groups, stage, own)
            if rates[0] != rates[1]:
                raise ValueError(
                    f"{first} and {name} are one shared parameter, but in stage {stage_name!r} "
                    f"group {assigned[first]!r} says {rates[0]} and group {own!r} says {rates[1]}: "
                    "give both the same rate"
                )
    return assigned


def shape(stage: Stage, progress: float) -> float:
    """The factor on a stage's rates at `progress` in [0, 1): linear warm-up, then the stage's decay towards 0."""
    if progress < stage.warmup:
        return progress / stage.warmup
    rest = (progress - stage.warmup) / (1 - stage.warmup)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * rest)), "linear": 1 - rest, "none": 1.0}[stage.decay]


def rate_at(step: int, group: str, groups: Mapping[str, Group], stages: Mapping[str, Stage], plan: StagePlan) -> float:
    """The learning rate of a group during an optimizer step, taken at the step's middle; 0 when frozen."""
    stage = stages[plan.names[plan.index(step)]]
    rate = rate_of(groups, stage, group)
    length = plan.ends[plan.index(step)] - ([0, *plan.ends])[plan.index(step)]
    return 0.0 if rate == "frozen" else rate * shape(stage, plan.progress(step) + 0.5 / length)


def build(
    module: nn.Module,
    assigned: Mapping[str, str],
    groups: Mapping[str, Group],
    stages: Mapping[str, Stage],
    plan: StagePlan,
    options: Optim,
    below_top: Mapping[str, int] = MappingProxyType({}),
) -> tuple[AdamW, LambdaLR]:
    """AdamW over two parameter groups (decayed matrices, undecayed vectors) per named group, and its schedule.

    The optimizer's base rate is 1 and the schedule returns the rate itself. below_top: by parameter, how many layers of
    its encoder are above; those of three layers below the top are the groups <group>/top-3.
    """
    named = dict(module.named_parameters())
    parameter_groups, lambdas = [], []
    for group in groups:
        names = [name for name, own in assigned.items() if own == group]
        for below in sorted({below_top.get(name, 0) for name in names}):
            layer = f"/top-{below}" if below else ""
            of_layer = [named[name] for name in names if below_top.get(name, 0) == below]
            for suffix, decayed in (("", True), ("/no_decay", False)):
                members = [parameter for parameter in of_layer if (parameter.ndim >= 2) == decayed]
                if members:
                    decay = options.weight_decay if decayed else 0.0
                    parameter_groups.append({"params": members, "name": group + layer + suffix, "weight_decay": decay})
                    lambdas.append(_schedule(group, groups, stages, plan, options.layer_decay**below))
    optimizer = AdamW(parameter_groups, lr=1.0, betas=options.betas, eps=options.eps)
    return optimizer, LambdaLR(optimizer, lambdas)


def _schedule(
    group: str, groups: Mapping[str, Group], stages: Mapping[str, Stage], plan: StagePlan, factor: float
) -> Callable[[int], float]:
    return lambda step: factor * rate_at(step, group, groups, stages, plan)
