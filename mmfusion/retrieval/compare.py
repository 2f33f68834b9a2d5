"""Runs side by side: their numbers, and what differs in how they were made."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmfusion.retrieval.report import (
    in_column,
    label_columns,
    primary_view,
    read_results,
    results_table,
    splits,
)

# where a run is kept and logged and what it is called says nothing about what it does
UNTOLD = re.compile(
    r"experiment|runs|resume|wandb(\..*)?|trainer\.(logger|default_root_dir)(\..*)?|.*\.(save_dir|dirpath)"
)


def compare(runs: Sequence[Path], split: str | None = None, console: Console | None = None) -> None:
    """Prints the runs' views side by side, the primary one first, best values bold; then what differs between them.

    split: by default `test`, or else the first that all have. Raises ValueError on a run that has no results.json.
    """
    console = console or Console()
    named = _named(runs)
    results = {name: _results(run) for name, run in named.items()}
    split = split or _common_split(results)
    views = {name: _views(name, result, split) for name, result in results.items()}
    for name, run in named.items():
        console.print(f"{name[0]}  {run}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{split}, with 95 % intervals", highlight=False)
    console.print(results_table(_sections(views), mark_best=len(runs) > 1))
    made = {name[0]: _made(run, results[name]) for name, run in named.items()}
    if len({settings.get("run.manifest") for settings in made.values()}) > 1:
        console.print("These runs were evaluated on different data: their numbers do not compare.", style="yellow")
    if len(runs) > 1:
        _print_differences(differences(made), list(made), console)


def differences(made: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The dotted keys whose values differ, each with the runs' values in order; None where a run has no such key."""
    keys = dict.fromkeys(key for settings in made.values() for key in settings if not UNTOLD.fullmatch(key))
    rows = {key: [settings.get(key) for settings in made.values()] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def _results(run: Path) -> dict[str, Any]:
    if not (run / "results.json").is_file():
        found = "no such folder" if not run.exists() else "it holds none"
        raise ValueError(f"{run}: expected a run folder with results.json, {found}; finish it or `make eval RUN={run}`")
    return read_results(run / "results.json")


def _named(runs: Sequence[Path]) -> dict[str, Path]:
    """The runs as "A <experiment>", "B <experiment>" ...: a letter, and what fits into a narrow table."""
    if not 0 < len(runs) <= len(ascii_uppercase):
        raise ValueError(f'received {len(runs)} runs; compare 1 to 26, as in make compare RUNS="runs/a runs/b"')
    if len({run.resolve() for run in runs}) < len(runs):
        raise ValueError(f"a run is named twice: {', '.join(map(str, runs))}; name each once")
    return {f"{letter} {_home(run).parent.name:.18}": run for letter, run in zip(ascii_uppercase, runs, strict=False)}


def _home(run: Path) -> Path:
    """The run's own folder runs/<exp>/<version>, of an evaluation under its eval/ too."""
    run = run.resolve()
    return run.parents[1] if run.parent.name == "eval" else run


def _common_split(results: Mapping[str, Mapping[str, Any]]) -> str:
    first, *others = [splits(result) for result in results.values()]
    common = [split for split in first if all(split in other for other in others)]
    if not common:
        have = "; ".join(f"{name}: {', '.join(splits(result)) or 'none'}" for name, result in results.items())
        raise ValueError(f"the runs have no split in common ({have}); evaluate one of them on the other's split")
    return "test" if "test" in common else common[0]


def _views(name: str, result: Mapping[str, Any], split: str) -> dict[str, Any]:
    if split not in splits(result):
        raise ValueError(f"run {name} has no results on {split!r}, only on: {', '.join(splits(result)) or 'nothing'}")
    return result[split]


def _sections(views: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """sections["<view>, <label column>"][run]: the primary views of all runs in one section, then the other views."""
    sections: dict[str, dict[str, Any]] = {}
    primary = {name: primary_view(run) for name, run in views.items()}
    title = "/".join(dict.fromkeys(primary.values()))
    others = dict.fromkeys(view for name, run in views.items() for view in run if view != primary[name])
    for column in label_columns(view for run in views.values() for view in run.values()):
        sections[f"{title}, {column}"] = {name: in_column(run[primary[name]], column) for name, run in views.items()}
        for view in others:
            rows = {name: in_column(run[view], column) for name, run in views.items() if view in run}
            sections[f"{view}, {column}"] = rows
    return sections


def _made(run: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """How a run was made: its config.yaml, where there is one, and the results' own key `run`."""
    config = _home(run) / "config.yaml"
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    facts = {key: value for key, value in result.get("run", {}).items() if key != "checkpoint"}
    return {**flattened(settings), **flattened({"run": facts})}


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; lists count as values."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        dotted = f"{prefix}{key}"
        flat |= flattened(value, f"{dotted}.") if isinstance(value, Mapping) else {dotted: value}
    return flat


def _print_differences(rows: Mapping[str, Sequence[Any]], names: Sequence[str], console: Console) -> None:
    if not rows:
        console.print("Their configurations do not differ.")
        return
    table = Table(box=None, pad_edge=False)
    for header in ("what differs", *names):
        table.add_column(Text(header), overflow="fold")
    for key, values in rows.items():
        table.add_row(Text(key), *(Text("-" if value is None else str(value)) for value in values))
    console.print(table)
