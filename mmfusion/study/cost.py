"""What training costs: samples a second in each stage, and parameters; in cost.json of the run's folder."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mmfusion.environment import MadeWith
from mmfusion.optim import rate_of
from mmfusion.retrieval.files import replaced
from mmfusion.stages import Group, Stage

FILE = "cost.json"
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


class Cost(Callback):
    """{"stages": {name: {"samples", "seconds", "head", "rest"}}, "parameters": n, "trains": {stage: {part: n}}}.

    Written at the end of each epoch. Samples and seconds are of all steps but a stage's first, which may make ready
    what the others use, and without validations. head, rest: the parameters that the stage trains. parameters: of the
    whole model, frozen ones too. trains: of `trained`, for all stages, those too that a branched run begins after.
    A run that was resumed counts on.
    """

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, Any]] = {}
        self.before: float | None = None  # end of the step before this one; None where its time does not count
        self.stage: str | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = self._made_with(trainer).run / FILE
        self.stages = {}
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # damaged: a run does not fail for that
            self.stages = dict(json.loads(path.read_text(encoding="utf-8"))["stages"])
        self.before = self.stage = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, name = time.monotonic(), str(pl_module.stage_name)
        if name != self.stage:
            self.stage, self.before = name, None
            trained = {key: p.numel() for key, p in pl_module.named_parameters() if p.requires_grad}
            head = sum(size for key, size in trained.items() if key.startswith(HEAD))
            counted = {"samples": 0, "seconds": 0.0} | self.stages.get(name, {})
            self.stages[name] = counted | {"head": head, "rest": sum(trained.values()) - head}
        if self.before is not None:
            self.stages[name]["samples"] += len(batch) * trainer.world_size
            self.stages[name]["seconds"] += now - self.before
        self.before = now

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            module: Any = pl_module
            sizes = {name: p.numel() for name, p in module.named_parameters()}
            trains = trained(module.stages, module.groups, module.assigned, sizes)
            content = {"stages": self.stages, "parameters": sum(sizes.values()), "trains": trains}
            with replaced(self._made_with(trainer).run / FILE) as beside:
                beside.write_text(json.dumps(content, indent=2), encoding="utf-8")

    @staticmethod
    def _made_with(trainer: Trainer) -> MadeWith:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return next(callback for callback in callbacks if isinstance(callback, MadeWith))
