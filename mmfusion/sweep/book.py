"""The sweep's storage: Optuna's journal in a file, which several machines read and write in turn."""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from mmfusion.study.processes import is_alive
from mmfusion.sweep.definition import Sweep
from mmfusion.sweep.space import walked

JOURNAL = "journal.log"
DEFINITION = "definition"
NOTHING = "there is no sweep in {folder} yet: leave --report-only out"


class Book:
    """All trials of a sweep. What is written is written while `alone`."""

    def __init__(self, sweep: Sweep, folder: Path, definition: Mapping[str, Any], reads: bool = False) -> None:
        """definition: of `trials.definition`; where the command reads alone, of `trials.reported`.

        Raises ValueError where the trials in the folder are of another definition, and for nothing to read.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.sweep, self.folder = sweep, folder
        if reads and not (folder / JOURNAL).is_file():
            raise ValueError(NOTHING.format(folder=folder))
        folder.mkdir(parents=True, exist_ok=True)
        with self.alone():
            self.study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))), study_name=sweep.name,
                direction="maximize", load_if_exists=True,
                pruner=optuna.pruners.MedianPruner() if sweep.pruner == "median" else optuna.pruners.NopPruner(),
            )  # fmt: skip
            recorded = self.study.user_attrs.get(DEFINITION)
            if recorded is None and reads:  # a command was killed before the first trial
                raise ValueError(NOTHING.format(folder=folder))
            if recorded is None:
                self.study.set_user_attr(DEFINITION, dict(definition))
            else:
                self._refuse_change(recorded, definition)

    def _refuse_change(self, recorded: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
        told = {key.partition(".")[0] for key in ours}
        keys = sorted(key for key in recorded.keys() | ours.keys() if recorded.get(key) != ours.get(key))
        if keys := [key for key in keys if key.partition(".")[0] in told]:
            lines = [f"  {key} was {recorded.get(key)}, is {ours.get(key)}" for key in keys[:8]]
            raise ValueError(
                f"the trials in {self.folder} are of another definition or on other data:\n" + "\n".join(lines)
                + (f"\n  and {len(keys) - 8} more" if len(keys) > 8 else "")
                + "\nMake it as it was, or give the sweep another name (copy its file); only where the trials are not "
                "wanted any more, delete the folder"
            )  # fmt: skip

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other command, on any machine that shares the folder, begins, ends or looks for a trial meanwhile."""
        with (self.folder / ".lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            _end_last_line(self.folder / JOURNAL)
            yield

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def asked(self, begun: FrozenTrial | None = None) -> optuna.Trial:
        """A trial with a value of each parameter that it has: a function of its number and of the trials before.

        begun: the one that a command left behind, perhaps with a part of its values; None: a new one.
        """
        seed = 1000 * self.sweep.seed + (len(self.trials()) if begun is None else begun.number)
        samplers: dict[str, BaseSampler] = {  # constant_liar: trials that run side by side are not drawn close together
            "tpe": TPESampler(seed=seed, constant_liar=True), "random": RandomSampler(seed),
        }  # fmt: skip
        self.study.sampler = samplers[self.sweep.sampler]
        trial = self.study.ask() if begun is None else optuna.Trial(self.study, begun._trial_id)
        walked(self.sweep.parameters, lambda parameter: parameter.suggested(trial))
        return trial

    def best(self) -> FrozenTrial | None:
        complete = self.trials(TrialState.COMPLETE)
        return max(complete, key=lambda trial: trial.value or 0.0) if complete else None


def _end_last_line(journal: Path) -> None:
    """Takes away what a command that was killed, or had no room on the disk, left of a line: the next would join it."""
    if not journal.is_file():
        return
    with journal.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        if file.read(1) not in (b"", b"\n"):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def is_looked_after(kept: Path, log: Path) -> bool:
    """Whether the run of a trial lives, or the command that will tell of it."""
    return is_alive(kept) or is_alive(log)
