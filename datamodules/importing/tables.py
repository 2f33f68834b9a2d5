"""Tables as they are published, CSV or Parquet: streamed in batches, and where their rows stand."""

import csv
import gzip
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

ENDINGS = ("csv", "csv.gz", "parquet")
BLOCK = 16 << 20  # bytes of a CSV file that are parsed at once; no row may be longer
ROWS = 16384  # of a Parquet file that are decoded at once

UNREADABLE = (UnicodeDecodeError, OSError, EOFError, csv.Error, zlib.error)  # what reading a text raises


def require_columns(path: Path, names: Sequence[str], needed: Iterable[str]) -> None:
    """Raises ValueError when a column is missing."""
    missing = [name for name in needed if name not in names]
    if missing:
        quoted = ", ".join(repr(name) for name in missing)
        raise ValueError(f"{path} has no column {quoted}; its columns are: {', '.join(names)}")


def find_table(folder: Path, stem: str) -> Path:
    """`<stem>.csv`, `.csv.gz` or `.parquet` of a folder. Raises FileNotFoundError without one, ValueError with two."""
    found = [folder / f"{stem}.{ending}" for ending in ENDINGS if (folder / f"{stem}.{ending}").is_file()]
    if not found:
        raise FileNotFoundError(f"{folder} has no {stem}.csv, {stem}.csv.gz or {stem}.parquet; a catalogue needs one")
    if len(found) > 1:
        raise ValueError(f"{folder} has {' and '.join(path.name for path in found)}; keep the one that counts")
    return found[0]


def column_names(path: Path) -> list[str]:
    """Of a .csv, .csv.gz or .parquet file. Raises ValueError when it cannot be read or names a column twice."""
    return _parquet(path).schema_arrow.names if path.suffix == ".parquet" else _header(path)[0]


def table_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The rows of a .csv, .csv.gz or .parquet file in their order. Raises ValueError naming the file and the row."""
    return parquet_batches(path) if path.suffix == ".parquet" else csv_batches(path)


def csv_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Every column as strings: the id 007 keeps its zeros, the id NA is no null. Tabs separate where the header has
    tabs and no commas."""
    header, delimiter = _header(path)
    try:
        with pacsv.open_csv(
            path,
            read_options=pacsv.ReadOptions(use_threads=False, block_size=BLOCK),  # only then errors name the row
            parse_options=pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pacsv.ConvertOptions(
                column_types={name: pa.string() for name in header}, strings_can_be_null=False
            ),
        ) as reader:
            yield from reader
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as comma-separated UTF-8: {_numbered(path, error)}") from error


def parquet_batches(path: Path, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """All columns or some, as the file types them."""
    file = _parquet(path)
    try:
        yield from file.iter_batches(batch_size=ROWS, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error
    _check_header(path, file.schema_arrow.names)
    return file


def _numbered(path: Path, error: Exception) -> str:
    """The message of pyarrow, whose row numbers count the header, with ours."""
    if "straddling" in str(error):
        return f"a row is longer than {BLOCK >> 20} MiB, or a quote is never closed"
    found = re.search(r"Row #(\d+): (.*)", str(error), re.DOTALL)
    return f"{place(path, int(found[1]) - 2)}: {found[2]}" if found else str(error)


def _header(path: Path) -> tuple[list[str], str]:
    """Names of the columns, and what separates them."""
    try:
        header, delimiter = _first(path, ","), ","
        if len(header) == 1 and "\t" in header[0]:
            header, delimiter = _first(path, "\t"), "\t"
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as comma-separated UTF-8: {error}") from error
    _check_header(path, header)
    return header, delimiter


def _first(path: Path, delimiter: str) -> list[str]:
    with _open_text(path) as lines:
        return next(csv.reader(lines, delimiter=delimiter), [])


def _check_header(path: Path, header: list[str]) -> None:
    twice = {name for name in header if header.count(name) > 1}
    if twice or not header:
        problem = f"names the column {', '.join(sorted(twice))} twice" if twice else "is empty"
        raise ValueError(f"{path} {problem}; expected a header with one name per column")


def _open_text(path: Path) -> TextIOWrapper:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def place(path: Path, row: int) -> str:
    """Where a row (from 0) stands in a file: "row 17 (line 18)"; rows do not count the header, lines do."""
    told = f"row {row + 1}"
    if not path.name.endswith((".csv", ".csv.gz")) or not path.is_file():
        return told
    try:
        return f"{told} (line {_line(path, row)})"
    except UNREADABLE:  # which is perhaps what is being reported
        return told


def _line(path: Path, row: int) -> int:
    """The line on which a data row starts; not row + 2 where cells hold line breaks or lines are empty."""
    csv.field_size_limit(2**31 - 1)  # a description may be longer than the module's 128 KiB
    with _open_text(path) as lines:
        reader = csv.reader(lines, delimiter=_header(path)[1])
        data_row, start = -2, 1
        for cells in reader:
            data_row += bool(cells)
            if data_row == row:
                break
            start = reader.line_num + 1
        return start
