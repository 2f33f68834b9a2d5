"""An exponential moving average of the weights, over what the stage at hand trains, for whoever uses the model.

Lightning's WeightAveraging knows no stages: what was frozen would go on to drift towards its weights under a head that
is trained on the weights themselves, and it exchanges the two after the feature cache has looked at them. Hence:

- a part that becomes trainable starts its average at its weights of that step; a frozen part is its weights, so that
  the outputs which frozen encoders have given to training, and have stored, are those of the evaluated model;
- buffers are the weights' own: BatchNorm's statistics are averages over steps already;
- validations and checkpoints see the average; a checkpoint keeps the weights beside it, and going on is exact.
"""

from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mmfusion.stages import StagedModule

UNAVERAGED = "unaveraged"  # in a checkpoint: by name, the weights that training goes on from


class WeightAverage(Callback):
    """After each optimizer step, average = decay * average + (1 - decay) * weights: over some 1 / (1 - decay) steps.

    To come after StageSwitch among the callbacks, and before those that save. After a fit the module holds the average.

    Args:
        decay: between 0 and 1
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(
                f"model.ema is {decay}; expected a decay between 0 and 1, such as 0.99 (averages over some 100 steps), "
                "or null for none"
            )
        self._add = get_ema_multi_avg_fn(decay)
        self._forget()

    def _forget(self) -> None:
        self.average: dict[str, Tensor] = {}  # by a parameter's first name; in its place the weights while `_exchanged`
        self._weights: list[nn.Parameter] = []
        self._stage: int | None = None
        self._exchanged = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._forget()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step
        stage = cast(StagedModule, pl_module).stage
        if stage != self._stage:
            self._stage = stage
            self._start(pl_module)

    def _start(self, module: LightningModule) -> None:
        trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self._weights = list(trained.values())
        self.average = {
            name: self.average[name].to(weight.device) if name in self.average else weight.detach().clone()
            for name, weight in trained.items()
        }

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._step:  # a batch that only accumulates makes no step
            self._add(tuple(self.average.values()), tuple(self._weights), None)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._exchange(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._exchange(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._exchanged:
            self._exchange(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._exchange(pl_module)
        self._forget()

    @torch.no_grad()
    def _exchange(self, module: LightningModule) -> None:
        """In place, one tensor at a time: DDP and the optimizer know parameters by their storage."""
        weights = dict(module.named_parameters())
        for name, average in self.average.items():
            weight = weights[name]
            before = weight.detach().clone()
            weight.copy_(average)
            average.copy_(before)
        self._exchanged = not self._exchanged

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The average under every name of a shared parameter; the weights under the first."""
        if not self.average:
            return
        state = checkpoint["state_dict"]
        if self._exchanged:
            checkpoint[UNAVERAGED] = self.average
            return
        checkpoint[UNAVERAGED] = {name: state[name] for name in self.average}
        first = {weight: name for name, weight in pl_module.named_parameters()}
        for name, weight in pl_module.named_parameters(remove_duplicate=False):
            if first[weight] in self.average:
                state[name] = self.average[first[weight]]

    @torch.no_grad()
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The model has loaded the average by now: that is all, unless training goes on."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        weights = dict(pl_module.named_parameters())
        for name, weight in checkpoint.get(UNAVERAGED, {}).items():
            self.average[name] = weights[name].detach().clone()
            weights[name].copy_(weight)
