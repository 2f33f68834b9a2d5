"""The tables beside the shards, as numpy columns: read, and held against the manifest."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.manifest import Manifest
from datamodules.stream.members import BLOCK


@dataclass(frozen=True)
class Index:
    """index.parquet as numpy columns of equal length; row = dense id. `product_id` is numpy's StringDType."""

    product_id: np.ndarray
    shard: np.ndarray  # int32, position in manifest.shards; ascending
    offset: np.ndarray  # int64, bytes into the tar
    size: np.ndarray  # int64, bytes of all members of the sample
    photo: np.ndarray  # bool
    pairs: np.ndarray  # int32, train positives in the primary label column

    @classmethod
    def read(cls, path: Path, manifest: Manifest) -> "Index":
        """Raises ValueError when the file cannot be read, or says something else than the manifest."""
        index = cls(**read_columns(path, ["product_id", "shard", "offset", "size", "photo", "pairs"]))
        problem = index._contradiction(manifest)
        if problem:
            raise ValueError(f"{path} does not belong to its manifest.json ({problem}): import the data again")
        return index

    def __len__(self) -> int:
        return len(self.shard)

    @property
    def trainable(self) -> np.ndarray:
        return self.pairs > 0

    def _contradiction(self, manifest: Manifest) -> str | None:
        counts = np.array([[s.products, s.trainable, s.pairs, s.bytes] for s in manifest.shards], np.int64).reshape(
            -1, 4
        )
        if not len(self) == manifest.products == counts[:, 0].sum():
            return f"{len(self):,} products where the manifest has {manifest.products:,}"
        numbers = (self.shard, self.offset, self.size, self.pairs)
        others = self.product_id.dtype == np.dtypes.StringDType() and self.photo.dtype == bool
        if not others or not all(np.issubdtype(column.dtype, np.integer) for column in numbers):
            return "columns of other types, or with gaps"
        if (np.diff(self.shard, prepend=0) < 0).any() or (self.shard >= len(counts)).any():
            return "shards that are not there, or not ascending"
        found = [np.bincount(self.shard, weight, len(counts)) for weight in (None, self.trainable, self.pairs)]
        if (np.stack(found, 1) != counts[:, :3]).any():
            return "other numbers of products or pairs in a shard"
        ends = self.offset + self.size
        follows = np.concatenate([self.shard[1:] == self.shard[:-1], [False]])[: len(self)]
        limit = np.where(follows, np.append(self.offset[1:], 0)[: len(self)], counts[self.shard, 3])
        aligned = (self.offset % BLOCK == 0).all() and (self.size % BLOCK == 0).all()
        if not aligned or (self.offset < 0).any() or (self.size <= 0).any() or (ends > limit).any():
            return "places of samples that overlap or leave their shard"
        return None


@dataclass(frozen=True)
class Queries:
    """queries.parquet as numpy columns of equal length; row = dense id."""

    query_id: np.ndarray  # StringDType, as the next two
    query: np.ndarray
    split: np.ndarray
    positives: np.ndarray  # int32, positives in the primary label column

    @classmethod
    def read(cls, path: Path, manifest: Manifest) -> "Queries":
        """Raises ValueError when the file cannot be read, or says something else than the manifest."""
        queries = cls(**read_columns(path, ["query_id", "query", "split", "positives"]))
        expected = {name: split.queries for name, split in manifest.splits.items()}
        found = {name: len(queries.of(name)) for name in expected}
        if found != expected or len(queries) != sum(expected.values()):
            raise ValueError(
                f"{path} does not belong to its manifest.json ({len(queries):,} queries, of these {found}; "
                f"expected {expected}): import the data again"
            )
        return queries

    def __len__(self) -> int:
        return len(self.positives)

    def of(self, split: str) -> np.ndarray:
        """Dense ids of one split's queries, ascending."""
        return np.flatnonzero(self.split == split)


def read_judgments(path: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """judgments.parquet: "query" and "product" (dense ids), and the gains of every label column, NaN where not judged.

    Raises ValueError when the file cannot be read, or says something else than the manifest.
    """
    columns = read_columns(path, ["query", "product", *manifest.labels])
    queries = sum(split.queries for split in manifest.splits.values())
    judged = sum(split.judgments for split in manifest.splits.values())
    for name, count in (("query", queries), ("product", manifest.products)):
        ids = columns[name]
        if len(ids) != judged or not np.issubdtype(ids.dtype, np.integer) or (ids < 0).any() or (ids >= count).any():
            raise ValueError(
                f"{path} does not belong to its manifest.json ({len(ids):,} judgments with ids of type {ids.dtype}; "
                f"expected {judged:,} with a {name} below {count:,}): import the data again"
            )
    return columns


def read_columns(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Columns of a Parquet file; text as StringDType. Raises ValueError when they cannot be read."""
    try:
        table = pq.read_table(path, columns=names)
        return {name: _numpy(table[name]) for name in names}
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read ({error}): the shards are damaged, import again") from error


def _numpy(column: pa.ChunkedArray) -> np.ndarray:
    values = column.to_numpy()
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    return values.astype(np.dtypes.StringDType()) if is_text else values
