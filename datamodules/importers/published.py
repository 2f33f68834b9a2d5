"""What all importers do with files as published: find them, say what is missing, make batches of strings."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datamodules.importing.tables import column_names, require_columns

ROWS = 8192  # of a batch that Python fills row by row


def published_files(src: str | Path, names: Sequence[str], of: str) -> list[Path]:
    """The files in the folder `src`. Raises FileNotFoundError naming all that are missing and where they come from."""
    folder = Path(src)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder; expected the one with {', '.join(names)}, as {of} publishes them"
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"{folder} has no {', no '.join(missing)}; {of} publishes {', '.join(names)} (found: {found})"
        )
    return [folder / name for name in names]


def require(path: Path, needed: Iterable[str]) -> list[str]:
    """The names of a table's columns. Raises ValueError when one of `needed` is not among them."""
    names = column_names(path)
    require_columns(path, names, needed)
    return names


def joined(*columns: pa.Array | pa.Scalar, by: str = ":") -> pa.Array:
    """Row by row in one string: ids of several parts."""
    return pc.binary_join_element_wise(*columns, by)


def numbered(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """With the column `#row`: the row of the file, counted from 0, for batches that are filtered afterwards."""
    start = 0
    for batch in batches:
        yield batch.append_column("#row", pa.array(np.arange(start, start + batch.num_rows)))
        start += batch.num_rows


def not_empty(batches: Iterable[pa.RecordBatch], problem: str) -> Iterator[pa.RecordBatch]:
    """The batches; ValueError with `problem` at their end when none has a row."""
    rows = 0
    for batch in batches:
        rows += batch.num_rows
        yield batch
    if not rows:
        raise ValueError(problem)


def batches_of(rows: Iterable[Mapping[str, str | int]], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Rows that Python makes one by one; all columns are strings but `#row`."""
    schema = pa.schema([(name, pa.int64() if name == "#row" else pa.string()) for name in columns])
    iterator = iter(rows)
    while chunk := list(islice(iterator, ROWS)):
        yield pa.RecordBatch.from_pylist(chunk, schema)


def written(table: pa.Table) -> Iterator[pa.RecordBatch]:
    """A table that is in memory already, in batches."""
    yield from table.to_batches(max_chunksize=ROWS)
