"""What the tables of a page hold, from results[split][view][metric]."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmfusion.retrieval.examples import shown_first
from mmfusion.retrieval.html.numbers import metric_title
from mmfusion.retrieval.labels import share_names, tones
from mmfusion.retrieval.report import counts, in_column

Views = Mapping[str, Mapping[str, Mapping[str, Any]]]


def overview(rows: Views, shares: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The table of a first look at one label column: rows[name][metric], metrics by their bare names.

    shares: of `label_shares`, for a bar in each row. {"metrics": [titles], "k": of the shares or None,
    "rows": [{"name", "cells": [{"value", "low", "high", "best"} or None], "parts"}]}.
    """
    names = dict.fromkeys(name for row in rows.values() for name in row)
    metrics = shown_first(name for name in names if not name.startswith("share_"))
    parts = {row["name"]: row["parts"] for row in shares["rows"]} if shares else {}
    marked = with_best({name: [row.get(metric) for metric in metrics] for name, row in rows.items()}, metrics)
    return {
        "metrics": list(map(metric_title, metrics)),
        "k": shares["k"] if shares else None,
        "rows": [{**row, "parts": parts.get(row["name"], [])} for row in marked],
    }


def every_metric(rows: Views) -> dict[str, Any]:
    """All metrics, one per row, and the views in columns: {"names", "rows": [{"name", "cells"}]}."""
    metrics = dict.fromkeys(metric for row in rows.values() for metric in row)
    return {
        "names": list(rows),
        "rows": [{"name": metric, "cells": [row.get(metric) for row in rows.values()]} for metric in metrics],
    }


def with_best(rows: Mapping[str, Sequence[Mapping[str, Any] | None]], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """The rows with the best value of each metric marked; judged@k says how much is known, so it has no best."""
    best = []
    for place, metric in enumerate(metrics):
        values = [cell["value"] for cells in rows.values() if (cell := cells[place]) and counts(cell["value"])]
        best.append(max(values) if len(rows) > 1 and values and "judged@" not in metric else None)
    return [
        {
            "name": name,
            "cells": [
                None if cell is None else {**cell, "best": mark is not None and cell["value"] == mark}
                for cell, mark in zip(cells, best, strict=True)
            ],
        }
        for name, cells in rows.items()
    ]


def label_shares(views: Views, column: str, labels: Mapping[str, float]) -> dict[str, Any] | None:
    """The labels' shares of the first products, a stacked bar per view; None where labels are numbers or not measured.

    labels: what each of the column is worth. {"k", "rows": [{"name", "parts": [{"label", "tone", "share"}]}]}, parts
    best first, tone 0 best, 3 worst, None not judged; a list shorter than k leaves the rest of its bar blank.
    """
    found = [metric for view in views.values() for metric in in_column(view, column) if metric.startswith("share_")]
    if not found or not labels:
        return None
    k = "10" if any(metric.endswith("@10") for metric in found) else found[0].partition("@")[2]
    families = {label: family for family, label in share_names(labels).items()}
    order: dict[str, int | None] = {**tones(labels), "unjudged": None}
    rows = []
    for name, view in views.items():
        cells = {label: view.get(f"{column}/{families[label]}@{k}") for label in order}
        parts = [
            {"label": label, "tone": order[label], "share": cell["value"]}
            for label, cell in cells.items()
            if cell and counts(cell["value"])
        ]
        rows.append({"name": name, "parts": parts})
    return {"k": k, "rows": rows}


def slice_rows(values: Mapping[str, Any], views: Sequence[str], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """A slice as rows: {"value", "queries", "views": [{"name", "cells"}]}. values[value][view][metric]."""
    return [
        {
            "value": value,
            "queries": slice_queries(found),
            "views": [
                {"name": view, "cells": [found[view].get(metric) for metric in metrics]}
                for view in views
                if view in found
            ],
        }
        for value, found in values.items()
    ]


def slice_queries(found: Views) -> int:
    """How many queries are behind the numbers of one value of a slice."""
    return max((cell.get("queries", 0) for view in found.values() for cell in view.values()), default=0)
