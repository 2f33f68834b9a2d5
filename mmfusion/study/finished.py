"""One run of a study as it lies on disk."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from mmfusion.retrieval.evaluation import PROTOCOL
from mmfusion.retrieval.report import primary_view, read_results, splits
from mmfusion.study.parameters import FILE as PARAMETERS

FILES = ("results.json", "per_query.parquet")
ABOUT = ("split", "view", "query_id", "query")  # columns of per_query.parquet that are no metrics
Values = dict[str, dict[str, dict[str, float]]]  # [split][metric][query_id]


@dataclass(frozen=True)
class Finished:
    """A run that was trained and evaluated. config: its config.yaml; {} where there is none.

    trains: by stage, how many parameters of the `text` and of the `image` encoder are trained; None where not known.
    """

    folder: Path
    results: Mapping[str, Any]
    config: Mapping[str, Any]
    trains: Mapping[str, Mapping[str, int]] | None = None

    @property
    def measured_as(self) -> dict[str, Any]:
        """Runs are comparable where these agree: the data, and the options that change what a query's value is."""
        about = self.results.get("run", {})
        protocol = about.get("evaluation", {})
        return {"manifest": about.get("manifest")} | {name: protocol.get(name) for name in PROTOCOL}

    def view(self, name: str | None) -> str:
        """The view of that name; without one, the primary. Raises ValueError where the run has no such view."""
        views = list(dict.fromkeys(view for split in splits(self.results) for view in self.results[split]))
        if not views or (name is not None and name not in views):
            raise ValueError(f"its results have no {name or 'view'}, only {', '.join(views) or 'nothing'}")
        return name or self.results.get("run", {}).get("primary") or primary_view(views)

    def slices(self, split: str, name: str, view: str, metric: str) -> dict[str, float]:
        """By slice of that name, such as train_positives, the mean of a metric; {} where there are none."""
        found = self.results.get("slices", {}).get(split, {}).get(name, {})
        cells = {bucket: views.get(view, {}).get(metric, {}).get("value") for bucket, views in found.items()}
        return {bucket: value for bucket, value in cells.items() if value is not None}

    def values(self, view: str, metrics: Sequence[str]) -> Values:
        """Queries without a value are left out, and so are metrics that the run was not evaluated in."""
        table = pq.read_table(self.folder / "per_query.parquet", filters=[("view", "==", view)])
        there = [metric for metric in metrics if metric in table.column_names]
        found: Values = {}
        for row in table.select([*ABOUT, *there]).to_pylist():
            for metric in there:
                if row[metric] is not None:
                    found.setdefault(row["split"], {}).setdefault(metric, {})[row["query_id"]] = row[metric]
        return found


def load(folder: Path) -> Finished | None:
    """None where the run is not whole. Raises ValueError where its results are no JSON."""
    if not all((folder / name).is_file() for name in FILES):
        return None
    config = folder / "config.yaml"
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return Finished(folder, read_results(folder / "results.json"), settings or {}, _trains(folder / PARAMETERS))


def _trains(file: Path) -> Mapping[str, Mapping[str, int]] | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))["trains"]
    except (OSError, ValueError, KeyError):
        return None
