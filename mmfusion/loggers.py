"""Where a run's numbers go: metrics.csv always, Weights & Biases offline without a key and online with one."""

import csv
import netrc
import os
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from lightning.fabric.loggers.csv_logs import _ExperimentWriter as FabricWriter
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from mmfusion.options import shown


@dataclass
class Wandb:
    """Weights & Biases.

    Args:
        mode: auto is online when a key is at hand (WANDB_API_KEY or ~/.netrc), else offline; WANDB_MODE wins
        project: project's name
        entity: team or user; the account's default when none is given
        group: runs that belong together; the experiment's name when none is given
        tags: tags of the run
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "mmfusion"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)

    def resolved(self) -> str:
        if self.mode != "auto":
            return self.mode
        return os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


class AppendingCSVLogger(CSVLogger):
    """metrics.csv directly in the run folder; a resumed run appends, where Lightning's logger would start afresh."""

    @property
    @rank_zero_only
    def experiment(self) -> "_Writer":
        if self._experiment is None:
            os.makedirs(self.log_dir, exist_ok=True)
            self._experiment = _Writer(self.log_dir)
        return cast(_Writer, self._experiment)


class _Writer(FabricWriter):
    def __init__(self, log_dir: str) -> None:
        self.hparams: dict = {}
        super().__init__(log_dir)
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])

    def _check_log_dir_exists(self) -> None:
        """Earlier logs stay: a resumed run continues them."""

    def log_hparams(self, params: dict) -> None:
        self.hparams.update(params)


def make_loggers(run: Path, wandb: Wandb) -> list[Logger]:
    """The loggers of a run in folder `run` = <root>/<experiment>/<version>; a resumed run continues its W&B run."""
    loggers: list[Logger] = [AppendingCSVLogger(run.parents[1], name=run.parent.name, version=run.name)]
    mode = wandb.resolved()
    if mode != "disabled":
        loggers.append(
            WandbLogger(
                name=f"{run.parent.name}/{run.name}", save_dir=str(run), id=_wandb_id(run), resume="allow",
                project=wandb.project, entity=wandb.entity, group=wandb.group or run.parent.name, tags=wandb.tags,
                job_type="train", settings=wandb_settings(mode),
            )
        )  # fmt: skip
    return loggers


def wandb_settings(mode: str) -> Any:
    """The library stays silent: the last line on the terminal is the run's, not its own.

    The mode is given here as Lightning's `offline` goes through the environment, which the library reads only once.
    Its metadata (machine, system) hold the command as it was typed: where that has secrets, they are left out.
    """
    from wandb import Settings  # noqa: PLC0415  (it takes a second, and only runs that log to it need it)

    return Settings(silent=True, mode=cast(Any, mode), x_disable_meta=any(shown(arg) != arg for arg in sys.argv))


def _wandb_id(run: Path) -> str:
    """A function of the run folder's name and place, so that all ranks and a resumed run agree without a file."""
    return uuid.uuid5(uuid.NAMESPACE_URL, str(run.resolve())).hex[:12]
