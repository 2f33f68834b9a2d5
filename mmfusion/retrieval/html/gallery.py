"""Galleries: what queries find, photo by photo. Python says what there is; the page's script builds what is looked at.

Every product is in the page once, whatever the number of lists that show it.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from mmfusion.retrieval.html.numbers import metric_title, whole
from mmfusion.retrieval.labels import letters, numeric_tone, tones

LISTS = 14_000  # a page holds so many: of a query in a row its first products; of further queries it holds the values


@dataclass(frozen=True)
class Row:
    """One row of every gallery: a view, or a run.

    ranking: its part of rankings.parquet. values[metric][query_id]; None where a mean leaves the query out.
    shown: at first; a reader can show and hide rows.
    """

    name: str
    ranking: pa.Table
    values: Mapping[str, Mapping[str, float | None]]
    shown: bool = True


@dataclass
class Marks:
    """The labels that lists of one label column show, each once: {"label", "letter", "tone"}."""

    column: str
    gains: Mapping[str, Any]
    marks: list[dict[str, Any]] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        labels = self.gains.get("gains") or {}
        self.tones = tones(labels)
        self.letters = letters(labels)
        for label in self.tones:
            self.place(label, None)

    def place(self, label: str | None, gain: float | None) -> int:
        """Where a label stands in `marks`; -1 for a product that is not judged."""
        if label is None:
            return -1
        if label not in self.places:
            known = label in self.tones
            tone = self.tones[label] if known else numeric_tone(gain or 0.0, self.gains.get("positive_from", 1.0))
            self.places[label] = len(self.marks)
            self.marks.append({"label": label, "letter": self.letters[label] if known else label, "tone": tone})
        return self.places[label]


@dataclass(frozen=True)
class Gallery:
    """Some queries under one heading, by their ids."""

    title: str
    note: str
    query_ids: list[str]


def gallery_data(
    queries: Mapping[str, str],
    rows: Sequence[Row],
    galleries: Sequence[Gallery],
    products: Iterable[pa.Table],
    gains: Mapping[str, Any],
) -> dict[str, Any]:
    """What the script reads. queries: text by id, all that can be searched, those that matter most first.

    gains: results.json's `run.gains`.
    """
    first = dict.fromkeys(one for gallery in galleries for one in gallery.query_ids)
    ids = list(first | dict.fromkeys(queries))
    kept = held([row.shown for row in rows], len(ids), len(first))
    place = {query_id: row for row, query_id in enumerate(ids)}
    columns = [Marks(column, gains[column]) for column in gains]
    catalogue: dict[str, int] = {}
    lists = [_lists(row.ranking, ids[:count], columns, catalogue) for row, count in zip(rows, kept, strict=True)]
    metrics = list(dict.fromkeys(metric for row in rows for metric in row.values))
    return {
        "queries": [[query_id, queries[query_id]] for query_id in ids],
        "rows": [row.name for row in rows],
        "shown": [row.shown for row in rows],
        "note": _what_is_held([row.name for row in rows], kept, len(ids), len(first)),
        "columns": [{"name": column.column, "marks": column.marks} for column in columns],
        "lists": lists,
        "products": _products(products, catalogue),
        "metrics": metrics,
        "titles": [metric_title(name.rpartition("/")[2]) for name in metrics],
        "values": [[[_short(row.values.get(name, {}).get(one)) for name in metrics] for one in ids] for row in rows],
        "galleries": [[place[query_id] for query_id in gallery.query_ids] for gallery in galleries],
    }


def held(shown: Sequence[bool], queries: int, in_galleries: int) -> list[int]:
    """Of how many queries each row's lists are in the page. shown: at first, by row.

    Of all where that makes no more than LISTS. Else the rows shown at first share the room, and the others have the
    galleries' queries alone.
    """
    if len(shown) * queries <= LISTS:
        return [queries] * len(shown)
    each = min(queries, max(in_galleries, LISTS // max(1, sum(shown))))
    return [each if one else in_galleries for one in shown]


def _what_is_held(rows: Sequence[str], kept: Sequence[int], queries: int, in_galleries: int) -> str:
    """What a reader should know of it; nothing where all is there."""
    few = [row for row, count in zip(rows, kept, strict=True) if count < max(kept)]
    said = []
    if kept and max(kept) < queries:
        said.append(
            f"This page has the products of {whole(max(kept))} of {whole(queries)} queries, those whose values differ "
            "most, and the values of all."
        )
    if few:
        said.append(f"The products of {', '.join(few)} are here for the {in_galleries} queries of the galleries.")
    return " ".join([*said, "rankings.parquet has all."]) if said else ""


def texts(per_query: pa.Table) -> dict[str, str]:
    """The queries' texts by id, in order."""
    return dict(zip(per_query["query_id"].to_pylist(), per_query["query"].to_pylist(), strict=True))


def values(per_query: pa.Table, metrics: Iterable[str]) -> dict[str, dict[str, float | None]]:
    """values[metric][query_id] of one view's part of per_query.parquet, without the metrics that it has not."""
    ids = per_query["query_id"].to_pylist()
    found = [metric for metric in metrics if metric in per_query.column_names]
    return {metric: dict(zip(ids, per_query[metric].to_pylist(), strict=True)) for metric in found}


def numbers(per_query: pa.Table, metric: str) -> Float[np.ndarray, "query"]:
    """The values of one metric in the table's order; NaN where a mean leaves the query out."""
    return per_query[metric].cast(pa.float64()).to_numpy()


def _lists(
    ranking: pa.Table, ids: Sequence[str], columns: Sequence[Marks], catalogue: dict[str, int]
) -> list[list[int]]:
    """Per query its products, best first, each followed by its mark in every column; products join the catalogue."""
    lists: dict[str, list[int]] = {query_id: [] for query_id in ids}
    ranking = ranking.sort_by("rank")
    labels = [_column(ranking, f"label/{column.column}") for column in columns]
    gained = [_column(ranking, f"gain/{column.column}") for column in columns]
    for row, (query_id, product_id) in enumerate(
        zip(ranking["query_id"].to_pylist(), ranking["product_id"].to_pylist(), strict=True)
    ):
        if query_id in lists:
            marks = [
                column.place(label[row], gain[row]) for column, label, gain in zip(columns, labels, gained, strict=True)
            ]
            lists[query_id] += [catalogue.setdefault(product_id, len(catalogue)), *marks]
    return list(lists.values())


def _column(table: pa.Table, name: str) -> list[Any]:
    return table[name].to_pylist() if name in table.column_names else [None] * len(table)


def _products(tables: Iterable[pa.Table], catalogue: Mapping[str, int]) -> list[list[Any]]:
    """[id, title, photo, whether it has one] by place; the first table that holds a product's photo gives it.

    Tables of an older version do not tell has_photo: there a product has a photo if it was kept.
    """
    found: list[list[Any]] = [[product_id, None, None, False] for product_id in catalogue]
    for table in tables:
        for product_id, title, photo, has_photo in zip(
            *(_column(table, name) for name in ("product_id", "title", "photo", "has_photo")), strict=True
        ):
            if product_id in catalogue:
                known = found[catalogue[product_id]]
                known[1] = known[1] or title
                known[2] = known[2] or (base64.b64encode(photo).decode() if photo else None)
                known[3] = bool(known[3] or has_photo or photo)
    return found


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
