"""WANDS, product search at Wayfair (wayfair/WANDS, MIT): 42,994 products, 480 queries, 233,448 judgments, no photos.

The data set has no splits: a hash of the query's text gives 60 % to train, 10 % to val and 30 % to test. 480 queries
are few, and the judgments are nearly complete: what they are best at is to measure, so test gets more than it commonly
does (about 144), train the 290 that are left. Labels: Exact 1, Partial 0.1, Irrelevant 0, as ESCI's E, S and I; --gains
says otherwise. Columns are named as published, without `product_` in front: title (product_name), class, description,
features, category_hierarchy, ...
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from datamodules.importers.options import Import
from datamodules.importers.published import published_files, require
from datamodules.importing.splits import position
from datamodules.importing.staging import Source, Stream
from datamodules.importing.tables import csv_batches

FILES = ("product.csv", "query.csv", "label.csv")  # tab-separated all the same
GAINS = {"Exact": 1.0, "Partial": 0.1, "Irrelevant": 0.0}
PRODUCT = ("product_id", "product_name", "product_class", "product_description", "product_features")
OURS = {
    "product_name": "title",
    "product_class": "class",
    "product_description": "description",
    "product_features": "features",
    "category hierarchy": "category_hierarchy",
}


@dataclass(kw_only=True)
class Wands(Import):
    """WANDS into shards.

    Args:
        train: Fraction of the queries that are trained on.
        val: Fraction of val; the rest is test.
    """

    train: float = 0.6
    val: float = 0.1

    def source(self) -> Source:
        """Raises FileNotFoundError or ValueError that names what is missing."""
        if not (self.train > 0 and self.val >= 0 and self.train + self.val < 1):
            raise ValueError(f"train is {self.train}, val is {self.val}; expected fractions that leave some to test")
        products, queries, labels = self._files
        require(products, PRODUCT)
        require(queries, ["query_id", "query"])
        require(labels, ["query_id", "product_id", "label"])
        return Source(
            name="wands",
            options={"importer": "wands", "train": self.train, "val": self.val},
            products=Stream(products, self._products),
            queries=Stream(queries, self._queries),
            judgments=Stream(labels, self._judgments),
            photos=None,
            gains={"relevance": GAINS},
        )

    @cached_property
    def _files(self) -> list[Path]:
        return published_files(self.src, FILES, "wayfair/WANDS (its folder dataset/)")

    def _products(self) -> Iterator[pa.RecordBatch]:
        for batch in csv_batches(self._files[0]):
            yield batch.rename_columns([OURS.get(name, name) for name in batch.schema.names])

    def _queries(self) -> Iterator[pa.RecordBatch]:
        for batch in csv_batches(self._files[1]):
            split = pa.array([self._split(text) for text in batch["query"].to_pylist()], pa.string())
            yield batch.append_column("split", split)

    def _split(self, query: str) -> str:
        at = position(query, self.seed)
        return "train" if at < self.train else "val" if at < self.train + self.val else "test"

    def _judgments(self) -> Iterator[pa.RecordBatch]:
        for batch in csv_batches(self._files[2]):
            yield batch.select(["query_id", "product_id", "label"])
