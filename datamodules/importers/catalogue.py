"""A user's own catalogue -> shards. The folder is described in DESIGN.md, The data contract."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from datamodules.catalogue import folder_source
from datamodules.importers.options import Import
from datamodules.importing.splits import in_val, with_val
from datamodules.importing.staging import Source, Stream


@dataclass(kw_only=True)
class OwnCatalogue(Import):
    """Reads, checks and converts a catalogue, and prints what it holds.

    Args:
        src: Folder of the catalogue: products, queries, judgments (.csv, .csv.gz or .parquet), images/ or images.tar;
            names in the column image that are URLs are downloaded.
        max_shared_queries: Greatest fraction of val and test queries whose text may be in another split as well.
        val_fraction: Of the train queries, taken for val by a hash of seed and text where there is no val query.
    """

    max_shared_queries: float = 0.01
    val_fraction: float = 0.05

    def source(self) -> Source:
        in_val("", self.seed, self.val_fraction)  # its check
        source = folder_source(Path(self.src), self.photos)
        if not self.val_fraction or _has_val(source.queries):
            return source
        queries = Stream(source.queries.path, lambda: self._with_val(source.queries))
        told = f"{self.val_fraction:g} of the train queries, by a hash of seed and text"
        return replace(source, queries=queries, options={**source.options, "val": told})

    def _with_val(self, queries: Stream) -> Iterator[pa.RecordBatch]:
        for batch in queries.batches():
            columns = dict(zip(batch.schema.names, batch.columns, strict=True))
            query, split = (columns[name].to_pylist() for name in ("query", "split"))
            columns["split"] = pa.array(with_val(query, split, self.seed, self.val_fraction), pa.string())
            yield pa.record_batch(columns)


def _has_val(queries: Stream) -> bool:
    """Also where the table cannot be split: what it lacks is the checks' to say."""
    for batch in queries.batches():
        if not {"query", "split"} <= set(batch.schema.names) or "val" in batch["split"].to_pylist():
            return True
    return False
