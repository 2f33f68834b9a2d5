"""`make runs`: a table of runs, the last written first; those of studies and sweeps are counted, unless asked for."""

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmfusion.retrieval.html.numbers import interval, number
from mmfusion.runs.found import Cell, FoundRun, find_runs

WIDE = 130  # columns of a terminal that has room for what the run's folder says as well
PIPED = 250  # columns where nobody sees where lines end


@dataclass(frozen=True)
class Row:
    """What is told of a run. best_val: the best validation in the last stage. test: of its primary metric.

    step: optimizer steps made, of `steps`. updated: when it was last written, in seconds since 1970; age: since then.
    """

    run: str
    experiment: str
    family: str | None
    status: str
    stage: str | None
    step: int | None
    steps: int | None
    best_val: float | None
    metric: str | None
    test: Cell | None
    updated: float
    age: float
    commit: str | None
    message: str | None

    @classmethod
    def of(cls, run: FoundRun, now: float) -> "Row":
        state, (metric, test) = run.state, run.measured("test") or (None, None)
        return cls(
            str(run.folder), run.experiment, run.family, run.status(now), state.stage if state else None,
            state.step if state else None, state.steps if state else None, run.best(), metric, test,
            run.written, max(0.0, now - run.written), run.commit, state.message if state else None,
        )  # fmt: skip


def list_runs(root: Path, experiment: str | None = None, everything: bool = False, as_json: bool = False) -> None:
    """Prints the runs below `root`, of one experiment where it is named.

    everything: those of studies and sweeps too, which are counted otherwise, unless `root` has no others. Raises
    ValueError where there is none, FileNotFoundError where there is no folder.
    """
    now = time.time()
    found = sorted(find_runs(root), key=lambda run: (-run.written, str(run.folder)))
    rows = [Row.of(run, now) for run in found if experiment in (None, run.experiment)]
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    if not rows:
        there = ", ".join(sorted({run.experiment for run in found}))
        raise ValueError(
            f"{root} holds no run" + (f" of {experiment}; there are runs of {there}" if experiment and there else "")
        )
    _print(rows, everything, Console() if sys.stdout.isatty() else Console(width=PIPED))


def _print(rows: Sequence[Row], everything: bool, console: Console) -> None:
    families = list(dict.fromkeys(row.family for row in rows))
    for name in sorted(families, key=lambda name: name or ""):
        of_it = [row for row in rows if row.family == name]
        if name is None or everything or len(families) == 1:
            console.print(_table(name or "run", of_it, console.width >= WIDE))
            for row in of_it:
                if row.status == "failed" and row.message:
                    console.print(Text(f"{row.run} failed: {row.message}"), soft_wrap=True)
        else:
            of_status = Counter(row.status for row in of_it).most_common()
            counts = ", ".join(f"{count} {status}" for status, count in of_status)
            console.print(Text(f"{name}: {len(of_it)} runs ({counts}); --all lists them"), soft_wrap=True)


def _table(title: str, rows: Sequence[Row], wide: bool) -> Table:
    metrics = {row.metric for row in rows if row.metric}
    table = Table(box=None, pad_edge=False)
    table.add_column(title, overflow="fold")
    for name in ("stage", "step", "status", "best val", "test", "age"):
        table.add_column(name, justify="right" if name in ("step", "best val", "age") else "left")
    for name in ("experiment", "commit") if wide else ():
        table.add_column(name)
    for row in rows:
        cells = [
            row.run, row.stage or "–", "–" if row.step is None else f"{row.step} of {row.steps}", row.status,
            number(row.best_val), _tested(row, wide, len(metrics) > 1), age(row.age), row.experiment,
            _short(row.commit),
        ]  # fmt: skip
        table.add_row(*map(Text, cells[: len(table.columns)]))
    if len(metrics) == 1:
        table.caption, table.caption_justify = f"test: {metrics.pop()}", "left"
    return table


def _tested(row: Row, wide: bool, named: bool) -> str:
    if row.test is None:
        return "–"
    return f"{number(row.test['value'])} {interval(row.test) if wide else ''} {row.metric if named else ''}".strip()


def _short(commit: str | None) -> str:
    """With the + of a checkout that had changes."""
    return f"{commit[:7]}{'+' if commit.endswith('+') else ''}" if commit else "–"


def age(seconds: float) -> str:
    """40 s, 12 min, 3 h, 5 d."""
    for unit, length, until in (("s", 1, 90), ("min", 60, 90 * 60), ("h", 3600, 48 * 3600)):
        if seconds < until:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"
