"""The parts of a report: each from results.json, the log or the records, and empty where a run has nothing of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfusion.retrieval.html import curves, figures, gallery, tables
from mmfusion.retrieval.html.figures import Figure, series_colour, view_colour
from mmfusion.retrieval.html.gallery import Gallery, Row
from mmfusion.retrieval.html.labels import tones
from mmfusion.retrieval.html.numbers import counts, metric_title, shown_first
from mmfusion.retrieval.records import Records
from mmfusion.retrieval.report import FIRST, in_column, label_columns, primary_view


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
        views = tables.ordered(results[split])
        named = results.get("run", {}).get("primary")
        primary = named if named in views else primary_view(views)
        against = next((view for view in ("text", "bm25") if view in views and view != primary), None)
        column = label_columns([results[split][primary]])[0]
        name = shown_first(in_column(results[split][primary], column))[0]
        return cls(split, views, primary, against, f"{column}/{name}")

    @property
    def column(self) -> str:
        return self.metric.rpartition("/")[0]

    @property
    def compared(self) -> list[str]:
        return [self.primary] if self.against is None else [self.primary, self.against]


def headline(results: Mapping[str, Any], focus: Focus) -> list[dict[str, Any]]:
    """The primary view's first metrics, each with the difference from what it is held against."""
    views = {view: in_column(results[focus.split][view], focus.column) for view in focus.compared}
    ours = views[focus.primary]
    shown = [name for name in shown_first(ours) if not name.startswith("judged")]
    other = views.get(focus.against or "", {})
    return [
        {
            "title": metric_title(name),
            "cell": ours[name],
            "other": other.get(name),
            "difference": _difference(ours[name], other.get(name)),
        }
        for name in shown
    ]


def split_results(results: Mapping[str, Any], split: str) -> dict[str, Any]:
    """A split's tables, one per label column, and how many queries its means leave out."""
    views = {view: results[split][view] for view in tables.ordered(results[split])}
    about = results.get("run", {})
    columns = {}
    for column in label_columns(views.values()):
        shares = tables.label_shares(views, column, tones(about.get("gains", {}).get(column, {})))
        columns[column] = tables.overview({view: in_column(views[view], column) for view in views}, shares)
    left_out: dict[int, list[str]] = {}
    for name, queries in about.get("left_out", {}).items():
        if name.startswith(f"{split}/"):
            left_out.setdefault(queries, []).append(name.removeprefix(f"{split}/"))
    return {"split": split, "columns": columns, "every": tables.every_metric(views), "left_out": left_out}


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
    return [figures.calibration(view, bins[view], top) for view in tables.ordered(bins) if bins[view]]


def slices(results: Mapping[str, Any], focus: Focus) -> list[dict[str, Any]]:
    """Per slice a figure of the primary view and what it is held against, and a table's "metrics" and "rows"."""
    found = []
    for name, values in results.get("slices", {}).get(focus.split, {}).items():
        metrics = list(dict.fromkeys(metric for views in values.values() for view in views.values() for metric in view))
        if not metrics:
            continue
        shown = focus.metric if focus.metric in metrics else metrics[0]
        views = tables.ordered(list(dict.fromkeys(view for views in values.values() for view in views)))
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
    per_query = {view: gallery.part(found.per_query, split=focus.split, view=view) for view in focus.views}
    shown = shown_first(in_column(found.results[focus.split][focus.primary], focus.column))
    metrics = [f"{focus.column}/{name}" for name in shown]
    values = {view: gallery.values(table, metrics) for view, table in per_query.items()}
    texts = gallery.texts(per_query[focus.primary])
    ours = values[focus.primary].get(focus.metric, {})
    theirs = values[focus.against].get(focus.metric, {}) if focus.against else {}
    gained, lost, order = gallery.extremes(ours, theirs)
    by = metric_title(focus.metric.rpartition("/")[2])
    kinds = [Gallery("Drawn at random", "the same queries every time", gallery.drawn(sorted(texts)))]
    if focus.against and theirs:
        kinds = [
            Gallery(f"{focus.primary} gains most over {focus.against}", f"by {by}", gained),
            Gallery(f"{focus.primary} loses most to {focus.against}", f"by {by}", lost),
            *kinds,
        ]
    kinds = [kind for kind in kinds if kind.query_ids]
    rankings = gallery.part(found.rankings, split=focus.split)
    lists = {view: gallery.part(rankings, view=view) for view in focus.views}
    rows = [Row(view, listed, values[view], _at_first(view, focus)) for view, listed in lists.items() if len(listed)]
    gains = {focus.column: {}, **found.results.get("run", {}).get("gains", {})}
    ordered = {one: texts[one] for one in [*order, *texts]}
    return kinds, gallery.gallery_data(ordered, rows, kinds, [found.products], gains)


def log_of(home: Path) -> tuple[dict[str, curves.Curve], list[curves.Stage]]:
    """The curves and stages of a run's home folder; both empty where it has no metrics.csv."""
    path = home / "metrics.csv"
    log = curves.read_curves(path) if path.is_file() else {}
    return log, curves.stages(log, home / "config.yaml")


def _at_first(view: str, focus: Focus) -> bool:
    return view in (*FIRST, "bm25", *focus.compared)


def _difference(ours: Mapping[str, Any], other: Mapping[str, Any] | None) -> float | None:
    known = other is not None and counts(ours["value"]) and counts(other["value"])
    return ours["value"] - other["value"] if other is not None and known else None


def _series(title: str, found: Mapping[str, curves.Curve], spans: list[curves.Stage], **axis: Any) -> Figure:
    return figures.lines(title, found, spans, [series_colour(place) for place in range(len(found))], **axis)
