"""What a sweep found: report.json and report.html, the leaderboard on the terminal, the best as an experiment file."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
from optuna import visualization
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmfusion.retrieval.html.figures import Figure
from mmfusion.retrieval.html.gallery import gallery_data
from mmfusion.retrieval.html.numbers import interval, number
from mmfusion.retrieval.html.page import render, write_page
from mmfusion.retrieval.html.report import placed
from mmfusion.retrieval.report import write_results
from mmfusion.study.jobs import Plan
from mmfusion.sweep.again import FOLDER as AGAIN
from mmfusion.sweep.again import held
from mmfusion.sweep.best import write_best
from mmfusion.sweep.book import DEFINITION, Book
from mmfusion.sweep.queue import MINUTES, WHY, described
from mmfusion.sweep.space import arguments
from mmfusion.sweep.trials import Trial

FIRST = 10  # trials on the terminal
PLOTS: dict[str, Callable[[optuna.Study], Any]] = {
    "History": visualization.plot_optimization_history,
    "Importance of each option (PED-ANOVA)": visualization.plot_param_importances,
    "Parallel coordinates": visualization.plot_parallel_coordinate,
    "Slices": visualization.plot_slice,
}


def write_sweep(book: Book, plan: Plan, console: Console | None = None) -> Path:
    """Works at any time, with the trials that are over; returns the page."""
    report = told(book, plan)
    write_results(book.folder / "report.json", report)
    path = write_page(book.folder / "report.html", page(report, figures(book.study)))
    print_sweep(report, console or Console())
    return path


def told(book: Book, plan: Plan) -> dict[str, Any]:
    """All of report.json: {"sweep", "metric", "seed", "encoders", "data", "planned", "trials": [best first], "best":
    the experiment file, "importance": {option: share}, "again": {"claims", "seeds", "split"}}; `again` is of the best
    trained again, and empty before."""
    about, best = book.study.user_attrs[DEFINITION], book.best()
    rows = [_row(trial, Trial.of(plan, book.sweep, trial.number, trial.params)) for trial in book.trials()]
    order = {state.name: place for place, state in enumerate((TrialState.COMPLETE, TrialState.PRUNED))}
    rows.sort(key=lambda row: (order.get(row["state"], 2), -(row["value"] or 0.0), row["trial"]))
    experiment, verdict = None, dict[str, Any]()
    if best is not None:
        verdict = held(book.folder, best.number)
        job = Trial.of(plan, book.sweep, best.number, best.params)
        path = book.folder / f"{book.sweep.name}_best.yaml"
        options = [*about["args"], *arguments(book.sweep.parameters, best.params)]
        with suppress(FileNotFoundError):  # the trial's folder was taken away, once this was written
            write_best(path, job.run, about, options, job.measured())
        experiment = path if path.is_file() else None
    return {
        "sweep": book.sweep.name,
        "metric": about["metric"],
        "seed": about["seed"],
        "encoders": about["encoders"],
        "data": about["data"],
        "planned": book.sweep.trials,
        "trials": rows,
        "best": None if experiment is None else str(experiment),
        "importance": _importance(book.study),
        "again": {key: verdict.get(key, []) for key in ("claims", "seeds", "split")},
    }


def _row(trial: FrozenTrial, job: Trial) -> dict[str, Any]:
    """low, high: the interval over queries of the trial's own results; None where it has none."""
    cell: Mapping[str, Any] = {}
    with suppress(FileNotFoundError):  # its folder was taken away
        cell = job.measured() if trial.state == TrialState.COMPLETE else {}
    return {
        "trial": trial.number, "state": trial.state.name, "value": trial.value, "low": cell.get("low"),
        "high": cell.get("high"), "minutes": trial.user_attrs.get(MINUTES), "why": trial.user_attrs.get(WHY, []),
        "run": str(job.run.relative_to(job.plan.folder)), "setting": trial.params,
    }  # fmt: skip


def _varies(study: optuna.Study) -> bool:
    """Whether there is anything to plot."""
    return len({trial.value for trial in study.get_trials(states=(TrialState.COMPLETE,))}) > 1


def _importance(study: optuna.Study) -> dict[str, float]:
    with _quiet():
        return dict(optuna.importance.get_param_importances(study)) if _varies(study) else {}


def figures(study: optuna.Study) -> list[Figure]:
    """Optuna's plots, as the page's script draws them; none while there are no two values."""
    if not _varies(study):
        return []
    with _quiet():
        drawn = {title: json.loads(plot(study).to_json()) for title, plot in PLOTS.items()}
    for figure in drawn.values():
        figure["layout"] = {key: value for key, value in figure["layout"].items() if key not in ("template", "title")}
    return [
        {"title": title, "note": "", "height": 460, "legend": [], "data": figure["data"], "layout": figure["layout"]}
        for title, figure in drawn.items()
    ]


def _quiet() -> warnings.catch_warnings:
    """Optuna marks parts of its plots as experimental."""
    return warnings.catch_warnings(action="ignore")


def page(report: Mapping[str, Any], drawn: Sequence[Figure]) -> str:
    return render(
        "sweep.html.j2",
        {"figures": placed(list(drawn)), "gallery": gallery_data({}, [], [], [], {}), "primary": None},
        title=f"Sweep {report['sweep']}",
        report=report,
        figures=drawn,
        described=described,
        counted=counted(report),
        again=f"{AGAIN}/report.html",
    )


def counted(report: Mapping[str, Any]) -> str:
    """20 of 20 trials: 14 complete, 5 pruned, 1 fail."""
    states = [row["state"] for row in report["trials"]]
    kinds = ", ".join(f"{states.count(state)} {state.lower()}" for state in dict.fromkeys(states))
    return f"{len(states)} of {report['planned']} trials" + (f": {kinds}" if kinds else "")


def print_sweep(report: Mapping[str, Any], console: Console) -> None:
    """The first trials, what mattered, and whether it held under other seeds."""
    console.print(
        f"sweep {report['sweep']}: {report['metric']} under seed {report['seed']}, 95 % intervals over queries; "
        f"{counted(report)}", highlight=False, soft_wrap=True,
    )  # fmt: skip
    table = Table(box=None, pad_edge=False)
    for name in ("trial", report["metric"], "min", "setting"):
        table.add_column(name, no_wrap=name != "setting", overflow="fold")
    for row in report["trials"][:FIRST]:
        state = "" if row["state"] == "COMPLETE" else f" {row['state'].lower()}"
        minutes = "" if row["minutes"] is None else f"{row['minutes']:.1f}"
        reached = f"{number(row['value'])} {interval(row)}{state}"
        table.add_row(str(row["trial"]), Text(reached), minutes, Text(described(row["setting"])))
    console.print(table)
    if report["importance"]:
        shares = ", ".join(f"{option} {number(share)}" for option, share in report["importance"].items())
        console.print(Text(f"importance: {shares}"), soft_wrap=True)
    for claim in report["again"]["claims"]:
        console.print(Text(claim["sentence"]), soft_wrap=True)
    if report["best"]:
        console.print(Text(f"the best: make train EXP={report['best']} ENCODERS={report['encoders']}"), soft_wrap=True)
