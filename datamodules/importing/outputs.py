"""What lies beside the tars: index, queries and judgments as Parquet, and the list of photos that are missing."""

import csv
import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.catalogue import Catalogue
from datamodules.importing.dense import DenseJudgments
from datamodules.importing.records import Done

ROW_GROUP = 1 << 20  # rows
TABLES = ("index.parquet", "judgments.parquet", "queries.parquet")
MISSING = "missing_photos.csv"


def write_tables(folder: Path, catalogue: Catalogue, judgments: DenseJudgments, written: list[Done]) -> dict[str, str]:
    """Writes TABLES and MISSING; returns the sha256 of each of TABLES. `written`: by number."""
    _write_index(catalogue, judgments, written, folder / "index.parquet")
    _write_queries(catalogue, judgments, folder / "queries.parquet")
    _write_judgments(judgments, folder / "judgments.parquet")
    _write_missing(catalogue, written, folder / MISSING)
    return {name: file_sha256(folder / name) for name in TABLES}


def _write_index(catalogue: Catalogue, judgments: DenseJudgments, written: list[Done], path: Path) -> None:
    number = np.repeat([done.number for done in written], [len(done.photo) for done in written])
    columns = {
        "product_id": catalogue.products.take(["product_id"], judgments.order)["product_id"].combine_chunks(),
        "id": np.arange(len(judgments.order)),
        "shard": number.astype(np.int32),
        "offset": np.concatenate([done.offset for done in written]),
        "size": np.concatenate([done.size for done in written]),
        "photo": np.concatenate([done.photo for done in written]),
        "pairs": judgments.pairs.astype(np.int32),
    }
    pq.write_table(pa.table(columns), path)


def _write_queries(catalogue: Catalogue, judgments: DenseJudgments, path: Path) -> None:
    count = len(catalogue.queries)
    positives = np.bincount(judgments.query[judgments.positive], minlength=count).astype(np.int32)
    texts = {name: catalogue.queries[name] for name in catalogue.queries.names}
    first = {"query_id": texts.pop("query_id"), "id": np.arange(count)}
    pq.write_table(pa.table({**first, **texts, "positives": positives}), path)


def _write_judgments(judgments: DenseJudgments, path: Path) -> None:
    writer = None
    for start in range(0, len(judgments.query), ROW_GROUP):
        rows = slice(start, start + ROW_GROUP)
        pairs = {name: getattr(judgments, name)[rows].astype(np.int64) for name in ("query", "product")}
        # from_pandas: NaN, not judged, becomes null
        gains = {name: pa.array(gain[rows], from_pandas=True) for name, gain in judgments.gain.items()}
        table = pa.table({**pairs, **gains})
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table, row_group_size=ROW_GROUP)
    assert writer is not None  # a catalogue has judgments
    writer.close()


def _write_missing(catalogue: Catalogue, written: list[Done], path: Path) -> None:
    failed = sorted(failed for done in written for failed in done.failed)
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["product_id", "image", "reason"])
        for photo in failed:
            product_id = catalogue.products["product_id"][photo.row].as_py()
            rows.writerow([product_id, catalogue.image(photo.row), photo.reason])


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
