"""What stands behind a mean: slices of queries and of products, and how far a score can be trusted."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmfusion.batch import Judgments, RetrievalData
from mmfusion.retrieval.answers import answer_slices
from mmfusion.retrieval.evaluation import Evaluation, ViewResult, main_metrics
from mmfusion.retrieval.examination import percent
from mmfusion.retrieval.exclusive import exclusive_matches
from mmfusion.retrieval.gates import Weights, gate_summary
from mmfusion.retrieval.metrics import calibration, ranked_gains
from mmfusion.retrieval.slices import (
    find_columns,
    product_slices,
    query_slices,
    slice_by_product,
    slice_by_query,
    stated_columns,
)

PHOTOS_DROPPED = "photos_dropped"
KS = (10, 100)  # depths of slices by product

Slices = dict[str, dict[str, dict[str, dict[str, Any]]]]  # [slice][value][view][metric]


def slices(
    views: Mapping[str, ViewResult],
    judgments: Judgments,
    data: RetrievalData,
    options: Evaluation,
    texts: Sequence[str],
    of_products: Mapping[str, np.ndarray],
    dropped: Mapping[str, ViewResult],
) -> Slices:
    """[slice][value][view][metric] = {"value", "low", "high", "queries"} of one split's views.

    texts: of the products. of_products: their `product_slices`. dropped: the view fused by how many of the photos
    were hidden from it ("50 %").
    """
    found: Slices = {}
    query_ids = next(iter(views.values())).query_ids
    columns = {name: data.product_column(column) for name, column in stated_columns(data, options.stated).items()}
    of_queries = query_slices(data, query_ids, find_columns(data, options.slices)[0]) | answer_slices(
        data.query_texts(query_ids), texts, query_ids, judgments, columns
    )
    for name, labels in of_queries.items():
        for view, result in views.items():
            _file(found, name, view, slice_by_query(_main(result), labels, resamples=options.resamples))
    for name, labels in of_products.items():
        for view, result in views.items():
            _file(found, name, view, _by_product(result, judgments, labels, options))
    for value, result in ({percent(0): views["fused"]} | dict(dropped) if dropped else {}).items():
        everywhere = np.full(len(query_ids), value)
        _file(found, PHOTOS_DROPPED, "fused", slice_by_query(_main(result), everywhere, resamples=options.resamples))
    return found


def _main(result: ViewResult) -> dict[str, np.ndarray]:
    return {name: result.per_query[name] for name in main_metrics(result.per_query)}


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
    results: Mapping[str, Mapping[str, ViewResult]],
    data: RetrievalData,
    options: Evaluation,
    views: Sequence[str],
    dropped: Mapping[str, Mapping[str, ViewResult]] | None = None,
    weights: Weights | None = None,
) -> dict[str, Any]:
    """Keys of results.json, for those of the views that a split has: `slices` and `calibration`, and of fused runs
    `gates` (of a head that has some) and `exclusive`.

    dropped: [split][how many], the view fused with photos hidden. weights: the head's, by gate and product.
    """
    texts = data.product_texts()  # read once: they come from the shards
    of_products = product_slices(data, texts, find_columns(data, options.slices)[1])
    gates = gate_summary(weights or {}, of_products)
    kept = {split: {view: of_split[view] for view in views if view in of_split} for split, of_split in results.items()}
    judged = {split: data.judgments(split) for split in results}
    found: dict[str, Any] = {
        "slices": {
            split: slices(of_split, judged[split], data, options, texts, of_products, (dropped or {}).get(split, {}))
            for split, of_split in kept.items()
        },
        "calibration": {split: calibrations(of_split, judged[split]) for split, of_split in kept.items()},
    }
    exclusive = {split: _exclusive(of_split, judged[split], data, options) for split, of_split in kept.items()}
    found |= {"exclusive": exclusive} if all(exclusive.values()) else {}
    return found | ({"gates": gates} if gates else {})


def _exclusive(
    views: Mapping[str, ViewResult], judgments: Judgments, data: RetrievalData, options: Evaluation
) -> dict[str, Any]:
    """`exclusive_matches`, with the catalogue's own ids of the queries that it names."""
    found = exclusive_matches(views, judgments, options)
    return found and found | {"most": data.query_ids(np.array(found["most"], np.int64))}
