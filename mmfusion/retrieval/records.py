"""The files of a run folder behind its numbers: every query's values, its first products, their titles and photos.

Reports and comparisons are made from these files alone, on any machine and without the shards:
  per_query.parquet   split, view, query_id, query, and one column per metric (null: left out of the mean)
  rankings.parquet    split, view, query_id, rank from 1 on, product_id, score, and of each label column label/<column>
                      and gain/<column> (null: not judged)
  products.parquet    product_id, title, photo (JPEG; null: none, or no room)
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmfusion.batch import Judgments, RetrievalData
from mmfusion.retrieval.evaluation import ViewResult
from mmfusion.retrieval.metrics import ranked_gains
from mmfusion.retrieval.report import read_results

FIRST_PRODUCTS = 10
PHOTO_SIDE = 96  # pixels
TABLES = ("per_query", "rankings", "products")


@dataclass(frozen=True)
class Records:
    """What `read` finds in a folder."""

    folder: Path
    results: dict[str, Any]
    per_query: pa.Table
    rankings: pa.Table
    products: pa.Table


def read(folder: Path) -> Records:
    """Raises ValueError where a file is missing: the folder holds no evaluation, or one of an older version."""
    paths = {name: folder / f"{name}.parquet" for name in TABLES}
    missing = [path.name for path in (folder / "results.json", *paths.values()) if not path.is_file()]
    if missing:
        raise ValueError(f"{folder} has no {', '.join(missing)}: evaluate the run again with `make eval RUN=...`")
    return Records(folder, read_results(folder / "results.json"), *(pq.read_table(path) for path in paths.values()))


def write(
    folder: Path, results: Mapping[str, Mapping[str, ViewResult]], primary: str, data: RetrievalData, photos_mib: float
) -> None:
    """Writes the three tables of results[split][view]; each is written beside its place and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    product_ids = np.array(data.product_ids(), dtype=np.dtypes.StringDType())
    views = [(split, view, result) for split, views in results.items() for view, result in views.items()]
    _replace(folder / "per_query.parquet", pa.concat_tables(
        [_per_query(split, view, result, data) for split, view, result in views], promote_options="default"
    ))  # fmt: skip
    judgments = {split: data.judgments(split) for split in results}
    _replace(folder / "rankings.parquet", pa.concat_tables(
        [_ranking(split, view, result, data, product_ids, judgments[split]) for split, view, result in views]
    ))  # fmt: skip
    _replace(folder / "products.parquet", _products(results, primary, data, product_ids, photos_mib))


def _per_query(split: str, view: str, result: ViewResult, data: RetrievalData) -> pa.Table:
    about = {"query_id": data.query_ids(result.query_ids), "query": data.query_texts(result.query_ids)}
    values = {name: pa.array(values, from_pandas=True) for name, values in result.per_query.items()}
    return pa.table(_named(split, view, len(result.query_ids)) | about | values)


def _ranking(
    split: str, view: str, result: ViewResult, data: RetrievalData, product_ids: np.ndarray, judgments: Judgments
) -> pa.Table:
    top = result.top.ids[:, :FIRST_PRODUCTS].numpy()
    query, place = np.nonzero(top >= 0)
    columns: dict[str, Any] = {
        "query_id": np.array(data.query_ids(result.query_ids), dtype=object)[query],
        "rank": (place + 1).astype(np.int32),
        "product_id": product_ids[top[query, place]].tolist(),
        "score": result.top.scores[:, :FIRST_PRODUCTS].numpy()[query, place],
    }
    for column in judgments.gain:
        gains = ranked_gains(top, result.query_ids, judgments, column).shown[query, place]
        columns[f"label/{column}"] = pa.array(_labels(gains, judgments.labels.get(column, {})), pa.string())
        columns[f"gain/{column}"] = pa.array(gains, pa.float64(), from_pandas=True)
    return pa.table(_named(split, view, len(query)) | columns)


def _labels(gains: np.ndarray, labels: Mapping[str, float]) -> list[str | None]:
    names = {gain: label for label, gain in labels.items()}
    return [None if np.isnan(gain) else names.get(gain, f"{gain:g}") for gain in gains.tolist()]


def _named(split: str, view: str, rows: int) -> dict[str, Any]:
    return {name: pa.array([value] * rows, pa.string()) for name, value in (("split", split), ("view", view))}


def _products(
    results: Mapping[str, Mapping[str, ViewResult]],
    primary: str,
    data: RetrievalData,
    product_ids: np.ndarray,
    photos_mib: float,
) -> pa.Table:
    """Every product that the rankings show; photos, until there is no room, of those that a reader asks for first."""
    order = _as_looked_at(results, primary)
    titles = data.product_column("title") if "title" in data.product_columns() else np.array(data.product_texts())
    photos: list[bytes | None] = []
    room = photos_mib * 2**20
    for part in np.array_split(order, max(1, len(order) // 500)):
        found = data.thumbnails(part, PHOTO_SIDE) if room > 0 else [None] * len(part)
        room -= sum(len(photo) for photo in found if photo)
        photos += found
    return pa.table({
        "product_id": pa.array(product_ids[order].tolist(), pa.string()),
        "title": pa.array([str(title) for title in titles[order]], pa.string()),
        "photo": pa.array(photos, pa.binary()),
    })  # fmt: skip


def _as_looked_at(results: Mapping[str, Mapping[str, ViewResult]], primary: str) -> np.ndarray:
    """The products shown, each once: test's first; in a split, of the queries that differ most from text alone."""
    splits = sorted(results, key=lambda split: split != "test")
    shown: list[np.ndarray] = []
    for split in splits:
        views = results[split]
        rows = _extremes_first(views[primary], views.get("text", views[primary]))
        tops = np.stack([result.top.ids[:, :FIRST_PRODUCTS].numpy() for result in views.values()], 1)
        shown.append(tops[rows].reshape(-1))
    products = np.concatenate(shown)
    kept = products[products >= 0]
    return kept[np.sort(np.unique(kept, return_index=True)[1])]


def _extremes_first(ours: ViewResult, text: ViewResult) -> np.ndarray:
    metric = next((name for name in ours.per_query if name.endswith("ndcg@10")), next(iter(ours.per_query)))
    difference = np.abs(ours.per_query[metric] - text.per_query[metric])
    return np.argsort(-np.nan_to_num(difference, nan=-1), kind="stable")


def _replace(path: Path, table: pa.Table) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(table, beside, compression="zstd")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
