"""What is shown of an evaluation at first: by which metric, in which views, which queries and products."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64

from mmfusion.retrieval.evaluation import ViewResult
from mmfusion.retrieval.report import FIRST, in_column

# the metrics of a first look, in this order
SHOWN = ("ndcg@10", "recall@100", "mrr", "precision@10", "judged@10")
EACH = 5  # queries of a gallery
FIRST_PRODUCTS = 10  # of a query and view


def shown_first(names: Iterable[str]) -> list[str]:
    """The metrics of a first look that are among the bare names; the first four names where none is."""
    names = list(names)
    return [name for name in SHOWN if name in names] or names[:4]


def main_metric(names: Iterable[str]) -> str:
    """Of `<label column>/<name>` metrics the one that comes first in a first look at the first label column."""
    names = list(names)
    column = names[0].rpartition("/")[0]
    return f"{column}/{shown_first(in_column({name: {} for name in names}, column))[0]}"


def held_against(primary: str, views: Iterable[str]) -> str | None:
    """What the primary view is compared with: text alone, else bm25; None where neither is another view."""
    views = list(views)
    return next((view for view in ("text", "bm25") if view in views and view != primary), None)


def shown_at_first(view: str) -> bool:
    """Whether galleries show a view before a reader asks for it: the trained ones and bm25."""
    return view in (*FIRST, "bm25")


@dataclass(frozen=True)
class Chosen:
    """Positions of queries. gained, lost: where the primary view gains and loses most, the most extreme first.

    drawn: at random, the same ones every time. order: all, those of the largest difference first.
    """

    gained: list[int]
    lost: list[int]
    drawn: list[int]
    order: list[int]

    def galleries(self, primary: str, against: str | None) -> dict[str, list[int]]:
        """The galleries that are not empty, by their titles."""
        found = {
            f"{primary} gains most over {against}": self.gained,
            f"{primary} loses most to {against}": self.lost,
            "Drawn at random": self.drawn,
        }
        return {title: rows for title, rows in found.items() if rows}


def choose(
    ours: Float[np.ndarray, "query"], theirs: Float[np.ndarray, "query"] | None = None, *, each: int = EACH
) -> Chosen:
    """By a metric of the primary view and of what it is held against; None, or NaN in either, is no difference."""
    difference = np.zeros(len(ours)) if theirs is None else np.nan_to_num(ours - theirs)
    best, worst = (np.argsort(sign * difference, kind="stable") for sign in (-1, 1))
    return Chosen(
        gained=[int(row) for row in best[:each] if difference[row] > 0],
        lost=[int(row) for row in worst[:each] if difference[row] < 0],
        drawn=np.random.default_rng(0).permutation(len(ours))[:each].tolist(),
        order=np.argsort(-np.abs(difference), kind="stable").tolist(),
    )


def products_as_seen(results: Mapping[str, Mapping[str, ViewResult]], primary: str) -> Int64[np.ndarray, "product"]:
    """The first products of results[split][view], each once, in the order in which readers see them; test's first.

    Those of the galleries' queries in the views shown at first, then in the others; then those of all queries.
    """
    tiers: list[list[np.ndarray]] = [[], [], [], []]
    for split in sorted(results, key=lambda split: split != "test"):
        views = results[split]
        at_first = [result for view, result in views.items() if shown_at_first(view)]
        others = [result for view, result in views.items() if not shown_at_first(view)]
        for tier, (rows, seen) in zip(
            tiers, itertools.product(_queries(views, primary), (at_first, others)), strict=True
        ):
            tops = [result.top.ids[rows, :FIRST_PRODUCTS].numpy() for result in seen]
            tier.append(np.stack(tops, 1).reshape(-1) if tops else np.empty(0, np.int64))
    products = np.concatenate(list(itertools.chain(*tiers)))
    found = products[products >= 0]
    return found[np.sort(np.unique(found, return_index=True)[1])]


def _queries(views: Mapping[str, ViewResult], primary: str) -> tuple[list[int], list[int]]:
    """Positions of those of the galleries, and of all."""
    metric = main_metric(views[primary].per_query)
    against = held_against(primary, views)
    chosen = choose(*(views[view].per_query[metric] for view in (primary, against) if view))
    return [*chosen.gained, *chosen.lost, *chosen.drawn], chosen.order
