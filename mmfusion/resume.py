"""RESUME=auto: which run, and which of its checkpoints, a command goes on with.

Every rank that a launcher starts decides for itself, before any can talk to another. So what decides is only what rank
0 writes once all have met (config.yaml, state.json, checkpoints); the folder that its loggers make earlier is no run.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from mmfusion.checkpoints import BEFORE, LAST
from mmfusion.state import own_job, read_state, written_by_another
from mmfusion.sums import damage

DECIDED = "MMFUSION_RESUME"  # for the ranks that Lightning starts: a checkpoint, or the folder of a run to begin


@dataclass(frozen=True)
class Start:
    """The run's folder, and the checkpoint to go on from; None: from the beginning."""

    folder: Path
    checkpoint: Path | None


def start_of(experiment: Path, new_folder: Callable[[], Path]) -> Start:
    """Goes on with the newest run in the folder `experiment` that is not done; a run of this cluster's job is first.

    Raises ValueError where another process writes the run. A job that is started once more
    when all of its work is done ends here, with exit code 0.
    """
    if inherited := os.environ.get(DECIDED):
        path = Path(inherited)
        return Start(path.parents[1], path) if path.suffix == ".ckpt" else Start(path, None)
    start = _decided(experiment, new_folder)
    os.environ[DECIDED] = str(start.checkpoint or start.folder)
    return start


def _decided(experiment: Path, new_folder: Callable[[], Path]) -> Start:
    runs = sorted(_runs(experiment), key=_touched, reverse=True)
    own = [run for run in runs if _is_own(run)]
    if own and _is_done(own[0]) and _is_restarted():
        rank_zero_info(f"resume=auto: {own[0]} is done, and so is the job that was started again")
        sys.exit(0)
    run = next((run for run in own + runs if not _is_done(run)), None)
    if run is None:
        rank_zero_info(f"resume=auto: no run in {experiment} is unfinished; a new one begins")
        return Start(new_folder(), None)
    if refusal := written_by_another(run):
        raise ValueError(refusal)
    checkpoint = _newest_whole(run)
    if checkpoint is not None:
        rank_zero_info(f"resume=auto: goes on from {checkpoint}")
        return Start(run, checkpoint)
    folder = run if run in own else new_folder()
    rank_zero_info(f"resume=auto: {run} has no whole checkpoint; begins anew in {folder}")
    return Start(folder, None)


def _runs(experiment: Path) -> list[Path]:
    return [path.parent for path in experiment.glob("*/config.yaml") if not path.parent.is_symlink()]


def _touched(run: Path) -> tuple[float, str]:
    """When the run was last written, in seconds since 1970."""
    if state := read_state(run):
        return state.updated, run.name
    paths = [run / "config.yaml", run / "checkpoints" / LAST]
    return max(path.stat().st_mtime for path in paths if path.exists()), run.name


def _is_done(run: Path) -> bool:
    state = read_state(run)
    return state.status == "done" if state else (run / "results.json").is_file()


def _is_own(run: Path) -> bool:
    """Of the cluster's job that this process is part of: the job began it, or went on with it."""
    job, state = own_job(), read_state(run)
    if job is None:
        return False
    if state is not None:
        return state.job == job
    return run.name == f"job-{job}" or run.name.startswith(f"job-{job}-")


def _is_restarted() -> bool:
    """Whether the scheduler, or torchrun, started this job's processes once more."""
    return any(os.environ.get(f"{name}_RESTART_COUNT", "0") != "0" for name in ("SLURM", "TORCHELASTIC"))


def _newest_whole(run: Path) -> Path | None:
    for path in (run / "checkpoints" / LAST, run / "checkpoints" / BEFORE):
        what = damage(path) if path.is_file() else None
        if path.is_file() and what is None:
            return path
        if what:
            rank_zero_info(f"resume=auto: {path} is left out: {what}")
    return None
