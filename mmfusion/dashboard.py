"""A run folder's evaluation in Weights & Biases: the numbers, tables, photos and plots of its report, natively.

Summary   final/<split>/<view>/<metric>; final/primary, by which runs sort; val/primary, by which sweeps choose
Tables    results/<split>, slices/<split>, examples/<split>; of fused runs gates and exclusive/<split>
Plots     charts/views/<split>, charts/calibration/<split>, charts/slices/<split>/<slice>
experiments/dashboard.py lays them out.

examples/<split> are the report's galleries: the same queries and products, in the views that it shows at first. What
is less: the other views (random, hybrids), and the report's search over all queries.
"""

import contextlib
import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmfusion.gallery import Product, example_queries, example_views, first_products
from mmfusion.retrieval.examples import FIRST_PRODUCTS, main_metric
from mmfusion.retrieval.records import PHOTO_SIDE, Records, part, read
from mmfusion.retrieval.report import View, splits

RESULT_COLUMNS = ("view", "metric", "value", "low", "high")
SLICE_COLUMNS = ("slice", "group", "view", "metric", "queries", "value", "low", "high")  # group: a value of the slice
GATE_COLUMNS = ("slice", "group", "gate", "products", "mean", "std")  # of the head's weights, over products
EXCLUSIVE_COLUMNS = ("labels", "label", "share", "share of first", "per query", "products")  # of exclusive matches


def log_evaluation(run: Any, folder: Path, best: float | None = None) -> None:
    """Logs to `run`, a wandb.Run, what an evaluation wrote into the run folder. To be called once, on rank 0.

    best: val/primary of the kept checkpoint. It becomes the summary's value, which otherwise is the last one: runs are
    sorted and a sweep's best run is found by it. (define_metric's summary="max" would file it under val/primary.max,
    where both miss it.) Raises ValueError where a file of the evaluation is missing.
    """
    records = read(folder)
    run.summary.update(final_values(records.results))
    if best is not None:
        run.summary["val/primary"] = best
    with _photos_kept_in(Path(run.dir).parent):
        for split in splits(records.results):
            run.log(_tables(records, split) | _charts(records.results, split))
        if rows := gate_rows(records.results.get("gates", {}).get("slices", {})):
            run.log({"gates": _table(GATE_COLUMNS, rows)})
    if (folder / "report.html").is_file():
        # A file of the run: an artifact would be versioned, wandb.Html load its megabytes with every workspace. Copied,
        # as `save` would link to it, and a link breaks when an offline run is synced from elsewhere.
        shutil.copy(folder / "report.html", run.dir)
        run.save(f"{run.dir}/report.html", base_path=run.dir, policy="now")


def final_values(results: Mapping[str, Any]) -> dict[str, float]:
    """`final/<split>/<view>/<metric>`; and where there is a test, `final/primary`: the primary view's main metric."""
    values = {
        f"final/{split}/{view}/{name}": cell["value"]
        for split in splits(results)
        for view, metrics in results[split].items()
        for name, cell in metrics.items()
    }
    if "test" in splits(results):
        primary = results["run"]["primary"]
        values["final/primary"] = values[f"final/test/{primary}/{main_metric(results['test'][primary])}"]
    return {name: value for name, value in values.items() if value is not None}


# ---- tables ----------------------------------------------------------------------------------------------------------


def _tables(records: Records, split: str) -> dict[str, Any]:
    columns, examples = _examples(records, split)
    tables = {
        f"results/{split}": _table(RESULT_COLUMNS, result_rows(records.results[split])),
        f"examples/{split}": _table(columns, examples),
    }
    if slices := records.results.get("slices", {}).get(split):
        tables[f"slices/{split}"] = _table(SLICE_COLUMNS, slice_rows(slices))
    if exclusive := records.results.get("exclusive", {}).get(split):
        tables[f"exclusive/{split}"] = _table(EXCLUSIVE_COLUMNS, exclusive_rows(exclusive))
    return tables


def _table(columns: Sequence[str], rows: list[list[Any]]) -> Any:
    from wandb import Table  # noqa: PLC0415  (it takes a second, and only runs that log to it need it)

    return Table(list(columns), rows)


def gate_rows(slices: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[list[Any]]:
    """Rows of GATE_COLUMNS."""
    return [
        [name, group, gate, cell["products"], mean, cell["std"][gate]]
        for name, groups in slices.items()
        for group, cell in groups.items()
        for gate, mean in cell["mean"].items()
    ]


def exclusive_rows(found: Mapping[str, Any]) -> list[list[Any]]:
    """Rows of EXCLUSIVE_COLUMNS."""
    return [
        [column, label, shares["exclusive"], shares["first"], found["per_query"]["value"], found["products"]]
        for column, labels in found["labels"].items()
        for label, shares in labels.items()
    ]


def result_rows(views: Mapping[str, View]) -> list[list[Any]]:
    """Rows of RESULT_COLUMNS."""
    return [
        [view, name, cell["value"], cell["low"], cell["high"]]
        for view, metrics in views.items()
        for name, cell in metrics.items()
    ]


def slice_rows(slices: Mapping[str, Mapping[str, Mapping[str, View]]]) -> list[list[Any]]:
    """Rows of SLICE_COLUMNS."""
    return [
        [name, group, view, metric, cell["queries"], cell["value"], cell["low"], cell["high"]]
        for name, groups in slices.items()
        for group, views in groups.items()
        for view, metrics in views.items()
        for metric, cell in metrics.items()
    ]


def _examples(records: Records, split: str) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: the query, the galleries that show it, a view, its main metric and its first products."""
    metric = main_metric(records.results[split][records.results["run"]["primary"]])
    chosen = example_queries(records, split)
    per_query = part(records.per_query, split=split, query_id=list(chosen)).to_pylist()
    of_view = {(row["query_id"], row["view"]): row for row in per_query}
    products, views = first_products(records, split, list(chosen)), example_views(records, split)
    rows = []
    for query, view in ((query, view) for query in chosen for view in views if (query, view) in products):
        images: list[Any] = [_image(product) for product in products[query, view]]
        row = of_view[query, view]
        rows.append([row["query"], chosen[query], view, row[metric], *images, *[None] * (FIRST_PRODUCTS - len(images))])
    return ["query", "shown as", "view", metric, *(str(rank) for rank in range(1, FIRST_PRODUCTS + 1))], rows


def _image(product: Product) -> Any:
    """A grey square stands for a missing photo, so that the caption is seen."""
    import wandb  # noqa: PLC0415

    caption, photo = product
    picture = Image.open(io.BytesIO(photo)) if photo else Image.new("RGB", (PHOTO_SIDE, PHOTO_SIDE), "lightgrey")
    return wandb.Image(picture, caption=caption, file_type="jpg")


@contextlib.contextmanager
def _photos_kept_in(folder: Path) -> Iterator[None]:
    """The photos of a table wait in W&B's data folder until they are sent: in the run's own, not in the user's home.

    The library looks for that folder in the environment alone; one that the user has set there stays.
    """
    given = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = given or str(folder)
    try:
        yield
    finally:
        if given is None:
            del os.environ["WANDB_DATA_DIR"]


# ---- plots -----------------------------------------------------------------------------------------------------------


def _charts(results: Mapping[str, Any], split: str) -> dict[str, Any]:
    from wandb.plot import line_series  # noqa: PLC0415

    primary = results["run"]["primary"]
    metric = main_metric(results[split][primary])
    charts = {f"charts/views/{split}": _bars(results[split], metric, f"{split}: {metric}")}
    calibration = results.get("calibration", {}).get(split, {})
    filled = {view: [part for part in bins if part["pairs"]] for view, bins in calibration.items()}
    if filled := {view: bins for view, bins in filled.items() if bins}:
        charts[f"charts/calibration/{split}"] = line_series(
            [list(range(1, len(bins) + 1)) for bins in filled.values()],
            [[part["relevant"] for part in bins] for bins in filled.values()],
            keys=list(filled),
            title=f"{split}: share of relevant among retrieved, judged products",
            xname="bin of scores, lowest first",
        )
    for name, groups in results.get("slices", {}).get(split, {}).items():
        of_primary = {group: views[primary] for group, views in groups.items() if views.get(primary)}
        if of_primary:
            metric = main_metric(next(iter(of_primary.values())))
            title = f"{split}: {metric} of {primary} by {name}"
            charts[f"charts/slices/{split}/{name}"] = _bars(of_primary, metric, title)
    return charts


def _bars(rows: Mapping[str, View], metric: str, title: str) -> Any:
    import wandb  # noqa: PLC0415

    values = [[name, metrics[metric]["value"]] for name, metrics in rows.items() if metric in metrics]
    return wandb.plot.bar(wandb.Table(["label", "value"], values), "label", "value", title)
