"""What an evaluation leaves in a folder: results.json, the tables behind it, report.html, TREC files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmfusion.batch import RetrievalData
from mmfusion.module import RetrievalModule
from mmfusion.retrieval import records
from mmfusion.retrieval.breakdown import breakdown
from mmfusion.retrieval.evaluation import TOLD, ViewResult
from mmfusion.retrieval.html import write_report
from mmfusion.retrieval.report import RESERVED, print_table, write_results
from mmfusion.retrieval.trec import write_qrels, write_run

Metrics = dict[str, dict[str, Any]]


def metrics_of(model: RetrievalModule) -> Metrics:
    """[split][view][metric] of the evaluation that the model has just made."""
    return {split: {view: result.metrics for view, result in views.items()} for split, views in model.results.items()}


def leave(
    folder: Path, model: RetrievalModule, data: RetrievalData, about: dict[str, Any], before: Metrics | None = None
) -> dict[str, Any]:
    """Writes and prints everything, on one rank; returns what results.json holds.

    about: the key `run`. before: views of an earlier evaluation (zero-shot) that the tables show as well.
    """
    results: dict[str, Any] = {
        split: (before or {}).get(split, {}) | views for split, views in metrics_of(model).items()
    }
    results["run"] = about | {
        "primary": model.primary,
        "left_out": _left_out(model),
        "hybrid_weight": model.hybrid_weight,
        "score_fusion_weight": model.score_fusion_weight,
        "evaluation": {name: getattr(model.evaluation, name) for name in TOLD},
    }
    write_results(folder / "results.json", results)  # the numbers first: what explains them may fail, or take long
    views = [*model.product.views, "bm25"]
    results |= breakdown(model.results, data, model.evaluation, views, model.dropped, model.gate_weights)
    write_results(folder / "results.json", results)
    records.write(folder, model.results, model.primary, data, model.evaluation.photos_mib)
    report = write_report(folder)
    for split in (name for name in results if name not in RESERVED):
        print_table(results, split)
    print(f"report: {report}")
    return results


def _left_out(model: RetrievalModule) -> dict[str, int]:
    """The queries that the primary view's means leave out, where there are any."""
    return {
        f"{split}/{name}": count
        for split, views in model.results.items()
        for name, count in views[model.primary].left_out().items()
        if count
    }


def write_trec(folder: Path, results: Mapping[str, Mapping[str, ViewResult]], data: RetrievalData) -> None:
    """<split>.<view>.run of every view, and <split>.<label column>.qrels, as trec_eval reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    product_ids = data.product_ids()
    for split, views in results.items():
        judgments = data.judgments(split)
        for view, result in views.items():
            query_ids = data.query_ids(result.query_ids)
            write_run(folder / f"{split}.{view}.run", query_ids, result.top, product_ids, tag=view)
        judged = data.query_ids(judgments.query)
        for column in judgments.gain:
            write_qrels(folder / f"{split}.{column}.qrels", judgments, judged, product_ids, column)
    print(f"trec: {folder}")
