"""What training costs: samples a second in each stage, and parameters; in cost.json of the run's folder."""

import json
import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mmfusion.environment import MadeWith
from mmfusion.retrieval.files import replaced

FILE = "cost.json"
HEAD = "product.fusion."


class Cost(Callback):
    """{"stages": {name: {"samples", "seconds", "head", "rest"}}, "parameters": n}; written at the end of each epoch.

    Samples and seconds are of all steps but a stage's first, which may make ready what the others use, and without
    validations. head, rest: the parameters that the stage trains. parameters: of the whole model, frozen ones too.
    A run that was resumed counts on.
    """

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, Any]] = {}
        self.before: float | None = None  # end of the step before this one; None where its time does not count
        self.stage: str | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = self._made_with(trainer).run / FILE
        self.stages = json.loads(path.read_text(encoding="utf-8"))["stages"] if path.is_file() else {}
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
            size = sum(p.numel() for p in pl_module.parameters())
            with replaced(self._made_with(trainer).run / FILE) as beside:
                beside.write_text(json.dumps({"stages": self.stages, "parameters": size}, indent=2), encoding="utf-8")

    @staticmethod
    def _made_with(trainer: Trainer) -> MadeWith:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return next(callback for callback in callbacks if isinstance(callback, MadeWith))
