"""A user's own catalogue -> shards. The folder is described in DESIGN.md, The data contract."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from datamodules.catalogue import folder_source
from datamodules.importers.options import Import
from datamodules.importing.splits import STEP, in_val, position, with_val
from datamodules.importing.staging import Source, Stream, as_text


@dataclass(kw_only=True)
class OwnCatalogue(Import):
    """Reads, checks and converts a catalogue, and prints what it holds.

    Args:
        src: Folder of the catalogue: products, queries, judgments (.csv, .csv.gz or .parquet), images/ or images.tar;
            names in the column image that are URLs are downloaded.
        max_shared_queries: Greatest fraction of val and test queries whose text may be in another split as well.
        val_fraction: Of the train queries, taken for val by a hash of seed and text where there is no val query; one at
            least, unless it is the only one.
    """

    max_shared_queries: float = 0.01
    val_fraction: float = 0.05

    def source(self) -> Source:
        in_val("", self.seed, self.val_fraction)  # its check
        source = folder_source(Path(self.src), self.photos)
        fraction = self._fraction(source.queries) if self.val_fraction else None
        if fraction is None:
            return source
        queries = Stream(source.queries.path, lambda: self._with_val(source.queries, fraction))
        told = f"{self.val_fraction:g} of the train queries, by a hash of seed and text"
        if not fraction:
            told = "none, as train queries have one text only"
        elif fraction != self.val_fraction:
            told += ", at least one in val and in train"
        return replace(source, queries=queries, options={**source.options, "val": told})

    def _fraction(self, queries: Stream) -> float | None:
        """What val takes of train: `val_fraction`, or what leaves both with a text; 0 where there is only one. None
        where the table has val already, or no columns to split it by: what it lacks is the checks' to say."""
        least, most = 1.0, 0.0
        for batch in queries.batches():
            if not {"query", "split"} <= set(batch.schema.names):
                return None
            query, split = _cells(queries.path, batch)
            if "val" in split:
                return None
            at = [position(text, self.seed) for text, was in zip(query, split, strict=True) if was == "train"]
            least, most = min([least, *at]), max([most, *at])
        return 0.0 if least >= most else min(max(self.val_fraction, least + STEP), most)

    def _with_val(self, queries: Stream, fraction: float) -> Iterator[pa.RecordBatch]:
        for batch in queries.batches():
            columns = dict(zip(batch.schema.names, batch.columns, strict=True))
            query, split = _cells(queries.path, batch)
            columns["split"] = pa.array(with_val(query, split, self.seed, fraction), pa.string())
            yield pa.record_batch(columns)


def _cells(path: Path, batch: pa.RecordBatch) -> tuple[list[str], list[str]]:
    """Texts and splits of queries."""
    cells = as_text(path, batch.select(["query", "split"]))
    return cells["query"].to_pylist(), cells["split"].to_pylist()
