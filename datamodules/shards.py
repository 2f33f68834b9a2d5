"""Shards, read: random access to samples by dense id, and the tables beside them. (writer.py makes them.)

A folder of WebDataset tars with one sample per product, `index.parquet`, `queries.parquet`, `judgments.parquet` and
`manifest.json`. Dense ids are positions: a product's in index.parquet, a query's in queries.parquet.
"""

import json
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.files import OpenFile
from datamodules.manifest import Manifest, read_manifest
from datamodules.writer import write_shards
from mmfusion.batch import Judgments

BLOCK = tarfile.BLOCKSIZE
HEAD = 8192  # bytes of a sample that are read at first for its texts: most photos lie behind them
QUERIES = ("query_id", "id", "query", "split", "positives")  # what queries.parquet always has
OPEN_FILES = 64  # per process; a catalogue of 10 M products has more shards than a process may open files


@dataclass(frozen=True)
class Index:
    """index.parquet as numpy columns of equal length; row = dense id. `product_id` is numpy's StringDType."""

    product_id: np.ndarray
    shard: np.ndarray  # int32, position in manifest.shards; ascending
    offset: np.ndarray  # int64, bytes into the tar
    size: np.ndarray  # int64, bytes of all members of the sample
    photo: np.ndarray  # bool
    pairs: np.ndarray  # int32, train positives in the primary label column

    def __len__(self) -> int:
        return len(self.shard)

    @property
    def trainable(self) -> np.ndarray:
        return self.pairs > 0


@dataclass(frozen=True)
class Queries:
    """queries.parquet as numpy columns of equal length; row = dense id."""

    query_id: np.ndarray  # StringDType, as the next two
    query: np.ndarray
    split: np.ndarray
    positives: np.ndarray  # int32, positives in the primary label column

    def __len__(self) -> int:
        return len(self.positives)

    def of(self, split: str) -> np.ndarray:
        """Dense ids of one split's queries, ascending."""
        return np.flatnonzero(self.split == split)


@dataclass(frozen=True)
class Sample:
    """One product. `judgments` holds its train judgments: "query" (dense int64 ids, ascending) and, per label column,
    float64 gains, NaN where the pair is not judged in that column."""

    product_id: str
    id: int
    texts: dict[str, str]
    photo: bytes | None
    judgments: dict[str, np.ndarray]


def parse_sample(record: bytes, photo: bytes | None) -> Sample:
    """A sample from the bytes of its two tar members."""
    content = json.loads(record)
    judgments = {
        column: np.array(values, dtype=np.int64 if column == "query" else np.float64)
        for column, values in content["judgments"].items()
    }
    return Sample(content["product_id"], content["id"], content["texts"], photo, judgments)


class Shards:
    """Shards of one folder, open for reading. Safe to fork and to pickle: whoever reads opens the files."""

    def __init__(self, path: Path, manifest: Manifest, index: Index, queries: Queries) -> None:
        self.path, self.manifest, self.index, self.queries = path, manifest, index, queries
        self._files: OrderedDict[int, OpenFile] = OrderedDict()

    @classmethod
    def open(cls, path: str | Path) -> "Shards":
        """Reads the manifest, index and queries. Raises FileNotFoundError or ValueError when `path` holds no shards."""
        path = Path(path)
        manifest = read_manifest(path)
        for shard in manifest.shards:
            _check_size(path / shard.name, shard.bytes)
        index = _columns(path / "index.parquet", ["product_id", "shard", "offset", "size", "photo", "pairs"])
        queries = _columns(path / "queries.parquet", ["query_id", "query", "split", "positives"])
        return cls(path, manifest, Index(**index), Queries(**queries))

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        """Neither open files nor the judgments, which no worker needs, travel to another process."""
        state = {name: value for name, value in self.__dict__.items() if name != "_judgments"}
        return {**state, "_files": OrderedDict()}

    def read(self, id: int) -> Sample:
        """The product with this dense id, by one read at its place in its tar."""
        if not 0 <= id < len(self):
            raise IndexError(f"product id {id} of {len(self)} products")
        shard, offset, size = int(self.index.shard[id]), int(self.index.offset[id]), int(self.index.size[id])
        members = list(_members(self.read_bytes(shard, offset, size)))
        sample = parse_sample(members[0], members[1] if len(members) > 1 else None)
        if sample.id != id:
            raise ValueError(f"{self._tar(shard)} holds product {sample.id} where the index expects {id}: import again")
        return sample

    def read_bytes(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes of a tar from `offset` on. Raises ValueError when the tar is shorter."""
        file = self._files.get(shard) or self._open(shard)
        # A thread that still reads from a file that another one pushes out keeps it open by its reference.
        content = file.read(size, offset)
        if len(content) < size:
            raise ValueError(f"{self._tar(shard)} is truncated: {len(content)} of {size} bytes at {offset}")
        return content

    def _open(self, shard: int) -> OpenFile:
        file = self._files[shard] = OpenFile(self._tar(shard))
        while len(self._files) > OPEN_FILES:
            self._files.popitem(last=False)
        return file

    def _tar(self, shard: int) -> Path:
        return self.path / self.manifest.shards[shard].name

    def judgments(self, split: str) -> Judgments:
        """All judgments of the split's queries, sorted by (query, product), in every label column."""
        if split not in self.manifest.splits:
            raise ValueError(f"{self.path} has no split {split!r}; it has {', '.join(self.manifest.splits)}")
        columns = self._judgments
        rows = np.flatnonzero((self.queries.split == split)[columns["query"]])
        return Judgments(
            query=columns["query"][rows],
            product=columns["product"][rows],
            gain={label: columns[label][rows] for label in self.manifest.labels},
            positive_from={name: label.positive_from for name, label in self.manifest.labels.items()},
            unlisted=self.manifest.splits[split].unlisted,
            labels={name: dict(label.gains or {}) for name, label in self.manifest.labels.items()},
        )

    def query_columns(self) -> list[str]:
        """The columns that the catalogue's queries have besides id, text and split."""
        return [name for name in pq.read_schema(self.path / "queries.parquet").names if name not in QUERIES]

    def query_column(self, name: str) -> np.ndarray:
        """One of `query_columns`; StringDType, by dense id."""
        return _columns(self.path / "queries.parquet", [name])[name]

    def texts(self, fields: Sequence[str]) -> dict[str, np.ndarray]:
        """Text fields of all products, "" where one has none; StringDType, by dense id. Photos are passed over."""
        columns: dict[str, np.ndarray] = {name: np.zeros(len(self), np.dtypes.StringDType()) for name in fields}
        for id in range(len(self)):
            texts = json.loads(self._record(id))["texts"]
            for name, column in columns.items():
                column[id] = texts[name]
        return columns

    def _record(self, id: int) -> bytes:
        """The JSON of a sample."""
        shard, offset, size = int(self.index.shard[id]), int(self.index.offset[id]), int(self.index.size[id])
        head = next(_members(self.read_bytes(shard, offset, min(size, HEAD))), None)
        return next(_members(self.read_bytes(shard, offset, size))) if head is None else head

    @cached_property
    def _judgments(self) -> dict[str, np.ndarray]:
        return _columns(self.path / "judgments.parquet", ["query", "product", *self.manifest.labels])


def _columns(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    try:
        table = pq.read_table(path, columns=names)
    except (FileNotFoundError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read ({error}): the shards are damaged, import again") from error
    return {name: _numpy(table[name]) for name in names}


def _check_size(tar: Path, size: int) -> None:
    found = tar.stat().st_size if tar.is_file() else None
    if found != size:
        problem = "is missing" if found is None else f"has {found:,} bytes instead of {size:,}"
        raise ValueError(f"{tar} {problem}: the shards are not complete, copy or import them again")


def _numpy(column: pa.ChunkedArray) -> np.ndarray:
    values = column.to_numpy()
    return values.astype(np.dtypes.StringDType()) if pa.types.is_string(column.type) else values


def _members(content: bytes) -> Iterator[bytes]:
    """Bytes of the files that a piece of tar holds whole, in order."""
    start = 0
    while start + BLOCK <= len(content):
        header = tarfile.TarInfo.frombuf(content[start : start + BLOCK], "utf-8", "strict")
        start += BLOCK
        if header.type == tarfile.REGTYPE and start + header.size <= len(content):  # no extra header of a long name
            yield content[start : start + header.size]
        start += -(-header.size // BLOCK) * BLOCK


__all__ = ["Index", "Queries", "Sample", "Shards", "parse_sample", "write_shards"]
