"""A staged table: columns of strings mapped from a file, whose cells can be pointed at in the published one."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datamodules.importing.tables import place, require_columns

ROW = "#row"


@dataclass(frozen=True)
class Table:
    """Columns of strings, "" where the file says nothing; rows are counted from 0 here, from 1 in messages.

    `rows`: the row of the file at `path` that each row comes from; None: they are the same. `digest` names the content,
    whatever the file's format.
    """

    path: Path
    columns: pa.Table
    rows: pa.ChunkedArray | None = None
    digest: str = ""

    def __len__(self) -> int:
        return self.columns.num_rows

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        return self.columns[name]

    @property
    def names(self) -> list[str]:
        return self.columns.column_names

    def texts(self, name: str) -> list[str]:
        return self.columns[name].to_pylist()

    def chunks(self, name: str) -> Iterator[tuple[int, pa.Array]]:
        """Pieces of a column, each with its first row, for work whose memory must not grow with the table."""
        start = 0
        for chunk in self.columns[name].chunks:
            yield start, chunk
            start += len(chunk)

    def take(self, names: Sequence[str], rows: np.ndarray) -> pa.Table:
        """Some rows in the order given; of a table on disk, only they are read."""
        starts = np.cumsum([0, *(batch.num_rows for batch in self.columns.to_batches())])
        order = np.argsort(rows, kind="stable")
        batches, columns = self.columns.select(names).to_batches(), []
        bounds = np.searchsorted(rows[order], starts)
        for number, batch in enumerate(batches):
            wanted = rows[order[bounds[number] : bounds[number + 1]]] - starts[number]
            if len(wanted):
                columns.append(batch.take(pa.array(wanted)))
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return pa.Table.from_batches(columns).combine_chunks().take(pa.array(back))

    def place(self, row: int) -> str:
        return place(self.path, row if self.rows is None else self.rows[row].as_py())

    def error(self, row: int, problem: str) -> ValueError:
        return ValueError(f"{self.path}, {self.place(row)}: {problem}")

    def require(self, names: Iterable[str]) -> None:
        """Raises ValueError when a column is missing."""
        require_columns(self.path, self.names, names)

    def require_ids(self, name: str) -> None:
        """Raises ValueError when a cell of the column is blank or stands there twice."""
        self.require_filled(name)
        first = positions(self[name], self[name])
        again = np.flatnonzero(first != np.arange(len(self)))
        if len(again):
            row = int(again[0])
            other = self.place(int(first[row]))
            raise self.error(row, f"{name} {self[name][row].as_py()!r} is already that of {other}; ids must be unique")

    def require_filled(self, name: str) -> None:
        """Raises ValueError when a cell of the column is blank."""
        for start, chunk in self.chunks(name):
            blank = np.flatnonzero(pc.equal(pc.utf8_trim_whitespace(chunk), "").to_numpy(zero_copy_only=False))
            if len(blank):
                raise self.error(start + int(blank[0]), f"{name} is blank")


def positions(values: pa.ChunkedArray, among: pa.ChunkedArray) -> np.ndarray:
    """int32 row of each value's first occurrence in `among`, -1 where it does not occur."""
    found = pc.index_in(values, value_set=among.combine_chunks())
    return pc.fill_null(found, -1).to_numpy()


def open_table(path: Path, published: Path, digest: str = "") -> Table:
    """A staged table, mapped."""
    with pa.memory_map(str(path)) as file:
        columns = pa.ipc.open_file(file).read_all()
    rows = columns[ROW] if ROW in columns.column_names else None
    return Table(published, columns.drop_columns([ROW]) if rows else columns, rows, digest)
