"""A sweep's trials as processes, so many at a time: begun, watched, pruned; and what became of them, told to Optuna."""

import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import mean
from typing import IO

from optuna.trial import FrozenTrial, TrialState
from optuna.trial import Trial as Asked

from mmfusion.preemption import GO_ON, QUEUE_AGAIN
from mmfusion.retrieval.html.numbers import interval, number
from mmfusion.study.jobs import Plan
from mmfusion.study.processes import END, Child, is_alive, lock, start, stop
from mmfusion.study.progress import progress
from mmfusion.study.queue import GOES_ON
from mmfusion.study.signals import Signals
from mmfusion.study.slots import environment
from mmfusion.sweep.book import Book, is_looked_after
from mmfusion.sweep.definition import Sweep
from mmfusion.sweep.trials import Trial

PAUSE = 0.3  # seconds between two looks at what runs
TELL = 60.0  # seconds between two lines that say how far it is
LEFT = (GO_ON, QUEUE_AGAIN, -signal.SIGTERM)  # how a run ends that had to leave, and can be gone on with
WHY, MINUTES = "why", "minutes"  # what the book holds of a trial besides its values


@dataclass
class Running:
    """A trial that this command looks after, as `kept`, a locked file, tells the others."""

    job: Trial
    asked: Asked
    child: Child
    slot: int
    kept: IO[bytes]

    def minutes(self) -> float:
        return (time.time() - self.child.started) / 60


class Queue:
    """The sweep's trials on this machine. branch: checkpoint that they begin from, as command line options."""

    def __init__(
        self, sweep: Sweep, plan: Plan, book: Book, side_by_side: int, signals: Signals, begins_from: Sequence[str] = ()
    ) -> None:
        self.sweep, self.plan, self.book, self.signals = sweep, plan, book, signals
        self.begins_from, self.told = list(begins_from), time.monotonic()
        self.running: dict[int, Running] = {}
        self.environments = [environment(slot, side_by_side) for slot in range(side_by_side)]

    def run(self) -> None:
        """Until all trials are over, here or on other machines, or a signal came. Nothing runs on afterwards.

        Raises ValueError where the disk is full or the sweep's folder is taken away.
        """
        try:
            while not self.signals.asked:
                self.collect()
                self.start_some()
                if not self.running:
                    return
                time.sleep(PAUSE)
                if time.monotonic() - self.told > TELL:
                    self.tell_progress()
        except OSError as error:
            raise ValueError(f"{error}. The trials are stopped; once that is mended, {GOES_ON}") from error
        finally:
            self.stop_all()

    # ---- beginning ---------------------------------------------------------------------------------------------------

    def start_some(self) -> None:
        free = set(range(len(self.environments))) - {one.slot for one in self.running.values()}
        while free and not self.signals.asked:
            with self.book.alone():
                asked = self.left_behind() or self.new()
                if asked is None:
                    return
                self.begin(asked, free.pop())

    def left_behind(self) -> Asked | None:
        """A trial whose command died before it was over, to go on with; one that has its results is told at once."""
        for frozen in self.book.trials(TrialState.RUNNING):
            job = self.job(frozen)
            if frozen.number in self.running or is_looked_after(job.kept, job.log):
                continue
            asked = self.book.asked(frozen)
            if job.state() != "done":
                return asked
            self.tell(job, asked, [], None)
        return None

    def new(self) -> Asked | None:
        return self.book.asked() if len(self.book.trials()) < self.sweep.trials else None

    def job(self, trial: Asked | FrozenTrial) -> Trial:
        return Trial.of(self.plan, self.sweep, trial.number, trial.params)

    def begin(self, asked: Asked, slot: int) -> None:
        job = self.job(asked)
        resumed = job.state() == "resume"
        job.clear()
        job.kept.parent.mkdir(parents=True, exist_ok=True)
        kept = job.kept.open("ab")
        lock(kept)
        command = [*job.command(None, []), *([] if resumed else self.begins_from)]
        child = start(command, job.log, {"MMFUSION_VERSION": job.run.name, **self.environments[slot]})
        self.running[job.number] = Running(job, asked, child, slot, kept)
        say(f"trial {job.number} {'goes on' if resumed else 'starts'}: {described(asked.params)}; {self.left()}")

    # ---- watching ----------------------------------------------------------------------------------------------------

    def collect(self) -> None:
        for one in list(self.running.values()):
            rc = one.child.process.poll()
            if rc in LEFT and one.job.state() != "done":
                self.put_back(one)
            elif rc is not None:
                self.end(one, f"exit code {rc}")
            elif self.is_behind(one):
                stop([one.child], lambda: bool(self.signals.asked))
                self.end(one, None)

    def is_behind(self, one: Running) -> bool:
        """Whether the pruner gives the trial up; asked after each validation."""
        if self.sweep.pruner == "none":
            return False
        known = self.book.trials()[one.job.number].intermediate_values
        new = {step: value for step, value in one.job.validations().items() if step not in known}
        if not new:
            return False
        with self.book.alone():
            for step, value in new.items():
                one.asked.report(value, step)
            return bool(one.asked.should_prune())

    def put_back(self, one: Running) -> None:
        """A trial that had to leave stays as it is, and is the next one to begin once all that it started is gone."""
        stop([one.child], lambda: True)
        if not is_alive(one.job.log):
            say(f"trial {one.job.number} had to leave (exit code {one.child.process.returncode}): it goes on")
            self.running.pop(one.job.number).kept.close()

    def end(self, one: Running, failed: str | None) -> None:
        """failed: how, where its results are not there; None: it was stopped by the pruner."""
        why = None if failed is None else [failed, *one.child.tail()]
        with self.book.alone():
            self.tell(one.job, one.asked, why, one.minutes())
            del self.running[one.job.number]
        one.kept.close()

    def tell(self, job: Trial, asked: Asked, why: list[str] | None, minutes: float | None) -> None:
        """What became of a trial, to Optuna and the terminal. why: it has no results; None where it was pruned."""
        if minutes is not None:
            asked.set_user_attr(MINUTES, minutes)
        study, took = self.book.study, f" in {minutes:.1f} min" if minutes is not None else ""
        if job.state() == "done":
            try:
                cell = job.measured()
                study.tell(asked.number, cell["value"])
                say(f"trial {job.number} is done{took}: {number(cell['value'])} {interval(cell)}; {self.left()}")
                return
            except ValueError as error:  # no such metric, or no number
                why = [str(error)]
        if why is None:
            study.tell(asked.number, state=TrialState.PRUNED)
            say(f"trial {job.number} is pruned{took}, below the median of the others; {self.left()}")
            return
        asked.set_user_attr(WHY, why)
        study.tell(asked.number, state=TrialState.FAIL)
        last = "\n".join(f"    {line}" for line in why)
        say(f"trial {job.number} FAILED ({job.log}):\n{last}\n{self.left()}")

    def stop_all(self) -> None:
        """What still runs: its trials stay as they are, and the same command goes on with them."""
        asked = self.signals.asked
        stop([one.child for one in self.running.values()], lambda: self.signals.asked > asked)
        for one in list(self.running.values()):
            with suppress(OSError):  # a full disk
                if one.job.state() == "done":
                    self.end(one, None)
            one.kept.close()
        self.running.clear()

    # ---- telling -----------------------------------------------------------------------------------------------------

    def tell_progress(self) -> None:
        self.told = time.monotonic()
        far = {one.job.number: progress(one.child.said(END)) for one in self.running.values()}
        say("; ".join([*(f"trial {name}: {there or 'no step yet'}" for name, there in far.items()), self.left()]))

    def left(self) -> str:
        """How many are over, the best so far, and how long the others take here, from the minutes of those before."""
        over = self.book.trials(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        text, best = f"{len(over)} of {self.sweep.trials} trials over", self.book.best()
        if best is not None:
            text += f", best {number(best.value)} (trial {best.number})"
        known = [minutes for trial in over if (minutes := trial.user_attrs.get(MINUTES))]
        todo = max(0, self.sweep.trials - len(over))
        if known and todo:
            spent = sum(one.minutes() for one in self.running.values())
            together = max(1, len(self.book.trials(TrialState.RUNNING)), len(self.environments))
            text += f", about {max(0.0, todo * mean(known) - spent) / together:.0f} min left"
        return text


def described(params: Mapping[str, float | str]) -> str:
    """fusion Gated, hidden 2.3: options by their last word, as a line."""
    return ", ".join(
        f"{option.rpartition('.')[2]} {value if isinstance(value, str) else f'{value:.3g}'}"
        for option, value in params.items()
    )


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
