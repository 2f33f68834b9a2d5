"""What stands behind a mean: slices of queries and of products, and how far a score can be trusted."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmfusion.batch import Judgments, RetrievalData
from mmfusion.retrieval.evaluation import Evaluation, ViewResult
from mmfusion.retrieval.metrics import calibration, ranked_gains
from mmfusion.retrieval.slices import find_columns, product_slices, query_slices, slice_by_product, slice_by_query

MAIN = ("ndcg@10", "recall@100", "mrr")  # metrics of slices by query
KS = (10, 100)  # depths of slices by product

Slices = dict[str, dict[str, dict[str, dict[str, Any]]]]  # [slice][value][view][metric]


def slices(views: Mapping[str, ViewResult], judgments: Judgments, data: RetrievalData, options: Evaluation) -> Slices:
    """[slice][value][view][metric] = {"value", "low", "high", "queries"} of one split's views."""
    query_columns, product_columns = find_columns(data, options.slices)
    found: Slices = {}
    query_ids = next(iter(views.values())).query_ids
    for name, labels in query_slices(data, query_ids, query_columns).items():
        for view, result in views.items():
            _file(found, name, view, slice_by_query(_main(result), labels, resamples=options.resamples))
    for name, labels in product_slices(data, product_columns).items():
        for view, result in views.items():
            _file(found, name, view, _by_product(result, judgments, labels, options))
    return found


def _main(result: ViewResult) -> dict[str, np.ndarray]:
    """The metrics of MAIN, or where none of them was measured the first one."""
    names = [name for name in result.per_query if name.rpartition("/")[2] in MAIN] or list(result.per_query)[:1]
    return {name: result.per_query[name] for name in names}


def _by_product(result: ViewResult, judgments: Judgments, labels: np.ndarray, options: Evaluation) -> dict[str, Any]:
    ks = [k for k in KS if k <= options.depth]
    cells: dict[str, Any] = {}
    for column in judgments.gain:
        of_column = slice_by_product(
            result.top.ids.numpy(), result.query_ids, judgments, column, labels, ks, resamples=options.resamples
        )
        for value, metrics in of_column.items():
            cells.setdefault(value, {}).update({f"{column}/{name}": cell for name, cell in metrics.items()})
    return cells


def _file(found: Slices, name: str, view: str, values: Mapping[str, Mapping[str, Any]]) -> None:
    for value, metrics in values.items():
        found.setdefault(name, {}).setdefault(value, {})[view] = dict(metrics)


def calibrations(views: Mapping[str, ViewResult], judgments: Judgments) -> dict[str, list[dict[str, Any]]]:
    """Per view: how many of the retrieved and judged products are relevant, by score; in the first label column."""
    column = next(iter(judgments.gain))
    return {
        view: calibration(
            result.top.scores.numpy(),
            ranked_gains(result.top.ids.numpy(), result.query_ids, judgments, column),
        )
        for view, result in views.items()
    }


def breakdown(
    results: Mapping[str, Mapping[str, ViewResult]], data: RetrievalData, options: Evaluation, views: Sequence[str]
) -> dict[str, Any]:
    """The keys `slices` and `calibration` of results.json, for those of the views that a split has."""
    kept = {split: {view: of_split[view] for view in views if view in of_split} for split, of_split in results.items()}
    judged = {split: data.judgments(split) for split in results}
    return {
        "slices": {split: slices(of_split, judged[split], data, options) for split, of_split in kept.items()},
        "calibration": {split: calibrations(of_split, judged[split]) for split, of_split in kept.items()},
    }
