"""The command behind `make sweep`: trials until there are enough, what they found, and the best again."""

from optuna.trial import FrozenTrial, TrialState

from mmfusion.study.jobs import Plan
from mmfusion.study.processes import is_alive
from mmfusion.study.queue import GOES_ON
from mmfusion.study.runner import run_and_report
from mmfusion.study.signals import Signals
from mmfusion.sweep.again import FOLDER as AGAIN
from mmfusion.sweep.again import again
from mmfusion.sweep.book import Book
from mmfusion.sweep.definition import Sweep
from mmfusion.sweep.prefix import trained
from mmfusion.sweep.preflight import refuse_mistakes
from mmfusion.sweep.queue import Queue, say
from mmfusion.sweep.report import write_sweep
from mmfusion.sweep.trials import definition, prefix_of, reported
from mmfusion.sweep.wandb import write_wandb


def run_sweep(sweep: Sweep, plan: Plan, side_by_side: int = 1, seeds: int = 3) -> int:
    """Goes on until all trials are over, reports, and trains the best under `seeds` other seeds; the exit code.

    Several commands, on machines that share the folder, may run the same sweep. Raises ValueError for options that a
    run would refuse, for trials of another definition, and where the stages that trials share cannot be trained.
    """
    with Signals().caught() as signals:
        refuse_mistakes(sweep, plan)
        book = Book(sweep, plan.folder, definition(sweep, plan))
        with signals.counted():
            _trials(sweep, plan, book, side_by_side, signals)
        if signals.asked:
            say(f"stopped with {len(_over(book))} of {sweep.trials} trials over; {GOES_ON}")
            return 130
    print(f"report: {write_sweep(book, plan)}")
    best = book.best()
    if best is None:
        return 1
    if running := len(book.trials(TrialState.RUNNING)):
        say(f"{running} trials run on other machines; the last command reports all of them")
        return 0
    if not seeds or is_alive(plan.folder / AGAIN / ".lock"):
        return 0
    say(f"trial {best.number}, the best, and {sweep.experiment} as it is, each under {seeds} other seeds")
    failed = run_and_report(again(sweep, plan, best.number, best.params, seeds), side_by_side, False)
    if failed != 130:
        print(f"report: {write_sweep(book, plan)}")
    return failed


def report_alone(sweep: Sweep, plan: Plan) -> None:
    """Of the trials that are over. Raises ValueError where there is none, or where they are of other parameters."""
    print(f"report: {write_sweep(Book(sweep, plan.folder, reported(sweep), reads=True), plan)}")


def translate(sweep: Sweep, plan: Plan) -> None:
    """Writes the sweep for Weights & Biases, and says how to start it."""
    refuse_mistakes(sweep, plan)
    for path in write_wandb(sweep, plan):
        print(f"written: {path}; `wandb sweep {path}` on one machine, the `wandb agent` that it names on all")
    if sweep.prefix is not None and not prefix_of(plan).stage_checkpoint(sweep.prefix).is_file():
        print(f"agents train the stages until {sweep.prefix} in each run: a `make sweep` before trains them once")


def _trials(sweep: Sweep, plan: Plan, book: Book, side_by_side: int, signals: Signals) -> None:
    over = _over(book)
    say(f"sweep {sweep.name}: {len(over)} of {sweep.trials} trials over; {side_by_side} at a time; in {plan.folder}")
    if len(over) >= sweep.trials:
        return
    branch = None
    if sweep.prefix is not None:
        branch = trained(prefix_of(plan), sweep.prefix, book, signals)
    if not signals.asked:
        Queue(sweep, plan, book, side_by_side, signals, [] if branch is None else [f"--branch={branch}"]).run()


def _over(book: Book) -> list[FrozenTrial]:
    return book.trials(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
