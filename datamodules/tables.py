"""A user's table, CSV or parquet, as columns of strings whose cells can be pointed at: file, row and line."""

import csv
import gzip
import re
from collections.abc import Iterable
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

ENDINGS = ("csv", "csv.gz", "parquet")


@dataclass(frozen=True)
class Table:
    """Columns of large strings, "" where the file says nothing; rows are counted from 0 here, from 1 in messages."""

    path: Path
    columns: pa.Table

    def __len__(self) -> int:
        return self.columns.num_rows

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        return self.columns[name]

    @property
    def names(self) -> list[str]:
        return self.columns.column_names

    def texts(self, name: str) -> list[str]:
        return self.columns[name].to_pylist()

    def place(self, row: int) -> str:
        """Where a row stands in the file: "row 17 (line 18)"; rows do not count the header, lines do."""
        return _place(self.path, row)

    def error(self, row: int, problem: str) -> ValueError:
        return ValueError(f"{self.path}, {self.place(row)}: {problem}")

    def require(self, names: Iterable[str]) -> None:
        """Raises ValueError when a column is missing."""
        missing = [name for name in names if name not in self.names]
        if missing:
            quoted = ", ".join(repr(name) for name in missing)
            raise ValueError(f"{self.path} has no column {quoted}; its columns are: {', '.join(self.names)}")

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
        blank = np.flatnonzero(pc.equal(pc.utf8_trim_whitespace(self[name]), "").to_numpy())
        if len(blank):
            raise self.error(int(blank[0]), f"{name} is blank")


def positions(values: pa.ChunkedArray, among: pa.ChunkedArray) -> np.ndarray:
    """Row of each value's first occurrence in `among`, -1 where it does not occur."""
    found = pc.index_in(values, value_set=among.combine_chunks())
    return pc.fill_null(found, -1).to_numpy().astype(np.int64)


def read_table(folder: Path, stem: str) -> Table:
    """`<stem>.csv`, `.csv.gz` or `.parquet` of a folder. Raises FileNotFoundError without one, ValueError with two."""
    found = [folder / f"{stem}.{ending}" for ending in ENDINGS if (folder / f"{stem}.{ending}").is_file()]
    if not found:
        raise FileNotFoundError(f"{folder} has no {stem}.csv, {stem}.csv.gz or {stem}.parquet; a catalogue needs one")
    if len(found) > 1:
        raise ValueError(f"{folder} has {' and '.join(path.name for path in found)}; keep the one that counts")
    path = found[0]
    columns = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    if columns.num_rows == 0:
        raise ValueError(f"{path} has no rows")
    return Table(path, columns)


def _read_csv(path: Path) -> pa.Table:
    """Every column as strings: the id 007 keeps its zeros, the id NA is no null."""
    header = _header(path)
    try:
        return pacsv.read_csv(
            path,
            read_options=pacsv.ReadOptions(use_threads=False),  # only then errors name the row
            parse_options=pacsv.ParseOptions(newlines_in_values=True),
            convert_options=pacsv.ConvertOptions(
                column_types={name: pa.large_string() for name in header}, strings_can_be_null=False
            ),
        )
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as comma-separated UTF-8: {_numbered(path, error)}") from error


def _numbered(path: Path, error: Exception) -> str:
    """The message of pyarrow, whose row numbers count the header, with ours."""
    found = re.search(r"Row #(\d+): (.*)", str(error), re.DOTALL)
    return f"{_place(path, int(found[1]) - 2)}: {found[2]}" if found else str(error)


def _header(path: Path) -> list[str]:
    try:
        with _open_text(path) as lines:
            header = next(csv.reader(lines), [])
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as comma-separated UTF-8: {error}") from error
    twice = {name for name in header if header.count(name) > 1}
    if twice or not header:
        problem = f"names the column {', '.join(sorted(twice))} twice" if twice else "is empty"
        raise ValueError(f"{path} {problem}; expected a header with one name per column")
    return header


def _open_text(path: Path) -> TextIOWrapper:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _place(path: Path, row: int) -> str:
    return f"row {row + 1}" + (f" (line {_line(path, row)})" if path.suffix != ".parquet" else "")


def _line(path: Path, row: int) -> int:
    """The line on which a data row starts; not row + 2 where cells hold line breaks or lines are empty."""
    csv.field_size_limit(2**31 - 1)  # a description may be longer than the module's 128 KiB
    with _open_text(path) as lines:
        reader = csv.reader(lines)
        data_row, start = -2, 1
        for cells in reader:
            data_row += bool(cells)
            if data_row == row:
                break
            start = reader.line_num + 1
        return start


def _read_parquet(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error
    return pa.table({name: _as_text(path, name, table[name]) for name in table.column_names})


def _as_text(path: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        return pc.fill_null(column.cast(pa.large_string()), "")
    except pa.ArrowException as error:
        raise ValueError(f"{path}, column {name!r} is {column.type}; expected text or numbers") from error
