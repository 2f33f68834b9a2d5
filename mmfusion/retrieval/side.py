"""What is known of one run that is compared: its numbers on a split, its values per query, and how it was made."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from jaxtyping import Float

from mmfusion.batch import RetrievalData
from mmfusion.retrieval.evaluation import PROTOCOL, TOLD, Evaluation, mean_with_interval
from mmfusion.retrieval.report import primary_view, read_results, splits
from mmfusion.retrieval.run_file import Measured, measure_run_file

# where a run is kept and logged and what it is called says nothing about what it does
UNTOLD = re.compile(
    r"experiment|runs|resume|branch|checkpoint_stages|wandb(\..*)?|trainer\.(logger|default_root_dir)(\..*)?"
    r"|.*\.(save_dir|dirpath)"
)
UNTOLD_FACTS = ("folder", "checkpoint", "branched_from", "overrides")  # overrides are told under a key of their own
OVERRIDES = "eval overrides"


@dataclass(frozen=True)
class Side:
    """A run on one split. name: its letter and what fits into a narrow table. view: the primary one of `views`.

    made: the settings and facts that `differences` tells, by dotted key. measured: the primary view's values per query;
    None where a run was evaluated before they were kept.
    """

    name: str
    path: Path
    view: str
    views: Mapping[str, Any]
    made: Mapping[str, Any]
    measured: Measured | None

    @property
    def letter(self) -> str:
        return self.name[0]

    @property
    def manifest(self) -> str | None:
        """Of the data that the run was evaluated on."""
        return self.made.get("run.manifest")

    @property
    def protocol(self) -> dict[str, Any]:
        """The options that its numbers were measured by, each of PROTOCOL."""
        options = _protocol(self.made)
        return {name: getattr(options, name) for name in PROTOCOL}

    @property
    def configured(self) -> bool:
        """Whether it is known how the run was trained."""
        return _configured(self.made)

    def aligned(self, metric: str, query_ids: Sequence[str]) -> Float[np.ndarray, "query"]:
        """The values of these queries; NaN where there is none."""
        assert self.measured is not None
        values = dict(zip(self.measured.query_ids, self.measured.values[metric].tolist(), strict=True))
        return np.array([values.get(id, np.nan) for id in query_ids], dtype=float)


def named(runs: Sequence[Path]) -> dict[str, Path]:
    """The runs as "A <experiment>", "B <experiment>" ...: a letter, and what fits into a narrow table."""
    if not 0 < len(runs) <= len(ascii_uppercase):
        raise ValueError(f'received {len(runs)} runs; compare 1 to 26, as in make compare RUNS="runs/a runs/b"')
    if len({run.resolve() for run in runs}) < len(runs):
        raise ValueError(f"a run is named twice: {', '.join(map(str, runs))}; name each once")
    return {f"{letter} {_title(run):.18}": run for letter, run in zip(ascii_uppercase, runs, strict=False)}


def _title(run: Path) -> str:
    return run.stem if run.is_file() else home(run).parent.name


def home(run: Path) -> Path:
    """The run's own folder runs/<exp>/<version>, which holds its config.yaml; of an evaluation, wherever it is, too.

    An evaluation tells it in its results. Where that is no run any more, or is not told, it is found by its place.
    """
    run = run.resolve()
    if not (run / "config.yaml").is_file() and (run / "results.json").is_file():
        told = read_results(run / "results.json").get("run", {}).get("folder")
        if told and (Path(told) / "config.yaml").is_file():
            return Path(told)
    return run.parents[1] if run.parent.name == "eval" else run


def results_of(run: Path) -> dict[str, Any]:
    if not (run / "results.json").is_file():
        found = "no such folder" if not run.exists() else "it holds none"
        raise ValueError(f"{run}: expected a run folder with results.json, {found}; finish it or `make eval RUN={run}`")
    return read_results(run / "results.json")


def from_folder(name: str, run: Path, result: Mapping[str, Any], split: str) -> Side:
    """Raises ValueError where the run has no results on the split."""
    if split not in splits(result):
        raise ValueError(f"run {name} has no results on {split!r}, only on: {', '.join(splits(result)) or 'nothing'}")
    view = primary_view(result[split])
    return Side(name, run, view, result[split], _made(run, result), _recorded(run, split, view))


def _made(run: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """How a run was made: its config.yaml, where there is one, and the results' own key `run`."""
    config = home(run) / "config.yaml"
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    about = result.get("run", {})
    facts = {key: value for key, value in about.items() if key not in UNTOLD_FACTS}
    overrides = " ".join(about.get("overrides", []))
    return flattened(settings) | flattened({"run": facts}) | ({OVERRIDES: overrides} if overrides else {})


def _recorded(run: Path, split: str, view: str) -> Measured | None:
    """The view's values per query; None where the run was evaluated before they were kept."""
    path = run / "per_query.parquet"
    if not path.is_file():
        return None
    table = pq.read_table(path, filters=[("split", "==", split), ("view", "==", view)])
    if not len(table):
        return None
    metrics = [name for name in table.column_names if name not in ("split", "view", "query_id", "query")]
    values = {name: table[name].to_numpy().astype(float) for name in metrics}
    return Measured(table["query_id"].to_pylist(), table["query"].to_pylist(), values)


def from_file(name: str, path: Path, first: Side, data: RetrievalData, split: str) -> tuple[Side, list[str]]:
    """The run that a file holds, measured as the primary view of the folder `first` was; also what to say about it."""
    options = _protocol(first.made)
    queries = dict(zip(first.measured.query_ids, first.measured.queries, strict=True)) if first.measured else {}
    measured, said = measure_run_file(path, data, split, list(first.views[first.view]), options, queries)
    cells = {metric: mean_with_interval(values, options.resamples) for metric, values in measured.values.items()}
    made = flattened({"run": {"manifest": first.manifest, "evaluation": first.protocol}})
    return Side(name, path, first.view, {first.view: cells}, made, measured), said


def _protocol(made: Mapping[str, Any]) -> Evaluation:
    """How a run was evaluated, apart from its metrics. An evaluation tells its own; a run's is in its configuration."""
    default = Evaluation()
    given = {
        name: made.get(f"run.evaluation.{name}", made.get(f"model.evaluation.{name}", getattr(default, name)))
        for name in TOLD
    }
    return Evaluation(metrics=[], **given)


def differences(made: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The dotted keys whose values differ, each with the runs' values in order; None where a run has no such key.

    In a setting, runs of which no setting is known do not differ from the others.
    """
    keys = dict.fromkeys(key for settings in made.values() for key in settings if not UNTOLD.fullmatch(key))
    rows = {}
    for key in keys:
        known = [settings.get(key) for settings in made.values() if _is_fact(key) or _configured(settings)]
        if any(value != known[0] for value in known):
            rows[key] = [settings.get(key) for settings in made.values()]
    return rows


def _configured(made: Mapping[str, Any]) -> bool:
    return not all(map(_is_fact, made))


def _is_fact(key: str) -> bool:
    """Whether a key of `made` comes from the results; the others are settings of config.yaml."""
    return key == OVERRIDES or key.startswith("run.")


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; lists count as values."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        dotted = f"{prefix}{key}"
        flat |= flattened(value, f"{dotted}.") if isinstance(value, Mapping) else {dotted: value}
    return flat
