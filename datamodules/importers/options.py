"""What all importers share: their options, and the way from a source to published shards."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from datamodules.catalogue import staged_catalogue
from datamodules.importing.jobs import workers
from datamodules.importing.partial import STAGING, partial_folder
from datamodules.importing.staging import Source
from datamodules.importing.summary import print_summary
from datamodules.importing.writer import Writing, write_into
from datamodules.manifest import Manifest, Unlisted
from datamodules.photos.options import PhotoOptions, shared


@dataclass(kw_only=True)
class Import(ABC):
    """Reads a data set as it is published and writes its shards. Subclasses say how it is read: `source`.

    Args:
        src: Folder of the data set as it is published.
        out: Folder for the shards.
        seed: Of the permutation that deals products to shards, and of whatever else the importer draws.
        shard_size: Most products of a shard. Default: 2048, less if that makes under 16 shards.
        gains: Per label column, what each label is worth, as {relevance: {E: 1, S: 0.1}}. Default: the data set's own,
            else E 1, S 0.1, C 0.01, I 0; numbers are their own gains. The column `label` is called `relevance`.
        positive_from: Per label column, the least gain of a positive. Default: the data set's own, else 1.
        primary: The label column that trainable products are counted by. Default: `relevance`, else the first.
        unlisted: Per split, whether a pair that is not judged is irrelevant or unknown. Default: the data set's own,
            else unknown in train, irrelevant in val and test.
        on_broken_photo: What to do about a photo on disk that cannot be decoded: error, or drop (the product goes
            without). Photos by URL are always dropped, up to photos.max_failed.
        max_shared_queries: Greatest fraction of val and test queries whose text may be in another split as well.
        repeated_pairs: What to do about a (query, product) pair that is judged more than once: error, or best (its
            highest gain counts, and the summary says how many there were).
        jobs: How many processes write shards, or ray: the tasks of a Ray cluster. The bytes do not depend on it.
        photos: How photos are fetched and stored.
    """

    src: str
    out: str
    seed: int = 0
    shard_size: int | None = None
    gains: dict[str, dict[str, float]] | None = None
    positive_from: dict[str, float] | None = None
    primary: str | None = None
    unlisted: dict[str, Unlisted] | None = None
    on_broken_photo: Literal["error", "drop"] = "error"
    max_shared_queries: float = 0.0
    repeated_pairs: Literal["error", "best"] = "error"
    jobs: int | Literal["ray"] = 1
    photos: PhotoOptions = field(default_factory=PhotoOptions)

    @abstractmethod
    def source(self) -> Source:
        """The data set, not yet read. `self.photos` holds this process's part of the connections already."""

    def run(self) -> Manifest:
        """Reads, checks, writes and publishes the data set, and prints what it holds.

        Goes on where an import with the same tables and options was stopped. Raises ValueError or FileNotFoundError;
        then nothing is left, unless shards were finished: these stay in `<out>.partial`.
        """
        photos = shared(self.photos, workers(self.jobs))  # the threads of one process share its connections
        source = replace(self, photos=photos).source()
        writing = Writing(self.seed, self.shard_size, self.unlisted or {}, self.on_broken_photo, self.jobs, self.photos)
        out = Path(self.out)
        with partial_folder(out) as folder:
            catalogue = staged_catalogue(
                source,
                folder / STAGING,
                self.gains,
                self.positive_from,
                self.primary,
                self.max_shared_queries,
                photos=photos,
                repeated_pairs=self.repeated_pairs,
            )
            manifest = write_into(folder, catalogue, out, writing)
        print_summary(catalogue, manifest, out)
        return manifest
