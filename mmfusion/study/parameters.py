"""How many parameters a run has and its stages train; in parameters.json of the run's folder."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mmfusion.environment import MadeWith
from mmfusion.optim import rate_of
from mmfusion.retrieval.files import replaced
from mmfusion.stages import Group, Stage

FILE = "parameters.json"
HEAD = "product.fusion."
ENCODERS = {"text": ("query.encoder.", "product.text.encoder."), "image": ("product.image.encoder.",)}


def trained(
    stages: Mapping[str, Stage], groups: Mapping[str, Group], assigned: Mapping[str, str], sizes: Mapping[str, int]
) -> dict[str, dict[str, int]]:
    """By stage: how many parameters of each of ENCODERS have a rate. assigned, sizes: of parameters, by name."""
    return {
        name: {
            part: sum(
                sizes[parameter]
                for parameter, group in assigned.items()
                if parameter.startswith(prefixes) and rate_of(groups, stage, group) != "frozen"
            )
            for part, prefixes in ENCODERS.items()
        }
        for name, stage in stages.items()
    }


class Parameters(Callback):
    """{"stages": {name: {"head", "rest"}}, "parameters": n, "trains": {stage: {part: n}}}.

    stages: those that this run has begun, and what each trains. parameters: of the whole model, frozen ones too.
    trains: of `trained`, for all stages, those too that a branched run begins after. A run that was resumed keeps what
    is there.
    """

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, int]] = {}
        self.stage: str | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stages, self.stage = {}, None
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # damaged: a run does not fail for that
            self.stages = dict(json.loads(_file(trainer).read_text(encoding="utf-8"))["stages"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module: Any = pl_module
        if module.stage_name == self.stage:
            return
        self.stage = str(module.stage_name)
        trains = {name: p.numel() for name, p in module.named_parameters() if p.requires_grad}
        head = sum(size for name, size in trains.items() if name.startswith(HEAD))
        self.stages[self.stage] = {"head": head, "rest": sum(trains.values()) - head}
        if trainer.is_global_zero:
            sizes = {name: p.numel() for name, p in module.named_parameters()}
            encoders = trained(module.stages, module.groups, module.assigned, sizes)
            content = {"stages": self.stages, "parameters": sum(sizes.values()), "trains": encoders}
            with replaced(_file(trainer)) as beside:
                beside.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _file(trainer: Trainer) -> Path:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next(callback for callback in callbacks if isinstance(callback, MadeWith)).run / FILE
