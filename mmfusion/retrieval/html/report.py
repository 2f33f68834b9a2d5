"""A run's report.html, made from the files of its folder alone."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from mmfusion.retrieval import records
from mmfusion.retrieval.html import sections, understanding
from mmfusion.retrieval.html.figures import Figure
from mmfusion.retrieval.html.numbers import metric_title, whole
from mmfusion.retrieval.html.page import render, write_page
from mmfusion.retrieval.report import splits
from mmfusion.retrieval.side import home


def write_report(folder: Path) -> Path:
    """Writes report.html into a run's folder, or an evaluation's. Raises ValueError where `records.read` does."""
    found = records.read(folder)
    order = sorted(splits(found.results), key=lambda split: split != "test")
    if not order:
        raise ValueError(
            f"{folder / 'results.json'} holds no split: evaluate the run again with `make eval RUN={folder}`"
        )
    focus = sections.Focus.of(found.results, order[0])
    log, spans = sections.log_of(home(folder))
    training = sections.training(log, spans, focus)
    gates = sections.gates(log, spans)
    weights = understanding.gates(found.results)
    calibration = sections.calibration(found.results, focus)
    slices = sections.slices(found.results, focus)
    galleries, queries = sections.galleries(found, focus)
    headline = sections.headline(found, focus)
    charts = [*training["quality"], *training["settings"], *gates, *(weights["figures"] if weights else [])]
    charts += [*calibration, *(one["figure"] for one in slices)]
    return write_page(folder / "report.html", render(
        "report.html.j2",
        {"figures": placed(charts), "gallery": queries, "primary": focus.metric, "compared": focus.compared},
        title=name_of(folder),
        facts=_facts(found.results, folder, len(queries["queries"]), focus.split),
        focus=focus,
        metric=metric_title(focus.metric.rpartition("/")[2]),
        headline=headline,
        tests=sum(one["test"] is not None for one in headline),
        weighted={
            name: (of, found.results.get("run", {}).get(key)) for name, (of, key) in sections.WEIGHTED.items()
        },
        results=[sections.split_results(found.results, split) for split in order],
        training=training,
        gates=gates,
        weights=weights,
        exclusive=understanding.exclusive(found.results, focus.split, focus.column),
        calibration=calibration,
        slices=slices,
        galleries=galleries,
        queries=queries,
    ))  # fmt: skip


def placed(charts: list[Figure]) -> list[dict[str, Any]]:
    """The figures as the script reads them; each is told its place, by which its template's element names it."""
    for place, chart in enumerate(charts):
        chart["place"] = place
    return [{"data": chart["data"], "layout": chart["layout"]} for chart in charts]


def name_of(folder: Path) -> str:
    """<exp> / <version>, and the evaluation's name where it is one."""
    run = home(folder)
    return " / ".join([run.parent.name, run.name] + ([f"eval {folder.name}"] if folder.resolve() != run else []))


def _facts(results: Mapping[str, Any], folder: Path, queries: int, split: str) -> list[dict[str, str]]:
    """What a run was made of, in short, with the whole value to hover: {"name", "short", "whole"}."""
    about = results.get("run", {})
    made = datetime.fromtimestamp((folder / "results.json").stat().st_mtime)
    known = [
        ("seed", about.get("seed"), None),
        ("commit", about.get("commit"), 7),
        ("data", about.get("data") and Path(str(about["data"])).name, None),
        ("manifest", about.get("manifest"), 8),
        ("checkpoint", about.get("checkpoint") and Path(str(about["checkpoint"])).name, None),
        (f"{split} queries", whole(queries), None),
        ("evaluated", f"{made:%Y-%m-%d %H:%M}", None),
    ]
    return [
        {"name": name, "short": str(value)[:cut], "whole": str(about.get(name, value))}
        for name, value, cut in known
        if value is not None
    ]
