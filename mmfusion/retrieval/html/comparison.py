"""Runs side by side as a page, from what `compare_runs` found and the records of the runs that have them."""

from pathlib import Path
from typing import Any

import numpy as np

from mmfusion.retrieval import records
from mmfusion.retrieval.comparison import Compared, Comparison, QueryValues
from mmfusion.retrieval.examples import EACH
from mmfusion.retrieval.files import file_path
from mmfusion.retrieval.html import figures, gallery, tables
from mmfusion.retrieval.html.figures import Figure
from mmfusion.retrieval.html.gallery import Gallery, Row
from mmfusion.retrieval.html.numbers import metric_title
from mmfusion.retrieval.html.page import render, write_page
from mmfusion.retrieval.html.report import placed
from mmfusion.retrieval.records import Records
from mmfusion.retrieval.report import counts


def write_comparison(comparison: Comparison, path: Path) -> Path:
    """Writes the page. Galleries show the runs whose folders hold rankings; the rest needs the comparison alone.

    Raises ValueError where the path is a folder.
    """
    file_path(path)  # before the galleries are read and drawn
    scatters = _scatters(comparison)
    galleries, queries = _galleries(comparison)
    data = {"figures": placed(scatters), "gallery": queries, "differences": _per_query(comparison)}
    per_query = comparison.per_query
    return write_page(path, render(
        "comparison.html.j2",
        {**data, "primary": per_query.metric if per_query else None, "compared": queries["rows"][:2][::-1]},
        title=" and ".join(run.name for run in comparison.runs),
        comparison=comparison,
        sections=_sections(comparison),
        metric=metric_title(per_query.metric.rpartition("/")[2]) if per_query else None,
        scatters=scatters,
        galleries=galleries,
        queries=queries,
    ))  # fmt: skip


def _sections(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """{"first": the primary views' tables by title, "others": those of the other views}."""
    sections: dict[str, dict[str, Any]] = {"first": {}, "others": {}}
    primary = next(iter(comparison.sections), "").rpartition(", ")[0]
    for title, rows in comparison.sections.items():
        group = "first" if title.rpartition(", ")[0] == primary else "others"
        sections[group][title] = {"overview": tables.overview(rows), "every": tables.every_metric(rows)}
    return sections


def _scatters(comparison: Comparison) -> list[Figure]:
    """Each run against the baseline, query by query."""
    found = comparison.per_query
    if found is None:
        return []
    names = {run.letter: run.name for run in comparison.runs}
    baseline, *others = found.values
    return [
        figures.scatter(
            found.metric, (names[baseline], names[one]), found.queries, (found.values[baseline], found.values[one])
        )
        for one in others
    ]


def _per_query(comparison: Comparison) -> dict[str, Any] | None:
    """{"queries": [[id, text]], "letters", "values": [per letter [per query]]}: the table that the script draws."""
    found = comparison.per_query
    if found is None:
        return None
    return {
        "queries": [list(pair) for pair in zip(found.query_ids, found.queries, strict=True)],
        "letters": list(found.values),
        "values": [
            [round(value, 4) if counts(value) else None for value in one.tolist()] for one in found.values.values()
        ],
    }


def _galleries(comparison: Comparison) -> tuple[list[Gallery], dict[str, Any]]:
    """The queries on which each run gains and loses most against the baseline, and what the script reads of all.

    Runs on other data are not among them: neither their queries nor their products are the baseline's.
    """
    per_query = comparison.per_query
    kept = [run for run in comparison.runs if per_query is not None and run.letter in per_query.values]
    runs = {run.letter: run for run in kept if (run.path / "rankings.parquet").is_file()}
    found = {letter: records.read(run.path) for letter, run in runs.items()}
    if per_query is None or len(found) < 2:
        return [], gallery.gallery_data({}, [], [], [], {})
    galleries = [
        Gallery(f"{letter} {kind} {next(iter(per_query.values))}", "", [per_query.query_ids[row] for row in rows])
        for letter in list(per_query.values)[1:]
        if letter in found
        for kind, rows in zip(("gains most over", "loses most to"), per_query.extremes(letter, EACH), strict=True)
    ]
    galleries = [one for one in galleries if one.query_ids]
    rows = [_row(run, found[letter], comparison) for letter, run in runs.items()]
    queries = {per_query.query_ids[row]: per_query.queries[row] for row in _most_different_first(per_query)}
    gains = next(iter(found.values())).results.get("run", {}).get("gains", {})
    products = [one.products for one in found.values()]
    return galleries, gallery.gallery_data(queries, rows, galleries, products, gains)


def _most_different_first(per_query: QueryValues) -> list[int]:
    baseline, *others = per_query.values.values()
    differences = np.max([np.abs(np.nan_to_num(one - baseline)) for one in others], axis=0)
    return np.argsort(-differences, kind="stable").tolist()


def _row(run: Compared, found: Records, comparison: Comparison) -> Row:
    assert comparison.per_query is not None
    ranking = records.part(found.rankings, split=comparison.split, view=run.view)
    values = records.part(found.per_query, split=comparison.split, view=run.view)
    return Row(run.name, ranking, gallery.values(values, [comparison.per_query.metric]))
