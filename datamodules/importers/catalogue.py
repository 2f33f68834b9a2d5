"""A user's own catalogue -> shards. The folder is described in DESIGN.md, The data contract."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.catalogue import folder_source
from datamodules.importers.options import Import
from datamodules.manifest import Manifest
from datamodules.staging import Source


@dataclass(kw_only=True)
class OwnCatalogue(Import):
    """Reads, checks and converts a catalogue, and prints what it holds.

    Args:
        src: Folder of the catalogue: products, queries, judgments (.csv, .csv.gz or .parquet), images/ or images.tar;
            names in the column image that are URLs are downloaded.
        max_shared_queries: Greatest fraction of val and test queries whose text may be in another split as well.
    """

    max_shared_queries: float = 0.01

    def source(self) -> Source:
        return folder_source(Path(self.src), self.photos)


def convert(src: str, out: str, **options: Any) -> Manifest:
    """`OwnCatalogue` as a function."""
    return OwnCatalogue(src=src, out=out, **options).run()
