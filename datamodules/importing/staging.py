"""A data set in the catalogue's terms, and its way from any published format into tables on disk, read by mapping.

An importer gives streams of record batches; staging writes them as Arrow IPC files, so that memory does not grow with
the data: whoever reads the tables maps the files, and the system keeps in memory what it has room for.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from datamodules.importing.staged import ROW, Table, open_table
from datamodules.manifest import Unlisted
from datamodules.photos.files import Photos

LEAST_ROWS, MOST_ROWS = 4096, 65536  # of a staged batch
TABLES = ("products", "queries", "judgments")


class Stream(NamedTuple):
    """Rows of one table, in batches that are made each time they are asked for.

    path: the published file, for messages.
    batches: gives columns of text or numbers; null means "". A column "#row" (int64) tells which row of `path` (from 0,
        without the header) each row comes from; without it they are the same. May raise ValueError naming file and row.
    """

    path: Path
    batches: Callable[[], Iterator[pa.RecordBatch]]


@dataclass(frozen=True)
class Source:
    """A data set in the catalogue's terms, not yet checked.

    name: of the manifest ("esci-us-large").
    options: what the tables do not show, for the manifest's `source`: {"importer": "esci", "locale": "us"}.
    products: product_id, title, any further text, image (a path, a URL or "").
    queries: query_id, query, split, any further columns.
    judgments: query_id, product_id, one or more label columns; "label" is renamed relevance.
    photos: how names of `image` become bytes; None: the data set has none, and the column image may be missing.
    gains, positive_from, unlisted: the data set's own defaults; the user's options override them.
    """

    name: str
    options: dict[str, Any]
    products: Stream
    queries: Stream
    judgments: Stream
    photos: Photos | None
    gains: dict[str, dict[str, float]] = field(default_factory=dict)
    positive_from: dict[str, float] = field(default_factory=dict)
    unlisted: dict[str, Unlisted] = field(default_factory=dict)


def stage(source: Source, folder: Path) -> dict[str, Table]:
    """Writes the tables of TABLES into `folder` (<table>.arrow) and maps them. Raises ValueError for one without rows.

    The digest of a table tells its content alone: neither the file's format nor the sizes of its batches matter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.completed:,} rows"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tables = {}
        for name in TABLES:
            task = progress.add_task(f"reading {name}", total=None)
            tables[name] = _stage(getattr(source, name), folder / f"{name}.arrow", lambda n: progress.advance(task, n))  # noqa: B023
            progress.update(task, total=len(tables[name]))
    return tables


def _stage(stream: Stream, path: Path, read: Callable[[int], None]) -> Table:
    content, writer = None, None
    for batch in _even(as_text(stream.path, batch) for batch in stream.batches()):
        if writer is None or content is None:
            content, writer = _Content(batch.schema), pa.ipc.new_file(str(path), batch.schema)
        writer.write_batch(batch)
        content.update(batch)
        read(batch.num_rows)
    if writer is None or content is None:
        raise ValueError(f"{stream.path} has no rows")
    writer.close()
    return open_table(path, stream.path, content.digest())


def _even(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows, in batches of LEAST_ROWS to MOST_ROWS: some readers give one row at a time, others a million."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        for start in range(0, batch.num_rows, MOST_ROWS):
            waiting.append(batch.slice(start, MOST_ROWS))
            if sum(part.num_rows for part in waiting) >= LEAST_ROWS:
                yield pa.concat_batches(waiting)
                waiting = []
    if waiting:
        yield pa.concat_batches(waiting)


def as_text(path: Path, batch: pa.RecordBatch) -> pa.RecordBatch:
    """Every column as strings, null as "". Raises ValueError for a column that is neither text nor numbers."""
    names = batch.schema.names
    columns = [_column(path, name, column) for name, column in zip(names, batch.columns, strict=True)]
    return pa.record_batch(columns, names=names)


def texts(column: pa.Array) -> pa.Array:
    """As strings, null as ""."""
    return pc.fill_null(column.cast(pa.string()), "")


def _column(path: Path, name: str, column: pa.Array) -> pa.Array:
    try:
        return column.cast(pa.int64()) if name == ROW else texts(column)
    except pa.ArrowException as error:
        raise ValueError(f"{path}, column {name!r} is {column.type}; expected text or numbers ({error})") from error


class _Content:
    """The digest of a table's cells, however they are cut into batches."""

    def __init__(self, schema: pa.Schema) -> None:
        self._names = [name for name in schema.names if name != ROW]
        self._hashes = {name: (hashlib.blake2b(), hashlib.blake2b()) for name in self._names}

    def update(self, batch: pa.RecordBatch) -> None:
        for name, (lengths, texts) in self._hashes.items():
            column = batch[name]
            _, offsets, content = column.buffers()
            bounds = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
            lengths.update(np.diff(bounds).tobytes())
            if content is not None:
                texts.update(content[bounds[0] : bounds[-1]])

    def digest(self) -> str:
        total = hashlib.blake2b(digest_size=16)
        for name, hashes in self._hashes.items():
            total.update(b"\0".join([name.encode(), *(part.digest() for part in hashes)]))
        return total.hexdigest()
