"""A study's report.html, from what report.json holds."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmfusion.retrieval.html.figures import Figure, plain, series_colour
from mmfusion.retrieval.html.gallery import gallery_data
from mmfusion.retrieval.html.numbers import interval, metric_title, number, signed
from mmfusion.retrieval.html.page import render
from mmfusion.retrieval.html.report import placed
from mmfusion.study.table import bare_p

ROW = 34  # pixels of an arm in a plot


def page(report: Mapping[str, Any]) -> str:
    """The page as text."""
    title = metric_title(report["metric"].rpartition("/")[2])
    figures = [
        dots(report, "mean", f"{title}, mean over seeds; each seed's mean as a small dot"),
        dots(report, "difference", f"Difference to {report['reference']}"),
    ]
    return render(
        "study.html.j2",
        {"figures": placed(figures), "gallery": gallery_data({}, [], [], [], {}), "primary": None},
        title=f"Study {report['study']}",
        metric=title,
        report=report,
        figures=figures,
        others={name: metric_title(name.rpartition("/")[2]) for name in _others(report)},
        bare_p=bare_p,
        buckets=_buckets,
        count=_count,
    )


def _others(report: Mapping[str, Any]) -> list[str]:
    rows = [row for rows in report["variants"].values() for row in rows]
    return list(dict.fromkeys(name for row in rows for name in row["others"]))


def _buckets(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(bucket for row in rows for bucket in row["known"]))


def _count(value: float | None) -> str:
    """12,345, or one digit after the point below ten."""
    return "–" if value is None else f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def dots(report: Mapping[str, Any], key: str, title: str) -> Figure:
    """Each arm's `mean` or `difference` with its interval, a colour per variant."""
    arms = list(dict.fromkeys(row["arm"] for rows in report["variants"].values() for row in rows))
    variants = list(report["variants"])
    data = []
    for place, (variant, rows) in enumerate(report["variants"].items()):
        offset = 0.5 * ((place + 0.5) / len(variants) - 0.5)
        shown = [(arms.index(row["arm"]) + offset, row) for row in rows if row[key] is not None]
        data.append(_interval_dots(variant, shown, key, series_colour(place)))
        if key == "mean":
            data.append(_seed_dots(variant, shown, series_colour(place)))
    layout = {
        "showlegend": False,
        "xaxis": {"rangemode": "tozero", "zerolinecolor": "var(--muted)"},
        "yaxis": {
            "tickvals": list(range(len(arms))), "ticktext": [plain(arm, 28) for arm in arms], "showgrid": False,
            "range": [len(arms) - 0.5, -0.5], "zeroline": False,
        },
    }  # fmt: skip
    legend = [(variant, series_colour(place)) for place, variant in enumerate(variants)]
    return {
        "title": title, "note": "", "height": 70 + ROW * len(arms), "legend": legend, "data": data, "layout": layout,
    }  # fmt: skip


def _interval_dots(variant: str, shown: list[tuple[float, Mapping[str, Any]]], key: str, colour: str) -> dict[str, Any]:
    cells = [row[key] for _, row in shown]
    write = number if key == "mean" else signed
    hover = [
        f"{plain(row['arm'])}, {plain(variant)}<br>{write(row[key]['value'])} {interval(row[key])}, "
        f"{row[key]['seeds']} seeds" + (f", p {plain(bare_p(row[key]['p_holm']))}" if key == "difference" else "")
        for _, row in shown
    ]
    spread = {
        "type": "data", "symmetric": False, "thickness": 1.5, "width": 0,
        "array": [cell["high"] - cell["value"] for cell in cells],
        "arrayminus": [cell["value"] - cell["low"] for cell in cells],
    }  # fmt: skip
    return {
        "type": "scatter", "mode": "markers", "name": plain(variant), "x": [cell["value"] for cell in cells],
        "y": [y for y, _ in shown], "error_x": spread, "marker": {"size": 9, "color": colour},
        "hovertext": hover, "hovertemplate": "%{hovertext}<extra></extra>",
    }  # fmt: skip


def _seed_dots(variant: str, shown: list[tuple[float, Mapping[str, Any]]], colour: str) -> dict[str, Any]:
    points = [
        (value, y + 0.12, f"{plain(row['arm'])}, {plain(variant)}, seed {seed}<br>{number(value)}")
        for y, row in shown
        for seed, value in row["by_seed"].items()
    ]
    x, y, hover = (list(part) for part in zip(*points, strict=True)) if points else ([], [], [])
    return {
        "type": "scatter", "mode": "markers", "name": plain(variant), "x": x, "y": y, "hovertext": hover,
        "hovertemplate": "%{hovertext}<extra></extra>", "marker": {"size": 4, "color": colour, "opacity": 0.6},
    }  # fmt: skip
