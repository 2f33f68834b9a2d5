"""Galleries: what queries find, photo by photo. Python says what there is; the page's script builds what is looked at.

Every product is in the page once, whatever the number of lists that show it.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmfusion.retrieval.html.labels import letters, numeric_tone, tones
from mmfusion.retrieval.html.numbers import metric_title

LISTED = 2_000  # queries whose lists a page holds; of the others it holds the values
EACH = 5  # queries of a gallery


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
        self.tones = tones(self.gains)
        self.letters = letters(self.tones)
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

    gains: results.json's `run.gains`. Lists are kept for the galleries' queries and then for the first LISTED.
    """
    ids = list(dict.fromkeys([*(one for gallery in galleries for one in gallery.query_ids), *queries]))
    place = {query_id: row for row, query_id in enumerate(ids)}
    columns = [Marks(column, gains[column]) for column in gains]
    catalogue: dict[str, int] = {}
    lists = [_lists(row.ranking, ids[:LISTED], columns, catalogue) for row in rows]
    metrics = list(dict.fromkeys(metric for row in rows for metric in row.values))
    return {
        "queries": [[query_id, queries[query_id]] for query_id in ids],
        "rows": [row.name for row in rows],
        "shown": [row.shown for row in rows],
        "columns": [{"name": column.column, "marks": column.marks} for column in columns],
        "lists": lists,
        "products": _products(products, catalogue),
        "metrics": metrics,
        "titles": [metric_title(name.rpartition("/")[2]) for name in metrics],
        "values": [[[_short(row.values.get(name, {}).get(one)) for name in metrics] for one in ids] for row in rows],
        "galleries": [[place[query_id] for query_id in gallery.query_ids] for gallery in galleries],
    }


def extremes(
    ours: Mapping[str, float | None], theirs: Mapping[str, float | None], each: int = EACH
) -> tuple[list[str], list[str], list[str]]:
    """Query ids by ours - theirs: (largest gains, largest losses, all by size of the difference).

    A query that a mean leaves out counts as no difference; a gain is above 0, a loss below.
    """
    difference = {one: (value or 0.0) - (theirs.get(one) or 0.0) for one, value in ours.items()}
    gained = sorted((one for one in difference if difference[one] > 0), key=lambda one: -difference[one])
    lost = sorted((one for one in difference if difference[one] < 0), key=lambda one: difference[one])
    return gained[:each], lost[:each], sorted(difference, key=lambda one: -abs(difference[one]))


def drawn(query_ids: Sequence[str], each: int = EACH, seed: int = 0) -> list[str]:
    """Queries drawn at random, the same ones every time."""
    return [query_ids[row] for row in np.random.default_rng(seed).permutation(len(query_ids))[:each]]


def texts(per_query: pa.Table) -> dict[str, str]:
    """The queries' texts by id, in order."""
    return dict(zip(per_query["query_id"].to_pylist(), per_query["query"].to_pylist(), strict=True))


def values(per_query: pa.Table, metrics: Iterable[str]) -> dict[str, dict[str, float | None]]:
    """values[metric][query_id] of one view's part of per_query.parquet, without the metrics that it has not."""
    ids = per_query["query_id"].to_pylist()
    found = [metric for metric in metrics if metric in per_query.column_names]
    return {metric: dict(zip(ids, per_query[metric].to_pylist(), strict=True)) for metric in found}


def part(table: pa.Table, **equal: str) -> pa.Table:
    """The rows of a table with these values, as in part(rankings, split="test", view="text")."""
    for name, value in equal.items():
        table = table.filter(pc.equal(table[name], value))
    return table


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


def _products(tables: Iterable[pa.Table], catalogue: Mapping[str, int]) -> list[list[str | None]]:
    """[id, title, photo] of each product of the catalogue; the first table that has a photo of it gives it."""
    found: list[list[str | None]] = [[product_id, None, None] for product_id in catalogue]
    for table in tables:
        for product_id, title, photo in zip(
            *(table[name].to_pylist() for name in ("product_id", "title", "photo")), strict=True
        ):
            if product_id in catalogue:
                known = found[catalogue[product_id]]
                known[1] = known[1] or title
                known[2] = known[2] or (base64.b64encode(photo).decode() if photo else None)
    return found


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
