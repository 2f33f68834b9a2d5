"""Where a run's numbers go: metrics.csv always, Weights & Biases offline without a key and online with one."""

import contextlib
import csv
import netrc
import os
import sys
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from lightning.fabric.loggers.csv_logs import _ExperimentWriter as FabricWriter
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from mmfusion.options import shown
from mmfusion.preemption import NOTICE
from mmfusion.runs.family import family


@dataclass
class Wandb:
    """Weights & Biases.

    Args:
        mode: auto is online when a key is at hand (WANDB_API_KEY or ~/.netrc), else offline; WANDB_MODE wins
        project: project's name
        entity: team or user; the account's default when none is given
        group: runs that belong together; when none is given the study or sweep, else the experiment's name
        tags: tags of the run, beside its experiment, encoders and primary view
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "mmfusion"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)

    def resolved(self) -> str:
        if self.mode != "auto":
            return self.mode
        return os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")


def server() -> str:
    """The address of W&B's server."""
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def has_key() -> bool:
    """Whether W&B's server, or that of WANDB_BASE_URL, would know who we are."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = server().split("//")[-1].split("/")[0]
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


class PatientWandbLogger(WandbLogger):
    """A scheduler's SIGTERM to every process of a job ends W&B's service, but not a run that has a step to save."""

    @rank_zero_only
    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().log_metrics(*args, **kwargs)
        except ConnectionError:
            if NOTICE.asked is None:
                raise


def leave_wandb(code: int, patience: float = 60.0) -> None:
    """Ends this process's W&B run as one that was preempted, with what it was told so far.

    code: exit code, for the service. patience: in seconds; without a network the service would try for hours.
    """
    import wandb  # noqa: PLC0415

    def end(run: Any) -> None:
        with contextlib.suppress(ConnectionError):
            run.mark_preempting()
            run.finish(exit_code=code)

    if wandb.run is not None:
        ending = threading.Thread(target=end, args=(wandb.run,), daemon=True)
        ending.start()
        ending.join(patience)


def make_loggers(run: Path, wandb: Wandb, tags: Sequence[str] = ()) -> list[Logger]:
    """The loggers of a run in folder `run` = <root>/<experiment>/<version>; a resumed run continues its W&B run.

    tags: what is known of it. W&B is given whole paths: its process may have begun in another folder than ours.
    """
    loggers: list[Logger] = [AppendingCSVLogger(run.parents[1], name=run.parent.name, version=run.name)]
    mode = wandb.resolved()
    if mode != "disabled":
        of_sweep = (family(run) or "").startswith("sweep ") or "WANDB_SWEEP_ID" in os.environ  # its agents set that
        loggers.append(
            PatientWandbLogger(
                name=_title(run), save_dir=str(run.absolute()), id=_wandb_id(run), resume="allow",
                job_type="sweep" if of_sweep else "train", settings=wandb_settings(mode), **_filed(run, wandb, tags),
            )
        )  # fmt: skip
    return loggers


def log_of_evaluation(folder: Path, run: Path, wandb: Wandb, tags: Sequence[str], options: Mapping[str, Any]) -> Any:
    """A wandb.Run for the evaluation of `run` in `folder`, of the job type `eval`; None where the run logs to none.

    An evaluation that is made again goes on with the same one.
    """
    mode = wandb.resolved()
    if mode == "disabled":
        return None
    from wandb import init  # noqa: PLC0415  (it takes a second, and only runs that log to it need it)

    return init(
        name=f"{_title(run)} {folder.name}", dir=str(folder.absolute()), id=_wandb_id(folder), resume="allow",
        job_type="eval", config=dict(options), settings=wandb_settings(mode), **_filed(run, wandb, tags),
    )  # fmt: skip


def _title(run: Path) -> str:
    return "/".join(run.resolve().parts[-2:])


def _filed(run: Path, wandb: Wandb, tags: Sequence[str]) -> dict[str, Any]:
    """Where W&B keeps what is logged of a run, and how it is found there."""
    group = wandb.group or family(run) or run.resolve().parent.name
    every = list(dict.fromkeys([*tags, *wandb.tags]))
    return {"project": wandb.project, "entity": wandb.entity, "group": group, "tags": every}


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
