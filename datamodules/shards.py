"""Shards, read: random access to samples by dense id, and the tables beside them. (importing makes them.)

WebDataset tars with one sample per product, `index.parquet`, `queries.parquet`, `judgments.parquet` and
`manifest.json`, in a folder or at an address. Dense ids are positions: a product's in index.parquet, a query's in
queries.parquet.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Bool, Int64

from datamodules.stores.store import Store, open_store, read_tables
from datamodules.stores.transfer import ShardError
from datamodules.stream.failures import Failed, Failures
from datamodules.stream.index import Index, Queries, read_columns, read_judgments
from datamodules.stream.members import Sample, find_photo, find_record, parse_sample
from datamodules.stream.tars import Tars
from mmfusion.batch import Judgments

HEAD = 8192  # bytes of a sample that are read at first for its texts: most photos lie behind them
QUERIES = ("query_id", "id", "query", "split", "positives")  # what queries.parquet always has
FETCHED = 8  # shards fetched at once when all are read


class Shards:
    """Shards of one store, open for reading. Safe to fork and to pickle."""

    def __init__(self, store: Store) -> None:
        """Reads the index and queries. Raises ValueError when they cannot be read, or contradict the manifest."""
        self.store, self.manifest = store, store.manifest
        self._tables = read_tables(store)
        self.index = Index.read(self._table("index.parquet"), self.manifest)
        self.queries = Queries.read(self._table("queries.parquet"), self.manifest)
        self.tars = Tars(store)

    @classmethod
    def open(cls, source: str | Path | Store) -> "Shards":
        """Of a folder, an address or a store. Raises FileNotFoundError or ValueError when it holds no shards."""
        return cls(open_store(source) if isinstance(source, str | Path) else source)

    def close(self) -> None:
        """Lets all files go; what is read next opens them again."""
        self.tars.close()

    def __len__(self) -> int:
        return len(self.index)

    def __reduce__(self) -> tuple[Any, ...]:
        """Small, whatever the number of products: another process reads the tables itself."""
        return type(self)._of_tars, (self.tars,)

    @classmethod
    def _of_tars(cls, tars: Tars) -> "Shards":
        shards = cls(tars.store)
        shards.tars = tars
        return shards

    @property
    def path(self) -> Path:
        """The folder that the tables lie in."""
        return self._table("index.parquet").parent

    def _table(self, name: str) -> Path:
        if name not in self._tables:
            raise ValueError(f"the manifest of {self.store.address} lists no {name}: import the data again")
        return self._tables[name]

    # ---- samples -----------------------------------------------------------------------------------------------------

    def read(self, id: int, photo: bool = True) -> Sample:
        """The product with this dense id, by one read at its place in its tar; its photo only where asked for.

        Raises IndexError, and ShardError whatever is wrong with the sample: its shard cannot be had, it is not what
        index and manifest say, or its JSON is not that of a sample.
        """
        if not 0 <= id < len(self):
            raise IndexError(f"product id {id} of {len(self)} products")
        shard = self.index.shard.item(id)
        try:
            sample = self._sample(id, shard, photo and self.index.photo.item(id))
            self._check(sample, id)
        except ShardError as error:
            place = f"{self.store.address}/{self.manifest.shards[shard].name}"
            raise ShardError(error.reason, f"{place}, product {self.index.product_id[id]!r}: {error}") from error
        return sample

    def expect(self, ids: Int64[np.ndarray, "product"], photo: Bool[np.ndarray, "product"]) -> None:
        """Products that will be read soon, with or without photo: see OpenFile.expect."""
        shard, offset, size = (column[ids] for column in (self.index.shard, self.index.offset, self.index.size))
        size = np.where(photo & self.index.photo[ids], size, np.minimum(size, HEAD))
        for place in zip(shard.tolist(), offset.tolist(), size.tolist(), strict=True):
            self.tars.expect(*place)

    def _sample(self, id: int, shard: int, photo: bool) -> Sample:
        offset, size = self.index.offset.item(id), self.index.size.item(id)
        content = self.tars.read(shard, offset, size if photo else min(size, HEAD))
        record = find_record(content, size)
        if record is None:  # the JSON is longer than what was read
            content = self.tars.read(shard, offset, size)
            record = find_record(content, size)
            assert record is not None
        found = find_photo(content, record) if photo else None
        place = memoryview(content)[found.start : found.end] if found else None
        return parse_sample(content[record.start : record.end], place)

    def _check(self, sample: Sample, id: int) -> None:
        """Raises ShardError unless the sample is the one that the index means, and says what the manifest announces."""
        if sample.id != id or sample.product_id != self.index.product_id[id]:
            raise ShardError("wrong member", f"holds product {sample.product_id!r} with id {sample.id}, not {id}")
        if sample.texts.keys() != self._fields or sample.judgments.keys() != self._columns:
            raise ShardError("invalid JSON", f"has texts {list(sample.texts)} and judgments {list(sample.judgments)}")
        query, gain = sample.judgments["query"], sample.judgments[self.manifest.primary]
        if len(query) and query[-1] >= len(self.queries):
            raise ShardError("invalid JSON", f"has a judgment of query {query[-1]} of {len(self.queries)}")
        pairs = np.count_nonzero(gain >= self.manifest.positive_from)
        if pairs != self.index.pairs[id]:
            raise ShardError("invalid JSON", f"has {pairs} train positives, the index counts {self.index.pairs[id]}")

    @cached_property
    def _fields(self) -> frozenset[str]:
        return frozenset(self.manifest.fields)

    @cached_property
    def _columns(self) -> frozenset[str]:
        return frozenset(["query", *self.manifest.labels])

    def failed(self, id: int, reason: str) -> Failed:
        shard = self.manifest.shards[int(self.index.shard[id])]
        return Failed(reason, shard.name, str(self.index.product_id[id]))

    # ---- tables ------------------------------------------------------------------------------------------------------

    def judgments(self, split: str) -> Judgments:
        """All judgments of the split's queries, sorted by (query, product), in every label column."""
        if split not in self.manifest.splits:
            raise ValueError(f"{self.store.address} has no split {split!r}; it has {', '.join(self.manifest.splits)}")
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

    @cached_property
    def _judgments(self) -> dict[str, np.ndarray]:
        return read_judgments(self._table("judgments.parquet"), self.manifest)

    def query_columns(self) -> list[str]:
        """The columns that the catalogue's queries have besides id, text and split."""
        return [name for name in pq.read_schema(self._table("queries.parquet")).names if name not in QUERIES]

    def query_column(self, name: str) -> np.ndarray:
        """One of `query_columns`; StringDType, by dense id."""
        return read_columns(self._table("queries.parquet"), [name])[name]

    def texts(self, fields: Sequence[str]) -> dict[str, np.ndarray]:
        """Text fields of all products, StringDType, by dense id; photos are passed over.

        "" where a product has none, or cannot be read: those are warned of.
        """
        columns: dict[str, np.ndarray] = {name: np.zeros(len(self), np.dtypes.StringDType()) for name in fields}
        failures = Failures("texts", len(self), instead="taken without")
        for id in range(len(self)):
            texts = self.texts_of(id, failures)
            for name, column in columns.items():
                column[id] = texts.get(name, "")
        failures.warn()
        return columns

    def texts_of(self, id: int, failures: Failures) -> dict[str, str]:
        """A product's texts; none where it cannot be read, which is counted. Meant to be asked in the order of ids."""
        shard = int(self.index.shard[id])
        if id == 0 or self.index.shard[id - 1] != shard:
            self.tars.fetch(range(shard, min(shard + FETCHED, len(self.manifest.shards))))
        try:
            return self.read(id, photo=False).texts
        except ShardError as error:
            failures.add([self.failed(id, error.reason)])
            return {}


__all__ = ["Sample", "ShardError", "Shards"]
