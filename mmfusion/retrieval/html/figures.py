"""Figures as plotly's JSON. Colours are names of the style sheet, var(--...), which the page's script looks up.

A figure is {"title", "note", "height", "legend", "data", "layout"}; the title, the note and the legend's (name, colour)
are for a template, which escapes them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmfusion.retrieval.html.curves import Curve, Stage
from mmfusion.retrieval.html.numbers import interval, metric_title, number, signed, whole
from mmfusion.retrieval.html.tables import slice_queries
from mmfusion.retrieval.report import counts

SERIES = 8  # colours of the style sheet without a meaning
VIEWS = ("text", "image", "fused", "score_fusion", "bm25", "hybrid_rrf", "hybrid_sum", "random")
MAX_VALUES = 16  # of a slice that a plot shows: those of most queries
MAX_POINTS = 4_000  # of a scatter

Figure = dict[str, Any]


def series_colour(place: int) -> str:
    return f"var(--series-{place % SERIES + 1})"


def view_colour(view: str) -> str:
    """The same for a view on all plots, and for its zero-shot twin."""
    known = view.removeprefix("zero_shot_").partition("@")[0]
    return f"var(--view-{known.replace('_', '-')})" if known in VIEWS else series_colour(sum(map(ord, view)))


def lines(
    title: str, curves: Mapping[str, Curve], stages: Sequence[Stage], colours: Sequence[str], **axis: Any
) -> Figure:
    """Curves over optimizer steps, the stages as bands behind them; a curve with a spread gets its own band."""
    data = []
    for (name, curve), colour in zip(curves.items(), colours, strict=True):
        if curve.spread is not None:
            data.append(_band(curve, colour))
        few = len(curve.steps) <= 40
        data.append({
            "type": "scatter", "name": plain(name), "x": curve.steps.tolist(), "y": curve.values.tolist(),
            "mode": "lines+markers" if few else "lines", "marker": {"size": 6}, "cliponaxis": False,
            "line": {"color": colour, "width": 2, "dash": "dot" if name.startswith("zero_shot") else "solid"},
            "hovertemplate": "%{y:.4g}",
        })  # fmt: skip
    steps = [curve.steps for curve in curves.values()] + [np.array([stage.first, stage.last]) for stage in stages]
    ends = [float(min(part.min() for part in steps)), float(max(part.max() for part in steps))] if steps else None
    layout = {
        "margin": {"t": 22 if stages else 8}, "showlegend": False,
        "xaxis": {"title": {"text": "step"}, "range": ends}, "yaxis": axis, "hovermode": "x unified",
        "shapes": [_stage_band(place, stage) for place, stage in enumerate(stages)],
        "annotations": [_stage_name(stage) for stage in stages],
    }  # fmt: skip
    legend = list(zip(curves, colours, strict=True))
    return {"title": title, "note": "", "height": 280, "legend": legend, "data": data, "layout": layout}


def calibration(view: str, bins: Sequence[Mapping[str, Any]], top: float) -> Figure:
    """The share of relevant products per bin of scores, each with its count above it. top: of the axis."""
    bins = [part for part in bins if part["pairs"]]
    shares = [part["relevant"] for part in bins]
    edges = [part["low"] for part in bins] + [part["high"] for part in bins[-1:]]
    hover = [
        f"score {part['low']:.3g} to {part['high']:.3g}<br>{share:.1%} of {whole(part['pairs'])} pairs"
        for part, share in zip(bins, shares, strict=True)
    ]
    data = [{
        "type": "bar", "x": list(range(len(bins))), "y": shares, "marker": {"color": view_colour(view)}, "width": 0.9,
        "text": [_brief(part["pairs"]) for part in bins], "textposition": "outside", "cliponaxis": False,
        "textangle": 0, "textfont": {"size": 9, "color": "var(--muted)"},
        "hovertext": hover, "hovertemplate": "%{hovertext}<extra></extra>",
    }]  # fmt: skip
    layout = {
        "showlegend": False,
        "xaxis": {
            "title": {"text": "score"}, "tickvals": [place - 0.5 for place in range(0, len(edges), 2)],
            "ticktext": [f"{edge:.3g}" for edge in edges[::2]], "showgrid": False, "tickangle": 0,
            "range": [-0.6, len(bins) - 0.4], "ticks": "outside", "ticklen": 4,
        },
        "yaxis": {"tickformat": ".0%", "range": [0, 1.15 * max(top, 0.01)]},
    }  # fmt: skip
    return {"title": view, "note": "", "height": 210, "legend": [], "data": data, "layout": layout}


def slice_dots(name: str, values: Mapping[str, Any], views: Sequence[str], metric: str) -> Figure:
    """A dot with its interval for each value of a slice and view, the values of most queries where there are many."""
    queries = {value: slice_queries(found) for value, found in values.items()}
    most = sorted(values, key=lambda value: -queries[value])[:MAX_VALUES]
    kept = [value for value in values if value in most]
    data = []
    for place, view in enumerate(views):
        offset = 0.16 * (place - (len(views) - 1) / 2)
        cells = [(row + offset, value, values[value].get(view, {}).get(metric)) for row, value in enumerate(kept)]
        data.append(_dots(view, [(y, value, cell) for y, value, cell in cells if cell and counts(cell["value"])]))
    layout = {
        "showlegend": False,
        "xaxis": {"title": {"text": metric_title(metric.rpartition("/")[2])}, "rangemode": "tozero"},
        "yaxis": {
            "tickvals": list(range(len(kept))), "range": [len(kept) - 0.5, -0.5], "showgrid": False, "zeroline": False,
            "ticktext": [f"{plain(value, 28)}  n = {whole(queries[value])}" for value in kept],
        },
    }  # fmt: skip
    note = f"the {MAX_VALUES} values of most queries, of {len(values)}" if len(kept) < len(values) else ""
    legend = [(view, view_colour(view)) for view in views]
    return {
        "title": name,
        "note": note,
        "height": 60 + 30 * len(kept),
        "legend": legend,
        "data": data,
        "layout": layout,
    }


def scatter(
    metric: str, names: tuple[str, str], queries: Sequence[str], values: tuple[np.ndarray, np.ndarray]
) -> Figure:
    """A dot per query, one run's value against the other's; above the diagonal the second is better."""
    both = np.flatnonzero(~np.isnan(values[0]) & ~np.isnan(values[1]))
    drawn = both if len(both) <= MAX_POINTS else np.sort(np.random.default_rng(0).permutation(both)[:MAX_POINTS])
    x, y = values[0][drawn], values[1][drawn]
    hover = [
        f"{plain(queries[row], 60)}<br>{number(one)} → {number(two)}  ({signed(two - one)})"
        for row, one, two in zip(drawn.tolist(), x.tolist(), y.tolist(), strict=True)
    ]
    top = float(max(x.max(initial=0), y.max(initial=0), 1.0))
    data = [{
        "type": "scatter", "mode": "markers", "x": x.tolist(), "y": y.tolist(), "hovertext": hover,
        "hovertemplate": "%{hovertext}<extra></extra>", "customdata": drawn.tolist(),
        "marker": {"size": 8, "opacity": 0.5, "color": "var(--accent)", "line": {"width": 0}},
    }]  # fmt: skip
    diagonal = {"type": "line", "x0": 0, "y0": 0, "x1": top, "y1": top, "line": {"color": "var(--muted)", "width": 1}}
    layout = {
        "showlegend": False, "shapes": [{**diagonal, "layer": "below"}],
        "xaxis": {"title": {"text": plain(names[0])}, "range": [-0.03 * top, 1.03 * top]},
        "yaxis": {"title": {"text": plain(names[1])}, "range": [-0.03 * top, 1.03 * top]},
    }  # fmt: skip
    note = f"{whole(len(drawn))} of {whole(len(both))} queries, drawn at random" if len(drawn) < len(both) else ""
    title = f"{metric_title(metric.rpartition('/')[2])} of each query"
    return {"title": title, "note": note, "height": 460, "legend": [], "data": data, "layout": layout}


def plain(text: str, length: int = 60) -> str:
    """Text that plotly shows as it is: it reads a few tags and entities. Cut to a length."""
    cut = text if len(text) <= length else text[: length - 1] + "…"
    return cut.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _dots(view: str, cells: Sequence[tuple[float, str, Mapping[str, Any]]]) -> dict[str, Any]:
    values = [cell["value"] for _, _, cell in cells]
    spread = {
        "type": "data", "symmetric": False, "thickness": 1.5, "width": 0,
        "array": [cell.get("high", cell["value"]) - cell["value"] for _, _, cell in cells],
        "arrayminus": [cell["value"] - cell.get("low", cell["value"]) for _, _, cell in cells],
    }  # fmt: skip
    hover = [
        f"{plain(value)}<br>{plain(view)} {number(cell['value'])} {interval(cell)}, {whole(cell['queries'])} queries"
        for _, value, cell in cells
    ]
    return {
        "type": "scatter", "mode": "markers", "name": plain(view), "x": values, "y": [y for y, _, _ in cells],
        "error_x": spread, "hovertext": hover, "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {"size": 9, "color": view_colour(view), "symbol": "circle" if view == "fused" else "diamond"},
    }  # fmt: skip


def _band(curve: Curve, colour: str) -> dict[str, Any]:
    """One standard deviation about the curve."""
    assert curve.spread is not None
    low, high = curve.values - curve.spread, curve.values + curve.spread
    return {
        "type": "scatter", "mode": "lines", "line": {"width": 0}, "fill": "toself", "fillcolor": colour, "opacity": 0.1,
        "x": np.concatenate([curve.steps, curve.steps[::-1]]).tolist(), "y": np.concatenate([low, high[::-1]]).tolist(),
        "hoverinfo": "skip", "showlegend": False,
    }  # fmt: skip


def _stage_band(place: int, stage: Stage) -> dict[str, Any]:
    return {
        "type": "rect", "xref": "x", "yref": "paper", "x0": stage.first, "x1": stage.last, "y0": 0, "y1": 1,
        "fillcolor": f"var(--stage-{place % 2 + 1})", "line": {"width": 0}, "layer": "below",
    }  # fmt: skip


def _stage_name(stage: Stage) -> dict[str, Any]:
    return {
        "text": plain(stage.name, 24), "xref": "x", "yref": "paper", "x": (stage.first + stage.last) / 2, "y": 1,
        "yanchor": "bottom", "showarrow": False, "font": {"size": 11, "color": "var(--muted)"},
    }  # fmt: skip


def _brief(pairs: int) -> str:
    """4.1k of 4,110."""
    return str(pairs) if pairs < 1_000 else f"{pairs / 1e3:.2g}k" if pairs < 99_500 else f"{pairs / 1e6:.2g}M"
