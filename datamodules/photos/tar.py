"""Photos in one uncompressed tar, read through an index of their places."""

import re
import tarfile
import tempfile
from bisect import bisect_left
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath

import pyarrow as pa

from datamodules.photos.options import ABSENT, TOO_LARGE, Failure
from datamodules.stream.files import OpenFile

ESCAPED = re.compile("[\ud800-\udfff]")  # how tarfile shows bytes that are no UTF-8: no table can name those
FIELDS = {"name": pa.large_string(), "offset": pa.int64(), "size": pa.int64()}  # sorted by name


class TarPhotos:
    """Regular files of a tar by name, without "images/" in front; its links and devices are ignored.

    The index is made once and lies in a temporary file as long as this object lives. Copies in other processes map that
    file into memory; on a machine that does not have it they make their own. Raises ValueError for a damaged tar.
    """

    def __init__(self, path: Path) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="mmfusion-")
        index = Path(self._home.name) / "index.arrow"
        made = _indexed(path)
        with pa.OSFile(str(index), "wb") as file, pa.ipc.new_file(file, made.schema) as writer:
            writer.write_batch(made)
        self._open(path.resolve(), index)

    def __getstate__(self) -> tuple[Path, Path]:
        return self._path, self._index

    def __setstate__(self, state: tuple[Path, Path]) -> None:
        self._open(*state)

    def read(self, name: str, most: int) -> bytes | Failure:
        row = bisect_left(self._names, name, key=lambda scalar: scalar.as_py())
        if row == len(self._names) or self._names[row].as_py() != name:
            return ABSENT
        size = self._sizes[row].as_py()
        return self._file.read(size=size, offset=self._offsets[row].as_py()) if size <= most else TOO_LARGE

    def stamp(self, name: str) -> tuple[int, int] | None:
        """Of the tar, whichever file is asked for."""
        status = self._path.stat()
        return status.st_size, status.st_mtime_ns

    def place(self, name: str) -> str:
        return f"{self._path}, as {name}"

    def _open(self, path: Path, index: Path) -> None:
        self._path, self._index, self._file = path, index, OpenFile(path)
        if index.is_file():
            places = pa.ipc.open_file(pa.memory_map(str(index))).get_batch(0)
        else:
            status = path.stat()
            places = _indexed_once(path, status.st_size, status.st_mtime_ns)
        self._names, self._offsets, self._sizes = places.columns


@lru_cache(maxsize=2)
def _indexed_once(path: Path, size: int, time: int) -> pa.RecordBatch:
    """Of the tar with this size and time of change, once per process."""
    return _indexed(path)


def _indexed(path: Path) -> pa.RecordBatch:
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as tar:
            places = dict(_places(tar))
            _check_end(path, tar.offset)
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no uncompressed tar, or it is damaged: {error}") from error
    names = sorted(places)
    columns = [names, [places[name][0] for name in names], [places[name][1] for name in names]]
    return pa.record_batch([pa.array(c, t) for c, t in zip(columns, FIELDS.values(), strict=True)], list(FIELDS))


def _places(tar: tarfile.TarFile) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name, offset and size of each file. Of two with one name the later counts, as when the tar is unpacked."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # else all stay in memory, a kilobyte each
        name = str(PurePosixPath(member.name)).removeprefix("images/")
        whole = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
        if whole and not ESCAPED.search(name):
            yield name, (member.offset_data, member.size)


def _check_end(path: Path, offset: int) -> None:
    """tarfile takes a header that it cannot read for the end of the tar: what follows would be missing in silence."""
    with path.open("rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"byte {offset:,} begins neither a file nor the end")
