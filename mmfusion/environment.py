"""What a run is made with: its resolved options, and versions, commit, command and machine."""

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mmfusion.options import shown

PACKAGES = (
    "torch",
    "lightning",
    "timm",
    "sentence-transformers",
    "transformers",
    "webdataset",
    "torchmetrics",
    "wandb",
)


def commit() -> str | None:
    """The checkout's commit, with `+` when files differ from it; None outside a checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed.strip() else "")


def environment() -> dict[str, Any]:
    return {
        "command": [Path(sys.argv[0]).name, *(shown(arg) for arg in sys.argv[1:])],
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


class MadeWith(Callback):
    """Writes config.yaml and environment.json once training starts: a start that is refused leaves a run as it was.

    Args:
        run: the run's folder
        config: the resolved options, as YAML
    """

    def __init__(self, run: Path, config: str) -> None:
        self.run, self.config = run, config

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.run.mkdir(parents=True, exist_ok=True)
            (self.run / "config.yaml").write_text(self.config)
            (self.run / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
        for logger in trainer.loggers:
            logger.log_hyperparams(yaml.safe_load(self.config))
