"""The files of a run folder behind its numbers: every query's values, its first products, their titles and photos.

Reports and comparisons are made from these files alone, on any machine and without the shards:
  per_query.parquet   split, view, query_id, query, and one column per metric (null: left out of the mean)
  rankings.parquet    split, view, query_id, rank from 1 on, product_id, score, and of each label column label/<column>
                      and gain/<column> (null: not judged)
  products.parquet    product_id, title, has_photo (in the catalogue), photo (JPEG; null: none, or no room)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmfusion.batch import Judgments, RetrievalData
from mmfusion.retrieval.evaluation import ViewResult
from mmfusion.retrieval.examples import FIRST_PRODUCTS, products_as_seen
from mmfusion.retrieval.files import replaced
from mmfusion.retrieval.labels import names
from mmfusion.retrieval.metrics import ranked_gains
from mmfusion.retrieval.report import read_results

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


def part(table: pa.Table, **among: str | list[str]) -> pa.Table:
    """The rows whose named columns hold this value, or one of these: part(rankings, split="test", view=["text"])."""
    for name, values in among.items():
        wanted = [values] if isinstance(values, str) else values
        table = table.filter(pc.is_in(table[name], pa.array(wanted, pa.string())))
    return table


def write(
    folder: Path, results: Mapping[str, Mapping[str, ViewResult]], primary: str, data: RetrievalData, photos_mib: float
) -> None:
    """Writes the three tables of results[split][view], each whole or not at all.

    primary: the view that galleries hold against text. photos_mib: most MiB of JPEG in products.parquet.
    """
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
    named = names(labels)
    return [None if np.isnan(gain) else named.get(gain, f"{gain:g}") for gain in gains.tolist()]


def _named(split: str, view: str, rows: int) -> dict[str, Any]:
    return {name: pa.array([value] * rows, pa.string()) for name, value in (("split", split), ("view", view))}


def _products(
    results: Mapping[str, Mapping[str, ViewResult]],
    primary: str,
    data: RetrievalData,
    product_ids: np.ndarray,
    photos_mib: float,
) -> pa.Table:
    """Every product that the rankings show."""
    order = products_as_seen(results, primary)
    titles = data.product_column("title") if "title" in data.product_columns() else np.array(data.product_texts())
    return pa.table({
        "product_id": pa.array(product_ids[order].tolist(), pa.string()),
        "title": pa.array([str(title) for title in titles[order]], pa.string()),
        "has_photo": pa.array(data.has_photo()[order], pa.bool_()),
        "photo": pa.array(_photos(order, data, photos_mib * 2**20), pa.binary()),
    })  # fmt: skip


def _photos(products: np.ndarray, data: RetrievalData, room: float) -> list[bytes | None]:
    """JPEGs of the products in their order; None from the one on that would not fit into `room` bytes."""
    photos: list[bytes | None] = []
    for place in range(len(products)):
        (photo,) = data.thumbnails(products[place : place + 1], PHOTO_SIDE)
        room -= len(photo or b"")
        if room < 0:
            return photos + [None] * (len(products) - place)
        photos.append(photo)
    return photos


def _replace(path: Path, table: pa.Table) -> None:
    with replaced(path) as beside:
        pq.write_table(table, beside, compression="zstd")
