"""The parts of a report: each from results.json, the log or the records, and empty where a run has nothing of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfusion.retrieval.examples import choose, held_against, main_metric, shown_at_first, shown_first
from mmfusion.retrieval.exclusive import TITLE
from mmfusion.retrieval.html import curves, figures, gallery, tables
from mmfusion.retrieval.html.figures import Figure, series_colour, view_colour
from mmfusion.retrieval.html.gallery import Gallery, Row
from mmfusion.retrieval.html.numbers import metric_title
from mmfusion.retrieval.records import Records, part
from mmfusion.retrieval.report import in_column, label_columns, ordered, primary_view
from mmfusion.retrieval.significance import Paired, corrected, paired

# rows whose weight is chosen on val: whose weight it is, and its key of results.json's `run`
WEIGHTED = {"score_fusion": ("text", "score_fusion_weight"), "hybrid_sum": ("bm25", "hybrid_weight")}


@dataclass(frozen=True)
class Focus:
    """What a report looks at first: a split, the primary view, what it is held against, a label column and a metric."""

    split: str
    views: list[str]
    primary: str
    against: str | None
    metric: str

    @classmethod
    def of(cls, results: Mapping[str, Any], split: str) -> "Focus":
        views = ordered(results[split])
        named = results.get("run", {}).get("primary")
        primary = named if named in views else primary_view(views)
        return cls(split, views, primary, held_against(primary, views), main_metric(results[split][primary]))

    @property
    def column(self) -> str:
        return self.metric.rpartition("/")[0]

    @property
    def compared(self) -> list[str]:
        return [self.primary] if self.against is None else [self.primary, self.against]


def headline(found: Records, focus: Focus) -> list[dict[str, Any]]:
    """The primary view's first metrics, each with a test against what it is held against: {"title", "cell", "other",
    "test"}; "other" and "test" are None where there is nothing to hold it against."""
    views = {view: in_column(found.results[focus.split][view], focus.column) for view in focus.compared}
    shown = [name for name in shown_first(views[focus.primary]) if not name.startswith("judged")]
    tests = _tests(found, focus, shown)
    return [
        {
            "title": metric_title(name),
            "cell": views[focus.primary][name],
            "other": views.get(focus.against or "", {}).get(name),
            "test": tests.get(name),
        }
        for name in shown
    ]


def _tests(found: Records, focus: Focus, names: list[str]) -> dict[str, Paired]:
    """By metric, corrected for their number; without those that no query has a value of in both views."""
    if focus.against is None:
        return {}
    before, after = (part(found.per_query, split=focus.split, view=view) for view in (focus.against, focus.primary))
    tests = {}
    for name in names:
        metric = f"{focus.column}/{name}"
        values = gallery.numbers(before, metric), gallery.numbers(after, metric)
        if not np.isnan(values[0] - values[1]).all():
            tests[name] = paired(focus.against, focus.primary, metric, *values)
    return dict(zip(tests, corrected(list(tests.values())), strict=True))


def split_results(results: Mapping[str, Any], split: str) -> dict[str, Any]:
    """A split's tables, one per label column, how many queries its means leave out, and remarks on views by name."""
    views = {view: results[split][view] for view in ordered(results[split])}
    about = results.get("run", {})
    columns = {}
    for column in label_columns(views.values()):
        shares = tables.label_shares(views, column, about.get("gains", {}).get(column, {}).get("gains") or {})
        columns[column] = tables.overview({view: in_column(views[view], column) for view in views}, shares)
    left_out: dict[int, list[str]] = {}
    for name, queries in about.get("left_out", {}).items():
        if name.startswith(f"{split}/"):
            left_out.setdefault(queries, []).append(name.removeprefix(f"{split}/"))
    remarks = {name: "weight chosen here" for name in WEIGHTED if split == "val" and name in views}
    every = tables.every_metric(views)
    return {"split": split, "columns": columns, "every": every, "left_out": left_out, "remarks": remarks}


def training(log: Mapping[str, curves.Curve], spans: list[curves.Stage], focus: Focus) -> dict[str, list[Figure]]:
    """{"quality": losses and val metrics, "settings": learning rates and scales}, figures without a curve left out."""
    losses = {name: curve for name, curve in curves.under(log, "train/").items() if not name.startswith("scale/")}
    positive = all((curve.values > 0).all() for curve in losses.values())
    quality = [_series("Training loss", losses, spans, type="log" if positive else "linear")]
    found = curves.under(log, "val/")
    for name in shown_first(name.rpartition("/")[2] for name in found if f"/{focus.column}/" in name):
        end = f"/{focus.column}/{name}"
        views = {view.removesuffix(end): curve for view, curve in found.items() if view.endswith(end)}
        colours = [view_colour(view) for view in views]
        quality.append(figures.lines(f"{metric_title(name)} on val", views, spans, colours))
    settings = [
        _series("Learning rates", curves.under(log, "lr/"), spans),
        _series("Scales of the losses (1 / temperature)", curves.under(log, "train/scale/"), spans),
    ]
    drawn = {"quality": quality, "settings": settings}
    return {name: [figure for figure in group if figure["data"]] for name, group in drawn.items()}


def gates(log: Mapping[str, curves.Curve], spans: list[curves.Stage]) -> list[Figure]:
    """One figure of all gates, or none; a head has gates only in the stages that train it."""
    found = curves.gates(log)
    if not found:
        return []
    title = "Mean over products, with one standard deviation"
    return [_series(title, found, curves.clipped(spans, found), rangemode="tozero")]


def calibration(results: Mapping[str, Any], focus: Focus) -> list[Figure]:
    """A figure per view; all have the same height of axis, so that views compare."""
    bins = results.get("calibration", {}).get(focus.split, {})
    top = max((part["relevant"] for found in bins.values() for part in found if part["pairs"]), default=0.0)
    return [figures.calibration(view, bins[view], top) for view in ordered(bins) if bins[view]]


def slices(results: Mapping[str, Any], focus: Focus) -> list[dict[str, Any]]:
    """Per slice a figure of the primary view and what it is held against, and a table's "metrics" and "rows"."""
    found = []
    for name, values in results.get("slices", {}).get(focus.split, {}).items():
        metrics = list(dict.fromkeys(metric for views in values.values() for view in views.values() for metric in view))
        if not metrics:
            continue
        shown = focus.metric if focus.metric in metrics else metrics[0]
        views = ordered(list(dict.fromkeys(view for views in values.values() for view in views)))
        found.append({
            "figure": figures.slice_dots(name, values, [view for view in focus.compared if view in views], shown),
            "metrics": metrics,
            "rows": tables.slice_rows(values, views, metrics),
        })  # fmt: skip
    return found


def galleries(found: Records, focus: Focus) -> tuple[list[Gallery], dict[str, Any]]:
    """The galleries, and what the page's script reads of them and of all queries of the split.

    Views of which the records hold no list are not in: zero-shot ones are measured before the training.
    """
    per_query = {view: part(found.per_query, split=focus.split, view=view) for view in focus.views}
    shown = shown_first(in_column(found.results[focus.split][focus.primary], focus.column))
    metrics = [f"{focus.column}/{name}" for name in shown]
    values = {view: gallery.values(table, metrics) for view, table in per_query.items()}
    texts = gallery.texts(per_query[focus.primary])
    ids = list(texts)
    chosen = choose(*(gallery.numbers(per_query[view], focus.metric) for view in focus.compared))
    by = f"by {metric_title(focus.metric.rpartition('/')[2])}"
    kinds = [
        Gallery(title, "the same queries every time" if rows is chosen.drawn else by, [ids[row] for row in rows])
        for title, rows in chosen.galleries(focus.primary, focus.against).items()
    ]
    most = found.results.get("exclusive", {}).get(focus.split, {}).get("most")
    kinds += [Gallery(TITLE, "most relevant products that text and photo alone miss", most)] if most else []
    rankings = part(found.rankings, split=focus.split)
    lists = {view: part(rankings, view=view) for view in focus.views}
    rows = [Row(view, listed, values[view], shown_at_first(view)) for view, listed in lists.items() if len(listed)]
    gains = {focus.column: {}, **found.results.get("run", {}).get("gains", {})}
    ordered = {ids[row]: texts[ids[row]] for row in chosen.order}
    return kinds, gallery.gallery_data(ordered, rows, kinds, [found.products], gains)


def log_of(home: Path) -> tuple[dict[str, curves.Curve], list[curves.Stage]]:
    """The curves and stages of a run's home folder; both empty where it has no metrics.csv."""
    path = home / "metrics.csv"
    log = curves.read_curves(path) if path.is_file() else {}
    return log, curves.stages(log, home / "config.yaml")


def _series(title: str, found: Mapping[str, curves.Curve], spans: list[curves.Stage], **axis: Any) -> Figure:
    return figures.lines(title, found, spans, [series_colour(place) for place in range(len(found))], **axis)
