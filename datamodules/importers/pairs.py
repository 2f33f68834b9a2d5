"""Pairs of others beside shards that exist: a teacher's scores, or hard negatives, by the catalogue's own ids.

A table with the columns query_id, product_id and score (.csv, .csv.gz or .parquet) becomes a table of dense ids in the
folder of shards: `data.scores` trains on scores, `data.hard_from` on negatives. Texts are mapped and let go batch by
batch; what is held is 20 bytes per row besides the catalogue's ids.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datamodules.importers.published import require
from datamodules.importing.outputs import file_sha256
from datamodules.importing.staging import texts
from datamodules.importing.tables import place, table_batches
from datamodules.manifest import Manifest, pair_file, read_manifest
from datamodules.pair_tables import RESERVED, write_pair_table

ROWS = 1 << 18  # mapped at a time: each time, the catalogue's ids are hashed


@dataclass(kw_only=True)
class _Pairs:
    kind: ClassVar[Literal["scores", "negatives"]]

    src: str
    out: str
    name: str | None = None
    replace: bool = False

    usage: ClassVar[str] = "SRC=file OUT=shards"

    def run(self) -> Path:
        """Writes the table and returns it. Raises FileNotFoundError or ValueError; then nothing is written."""
        src, out = Path(self.src), Path(self.out)
        if not src.is_file():
            raise FileNotFoundError(f"SRC={src} is no file; expected a table with query_id, product_id and score")
        name = self._name(src, read_manifest(out))
        ids = {column: _ids(out, column) for column in ("query_id", "product_id")}
        query, product, score = self._read(src, ids)
        order = _order(src, query, product, len(ids["product_id"]))
        made_by: dict[str, Any] = {
            "importer": self.kind, "file": src.name, "sha256": file_sha256(src), "rows": len(query)
        }  # fmt: skip
        table = write_pair_table(
            out, name, self.kind, query[order], product[order], score[order], made_by, self.replace
        )
        print(f"{len(query):,} pairs of {len(np.unique(query)):,} queries, {self._used(out, query):,} of them in train")
        print(f"{self.kind}: {table}")
        return table

    def _name(self, src: Path, manifest: Manifest) -> str:
        """Raises ValueError, before the file is read, for what no such table may be called."""
        name = self.name if self.name is not None else _stem(src)
        try:
            pair_file(name)
            if name in {*RESERVED, *(manifest.labels if self.kind == "scores" else ())}:
                raise ValueError(f"{name!r} is a label column or another source of pairs already")
        except ValueError as error:
            given = f"NAME={name}" if self.name is not None else f"SRC={src} gives the table the name {name!r}"
            raise ValueError(f"{given}: {error}. Choose a name by NAME=... (--name)") from error
        return name

    def _read(self, src: Path, ids: dict[str, pa.Array]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Dense ids and scores of all rows, in the file's order."""
        needs_score = self.kind == "scores"
        names = require(src, ["query_id", "product_id", *(["score"] if needs_score else [])])
        parts: dict[str, list[np.ndarray]] = {"query_id": [], "product_id": [], "score": []}
        for start, batch in _numbered(src):
            for column, own in ids.items():
                parts[column].append(_dense(src, batch, column, own, start))
            scored = "score" in names
            parts["score"].append(_scores(src, batch, start) if scored else np.zeros(batch.num_rows, np.float32))
        if not parts["score"]:
            raise ValueError(f"{src} has no rows")
        query, product, score = (np.concatenate(column) for column in parts.values())
        return query, product, score

    def _used(self, out: Path, query: np.ndarray) -> int:
        """How many of the queries are train queries: no other is ever drawn."""
        split = pq.read_table(out / "queries.parquet", columns=["split"])["split"].combine_chunks()
        return int(pc.sum(pc.equal(split.take(pa.array(np.unique(query))), "train")).as_py())


@dataclass(kw_only=True)
class Scores(_Pairs):
    """A teacher's scores beside shards, to distil from (data.scores).

    Args:
        src: File with the columns query_id, product_id and score (.csv, .csv.gz or .parquet), of the catalogue's own
            ids; a score is any finite number.
        out: Folder of shards, which exists.
        name: Of the table: letters in lower case, digits, - and _. Default: the file's name without its ending.
        replace: Put it in the place of a table of that name, if there is one.
    """

    kind = "scores"


@dataclass(kw_only=True)
class Negatives(_Pairs):
    """Hard negatives beside shards, to train with (data.hard_from).

    Args:
        src: File with the columns query_id and product_id (.csv, .csv.gz or .parquet), of the catalogue's own ids;
            a column score is kept, without one it is 0.
        out: Folder of shards, which exists.
        name: Of the table: letters in lower case, digits, - and _. Default: the file's name without its ending.
        replace: Put it in the place of a table of that name, if there is one.
    """

    kind = "negatives"


def _stem(src: Path) -> str:
    """Teacher Scores.csv.gz -> teacher-scores."""
    return re.sub(r"[^a-z0-9_-]+", "-", src.name.removesuffix(".gz").rpartition(".")[0].lower()).strip("-")


def _ids(out: Path, column: str) -> pa.Array:
    """The catalogue's own ids; position is the dense id."""
    file = out / ("queries.parquet" if column == "query_id" else "index.parquet")
    return pc.cast(pq.read_table(file, columns=[column])[column].combine_chunks(), pa.string())


def _numbered(src: Path) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches of ROWS or more, each with the number of its first row."""
    start, waiting = 0, list[pa.RecordBatch]()
    for batch in table_batches(src):
        waiting.append(batch)
        if sum(part.num_rows for part in waiting) >= ROWS:
            yield start, pa.concat_batches(waiting)
            start, waiting = start + sum(part.num_rows for part in waiting), []
    if waiting:
        yield start, pa.concat_batches(waiting)


def _dense(src: Path, batch: pa.RecordBatch, column: str, ids: pa.Array, start: int) -> np.ndarray:
    given = texts(batch[column])
    dense = pc.fill_null(pc.index_in(given, value_set=ids), -1).to_numpy()
    unknown = np.flatnonzero(dense < 0)
    if len(unknown):
        row = int(unknown[0])
        raise _error(src, start + row, f"{column} {given[row].as_py()!r} is none of this catalogue's {len(ids):,}")
    return dense.astype(np.int64)


def _scores(src: Path, batch: pa.RecordBatch, start: int) -> np.ndarray:
    column = batch["score"]
    try:
        with np.errstate(over="ignore"):  # told below, with the row
            score = pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False).astype(np.float32)
    except pa.ArrowException:  # which does not tell the row
        score = np.array([_number(cell) for cell in texts(column).to_pylist()], np.float32)
    wrong = np.flatnonzero(~np.isfinite(score))
    if len(wrong):
        row = int(wrong[0])
        raise _error(src, start + row, f"the score is {column[row].as_py()!r}; expected a finite number")
    return score


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return np.nan


def _order(src: Path, query: np.ndarray, product: np.ndarray, products: int) -> np.ndarray:
    """That of (query, product). Raises ValueError when a pair is listed twice."""
    pair = query * products + product
    order = np.argsort(pair, kind="stable")
    twice = np.flatnonzero(np.diff(pair[order]) == 0)
    if len(twice):
        row, other = int(order[twice[0] + 1]), int(order[twice[0]])
        raise _error(src, row, f"the same query and product as in {place(src, other)}; a pair is listed once")
    return order


def _error(src: Path, row: int, problem: str) -> ValueError:
    return ValueError(f"{src}, {place(src, row)}: {problem}")
