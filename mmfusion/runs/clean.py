"""`make clean-runs`: old runs go, once the user has seen which. What might be needed stays, and it is said why."""

import os
import re
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmfusion.retrieval.html.numbers import number
from mmfusion.runs.found import CONFIG, FoundRun, find_runs
from mmfusion.runs.listing import age
from mmfusion.runs.references import references
from mmfusion.runs.sync import logs_of

CHECKPOINTS = "checkpoints"
LEFT_BY_RUNS = {  # what else lies in a run's folder was put there by hand
    CONFIG, "environment.json", "state.json", "state.json.partial", "state.json.claim", "metrics.csv", "results.json",
    "zero_shot.json", "parameters.json", "speed.json", "report.html", "per_query.parquet", "rankings.parquet",
    "products.parquet", CHECKPOINTS, "eval", "wandb", "profile", "stacks",
}  # fmt: skip
OF_CHECKPOINTS = re.compile(r"((last|before|best|stage-.+)\.ckpt|SHA256SUMS)(\.partial)?")


@dataclass(frozen=True)
class Order:
    """What is to go.

    keep: how many runs of each experiment stay, the last written; and as many of those that are done. experiment: the
    only one; None: all. checkpoints_only: numbers and pages stay. unfinished: runs too that RESUME=auto could go on
    with.
    """

    keep: int
    experiment: str | None = None
    checkpoints_only: bool = False
    unfinished: bool = False

    def target(self, run: FoundRun) -> Path:
        return run.folder / CHECKPOINTS if self.checkpoints_only else run.folder


@dataclass(frozen=True)
class Choice:
    """Runs that go, and by folder why others do not."""

    go: list[FoundRun]
    stay: dict[Path, str]


def clean_runs(root: Path, order: Order, yes: bool) -> None:
    """Asks, unless `yes`, and removes. Raises ValueError where nobody is there to ask, and for a folder of one
    experiment: what its runs are needed for may lie in others."""
    runs = list(find_runs(root))
    if any(root in (run.folder, run.folder.parent) for run in runs):
        raise ValueError(
            f"RUNS={root} has runs of one experiment alone; expected the folder of all. ARGS=--experiment={root.name} "
            "cleans that one"
        )
    choice = chosen(root, runs, order)
    for why, count in Counter(choice.stay.values()).items():
        places = [str(folder) for folder, reason in choice.stay.items() if reason == why]
        print(f"stays: {places[0] if count == 1 else f'{count} runs'}: {why}")
    if not choice.go:
        print("nothing is to go")
        return
    for run in choice.go:
        print(f"would go: {_told(run, order)}")
    sizes = sum(size(order.target(run)) for run in choice.go)
    what = f"{'the checkpoints of ' if order.checkpoints_only else ''}{len(choice.go)} run{'s'[: len(choice.go) != 1]}"
    if not yes and not _agreed(f"remove {what}, {readable(sizes)}?"):
        print("nothing was removed")
        return
    removed = [run for run in choice.go if _remove(run, order)]
    print(f"removed {len(removed)} of {len(choice.go)}")


def chosen(root: Path, runs: Sequence[FoundRun], order: Order) -> Choice:
    now = time.time()
    newest = _newest(runs, order.keep, now)
    needed = references(root, runs)
    go, stay = [], {}
    for run in sorted(runs, key=lambda run: run.written):
        if order.experiment not in (None, run.experiment) or not order.target(run).exists():
            continue
        if (why := _why_not(run, order, now)) or (why := newest.get(run.folder)):
            stay[run.folder] = why
        elif run.folder in needed:
            stay[run.folder] = f"{needed[run.folder]} names it"
        else:
            go.append(run)
    return Choice(go, stay)


def _newest(runs: Sequence[FoundRun], keep: int, now: float) -> dict[Path, str]:
    by_experiment = defaultdict(list)
    for run in sorted(runs, key=lambda run: -run.written):
        if run.family is None:
            by_experiment[run.folder.parent].append(run)
    found: dict[Path, str] = {}
    for folder, of_it in by_experiment.items():
        done = [run for run in of_it if run.status(now) == "done"]
        found |= {run.folder: f"among the newest {keep} of {folder.name}" for run in [*of_it[:keep], *done[:keep]]}
    return found


def _why_not(run: FoundRun, order: Order, now: float) -> str | None:
    """What of the run itself keeps it."""
    foreign = _foreign(run.folder, order)
    if run.linked or order.target(run).is_symlink():
        return "it is a symbolic link, or was found through one"
    if run.family is not None:
        return f"it is of {run.family}"
    if run.is_written(now):
        return "it is running"
    if run.status(now) != "done" and run.has_checkpoint and not order.unfinished:
        return "RESUME=auto could go on with it (ARGS=--unfinished removes such runs, too)"
    if foreign:
        return f"it holds what no run writes: {', '.join(foreign[:3])}{' ...' if foreign[3:] else ''}"
    return None


def _foreign(run: Path, order: Order) -> list[str]:
    """Of what is to go, what was put there by hand."""
    beside = [] if order.checkpoints_only else [path.name for path in run.iterdir() if path.name not in LEFT_BY_RUNS]
    within = [path.name for path in (run / CHECKPOINTS).glob("*") if not OF_CHECKPOINTS.fullmatch(path.name)]
    return sorted(beside) + sorted(f"{CHECKPOINTS}/{name}" for name in within)


def _told(run: FoundRun, order: Order) -> str:
    test = run.measured("test")
    value = f", test {test[0]} {number(test[1]['value'])}" if test else ""
    unsent = any(log.unsent for log in logs_of(run.folder)) and not order.checkpoints_only
    return (
        f"{order.target(run)} ({readable(size(order.target(run)))}, {run.status(time.time())}, "
        f"{age(time.time() - run.written)} old{value}{', its W&B log was never sent' if unsent else ''})"
    )


def _agreed(question: str) -> bool:
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except KeyboardInterrupt:
        print()
        return False
    except EOFError:
        print()
        raise ValueError("nobody is there to be asked: ARGS=--yes removes without") from None


def _remove(run: FoundRun, order: Order) -> bool:
    """Whether it went; it does not where it has begun to run, or has changed into something else, meanwhile."""
    now = FoundRun(run.folder)
    if _why_not(now, order, time.time()) or now.written != run.written:
        print(f"stays: {run.folder}: it has changed meanwhile", file=sys.stderr)
        return False
    if order.checkpoints_only:
        shutil.rmtree(run.folder / CHECKPOINTS)
        return True
    for path in run.folder.iterdir():  # config.yaml last: what is left half-way is still known as a run
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != CONFIG:
            path.unlink()
    (run.folder / CONFIG).unlink()
    run.folder.rmdir()
    return True


def size(folder: Path) -> int:
    """Bytes of all files below; what has two names there (last and before) counts once."""
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in _stats(folder)}.values())


def _stats(folder: Path) -> Iterator[os.stat_result]:
    for place, _, files in os.walk(folder):
        yield from (Path(place, name).lstat() for name in files)


def readable(count: float) -> str:
    """12 B, 3.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
