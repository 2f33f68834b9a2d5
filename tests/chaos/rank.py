"""What a rank does: `mmfusion train` as torchrun would launch it, with a diary; rank 0 waits at its moment."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.dataset  # noqa: F401  (these are imported now, in the fork server, and not later in each process)
import s3fs  # noqa: F401
import torch
from lightning import Callback

import mmfusion.encoders.timm_model
import mmfusion.run  # noqa: F401
from mmfusion import stages
from mmfusion.cli import main
from mmfusion.sums import Summed
from tests.chaos.moments import ENDS, EVERY, STEPS, SWITCH, Moment

RANKS, PATIENCE = 2, 300.0  # seconds
OPTIONS = [
    "--exp=fusion_gated", "--resume=auto", "--data.batch_size=16", "--data.streams=4", "--data.image_size=[32, 32]",
    "--model.modality_dropout=0.2", "--model.ema=0.9", "--model.evaluation.baselines=false", "--wandb.mode=disabled",
    f"--checkpoint_steps={EVERY}", "--trainer.check_val_every_n_epoch=3", f"--trainer.devices={RANKS}",
    "--trainer.strategy=ddp", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false", f"--trainer.max_steps={STEPS}", "--guards.hang_minutes=3",
    f"--model.stages.adapt.until.fraction={ENDS[0] / STEPS}", f"--model.stages.align.until.fraction={ENDS[1] / STEPS}",
    "--trainer.callbacks+=tests.chaos.rank.Diary",
]  # fmt: skip
MISSED = "the next step"
NAMES = ("open", "os.rename", "os.link", "os.remove")  # Python's audit events


class Life:
    """A file of this process alone, and what its moment waits for. place: see Moment.place."""

    def __init__(self, folder: Path, attempt: int, rank: int, moment: Moment | None, place: int) -> None:
        self.path, self.go = folder / f"diary-{attempt}-{rank}", folder / f"go-{attempt}"
        self.moment, self.place = (moment if rank == 0 else None), place
        self.made(-1)

    def made(self, step: int) -> None:
        self.step, self.events = step, {"write": 0, "name": 0}

    def write(self, **line: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({**line, "time": time.time()}) + "\n")

    def wait(self, place: str) -> None:
        """To be killed; or to go on, where the other rank alone was."""
        self.write(at=place)
        self.moment, end = None, time.monotonic() + PATIENCE
        while not self.go.exists():
            time.sleep(0.01)
            if time.monotonic() > end:
                os._exit(3)

    def is_due(self, kind: str) -> bool:
        return self.moment is not None and (self.moment.kind, self.moment.step) == (kind, self.step)

    def event(self, kind: str, what: str) -> None:
        """The saving of checkpoints is about to do something."""
        self.events[kind] += 1
        if self.is_due("save") and self.moment.save == kind and self.events[kind] > self.place:
            self.wait(f"{what}, {self.events[kind]} in this save")
        if kind == "name":
            self.write(event=what)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event in NAMES and "checkpoints" in (path := Path(str(args[0]))).parts:
            self.event("name", f"{event} {path.name}")

    def switch(self, name: str) -> None:
        if self.is_due("switch") and SWITCH[self.place] == name:
            self.wait(f"switch, before {name}")


LIFE: Life


class Diary(Callback):
    def on_train_start(self, trainer, pl_module):
        LIFE.made(trainer.global_step)
        LIFE.write(began=trainer.global_step)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        made = {"loss": outputs["loss"].item().hex(), "ids": batch.product.id.tolist(), "stage": pl_module.stage_name}
        LIFE.write(step=trainer.global_step, **made, events=LIFE.events)
        LIFE.made(trainer.global_step)
        LIFE.switch("save")
        if LIFE.moment and LIFE.step > LIFE.moment.step:
            LIFE.wait(MISSED)

    def on_validation_start(self, trainer, pl_module):
        LIFE.write(validating=trainer.global_step)

    def on_validation_end(self, trainer, pl_module):
        LIFE.write(validated=trainer.global_step, primary=float(trainer.callback_metrics["val/primary"]).hex())

    def on_test_start(self, trainer, pl_module):
        LIFE.write(testing=True, began=trainer.global_step)

    def on_test_end(self, trainer, pl_module):
        LIFE.write(tested=True)
        if LIFE.moment:
            LIFE.wait("the evaluation's end")


def train(rank: int, folder: Path, shards: Path, attempt: int, moment: Moment | None, place: int, port: int) -> None:
    os.setsid()  # a process group, so that workers are killed too
    log = os.open(folder / f"log-{attempt}-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "GROUP_RANK": 0}
    launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "chaos"}
    os.environ |= {name: str(value) for name, value in launched.items()} | {"MMFUSION_CACHE": str(folder / "cache")}
    torch.set_num_threads(1)
    global LIFE  # noqa: PLW0603  (the command makes the callback)
    LIFE = Life(folder, attempt, rank, moment, place)
    LIFE.write(launched=True)
    sys.addaudithook(LIFE.audit)
    _tell_before(Summed, "write", lambda: LIFE.event("write", "a write"))
    for name in SWITCH[1:]:
        _tell_before(stages, name, lambda name=name: LIFE.switch(name))
    workers = moment.workers if moment else 0
    sys.argv = ["mmfusion", "train", f"--data={shards}", f"--data.workers={workers}", *OPTIONS]
    main()


def _tell_before(owner: Any, name: str, told: Callable[[], None]) -> None:
    function = getattr(owner, name)

    def both(*args: Any) -> Any:
        told()
        return function(*args)

    patch.object(owner, name, both).start()
