"""What a stage is, which stage a step belongs to, and the callback that switches between them under DDP.

The stage is a pure function of the optimizer step. At a switch (mid-epoch too) the callback sets `requires_grad`, puts
frozen parts into eval mode, drops their gradients and wraps the module in DDP again: DDP reduces only what was
trainable when it wrapped, so a plain unfreeze leaves the ranks to drift (lightning #20340). A fresh start and a resumed
run take the same path: the first batch finds that no stage has been applied.
"""

import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from mmfusion.ranks import check_ranks_agree, sync_buffers, wrap_again

Rate = float | Literal["frozen"]


@dataclass
class Until:
    """Where a stage ends, counted from the start of the run: exactly one of the three.

    Args:
        epochs: epochs of the stream; a broken number ends the stage mid-epoch
        steps: optimizer steps
        fraction: of the run's optimizer steps, in (0, 1]
    """

    epochs: float | None = None
    steps: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if len(given) != 1:
            raise ValueError(f"until takes exactly one of epochs, steps, fraction; received {given or 'none'}")
        name, value = next(iter(given.items()))
        if value <= 0 or (name == "fraction" and value > 1):
            raise ValueError(
                f"until.{name} must be positive{', at most 1' if name == 'fraction' else ''}; received {value}"
            )

    def step(self, total_steps: int, steps_per_epoch: float) -> int:
        """The first optimizer step that no longer belongs to the stage."""
        if self.steps is not None:
            return self.steps
        if self.epochs is not None:
            return round(self.epochs * steps_per_epoch)
        assert self.fraction is not None
        return round(self.fraction * total_steps)


@dataclass
class LossWeights:
    """Weight of each term in a stage's loss; a term of weight 0 is not computed.

    Args:
        query_product: the query with the fused product
        query_text: the query with the product's text
        query_image: the query with the product's photo
        text_image: the product's text with its own photo
        more: the terms of losses.more, by name
    """

    query_product: float = 0.0
    query_text: float = 0.0
    query_image: float = 0.0
    text_image: float = 0.0
    more: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        negative = {name: weight for name, weight in self._all().items() if weight < 0}
        if negative:
            raise ValueError(f"loss weights must not be negative; received {negative}")

    def active(self) -> dict[str, float]:
        return {name: weight for name, weight in self._all().items() if weight > 0}

    def _all(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "more"} | self.more


@dataclass
class Group:
    """Parameters that share a learning rate. The first group whose `match` is found in a parameter's name takes it.

    Args:
        match: regular expression, searched in names such as product.image.encoder.network.conv_stem.weight
        rate: peak learning rate, or `frozen`; a stage may give another
    """

    match: str
    rate: Rate = "frozen"


@dataclass
class Stage:
    """A part of the run with its own losses and learning rates.

    Args:
        until: where the stage ends
        losses: weight of each loss term
        rates: learning rates of groups that differ from the group's own; `frozen` is a rate
        warmup: fraction of the stage over which the rates rise from 0
        decay: course of the rates after the warm-up, towards 0 at the stage's end
    """

    until: Until
    losses: LossWeights
    rates: dict[str, Rate] = field(default_factory=dict)
    warmup: float = 0.05
    decay: Literal["cosine", "linear", "none"] = "cosine"

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ValueError(f"a stage's warmup is a fraction of it, from 0 to below 1; received {self.warmup}")


@dataclass
class StagePlan:
    """Stages laid over the steps of a run. `ends[i]` is the first step after stage i."""

    names: list[str]
    ends: list[int]

    @classmethod
    def lay(cls, stages: Mapping[str, Stage], total_steps: int, steps_per_epoch: float) -> "StagePlan":
        """Raises ValueError when the stages are empty, out of order, or do not end with the run."""
        ends = [stage.until.step(total_steps, steps_per_epoch) for stage in stages.values()]
        laid = ", ".join(f"{name} until step {end}" for name, end in zip(stages, ends, strict=True))
        if not stages:
            raise ValueError("model.stages is empty: a run needs at least one stage")
        if any(end <= start for start, end in zip([0, *ends], ends, strict=False)):
            raise ValueError(f"every stage must end after the one before it ({laid}; the run has {total_steps} steps)")
        if ends[-1] != total_steps:
            raise ValueError(
                f"the last stage must end with the run: {laid}, but the run has {total_steps} steps. "
                "Set until: {fraction: 1.0} on the last stage, or trainer.max_steps / trainer.max_epochs to match"
            )
        return cls(list(stages), ends)

    def index(self, step: int) -> int:
        """The stage of optimizer step `step`; steps past the end belong to the last stage."""
        return min(sum(step >= end for end in self.ends), len(self.ends) - 1)

    def progress(self, step: int) -> float:
        """How far step is through its stage, in [0, 1)."""
        i = self.index(step)
        start = self.ends[i - 1] if i else 0
        return (step - start) / (self.ends[i] - start)


def set_modes(module: nn.Module) -> None:
    """Train mode where something is trainable, eval mode (BatchNorm, dropout, augmentation) where all is frozen."""
    parameters = list(module.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        module.eval()
        return
    module.training = True
    for child in module.children():
        set_modes(child)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In eval mode; afterwards every part is in the mode that it had."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def summarise(names: Iterable[str]) -> str:
    """Parameter names as the parts of the model they belong to: `product.fusion (12), losses.query_product (1)`."""
    counts: dict[str, int] = {}
    for name in names:
        part = re.sub(r"^((?:product|losses)\.[^.]+|[^.]+)(?:\.(encoder|projection))?.*", r"\1.\2", name).rstrip(".")
        counts[part] = counts.get(part, 0) + 1
    return ", ".join(f"{part} ({count})" for part, count in counts.items()) or "none"


class StagedModule(LightningModule):
    """What StageSwitch asks of a module. `stage` is the index of the stage that is applied."""

    stage_plan: StagePlan
    stage: int = 0

    @property
    def stage_name(self) -> str:
        return self.stage_plan.names[self.stage]

    @abstractmethod
    def trainable(self, index: int, batch: Any) -> tuple[list[str], list[str]]:
        """Names of the parameters that stage `index` trains, and of those that it would, if its losses reached them.

        `batch` is the batch at hand.
        """

    def on_stage(self, index: int) -> None:
        """Called when the stage's parameters are trainable and its modes set, before DDP wraps again."""
        self.stage = index


class StageSwitch(Callback):
    """Applies the stage of the current step before the step's forward pass, on every rank, to a StagedModule."""

    def __init__(self) -> None:
        self.applied: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.applied = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        module = cast(StagedModule, pl_module)
        index = module.stage_plan.index(trainer.global_step)
        if index != self.applied:
            self.apply(trainer, module, index, batch)
            self.applied = index

    def apply(self, trainer: Trainer, module: StagedModule, index: int, batch: Any) -> None:
        name = module.stage_plan.names[index]
        check_ranks_agree(module, f"before stage {name!r}")
        sync_buffers(module)
        trainable, unreached = module.trainable(index, batch)
        if not trainable:
            raise ValueError(f"stage {name!r} trains nothing: every group that its losses reach is frozen")
        for parameter_name, parameter in module.named_parameters():
            parameter.requires_grad_(parameter_name in trainable)
            if not parameter.requires_grad:
                parameter.grad = None
        set_modes(module)
        module.on_stage(index)
        wrap_again(trainer)
        frozen = [n for n, p in module.named_parameters() if not p.requires_grad and n not in unreached]
        rank_zero_info(
            f"stage {name}: from step {trainer.global_step} to {module.stage_plan.ends[index]}\n"
            f"  trains {summarise(trainable)}\n  frozen by its rates: {summarise(frozen)}\n"
            f"  frozen because no loss of the stage reaches it: {summarise(unreached)}"
        )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_ranks_agree(pl_module, f"at step {trainer.global_step}")
        sync_buffers(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_ranks_agree(pl_module, "at the end of training")
        sync_buffers(pl_module)
