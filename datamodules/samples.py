"""Products of a catalogue -> tars of samples and index.parquet."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from webdataset import TarWriter

from datamodules.catalogue import Catalogue
from datamodules.manifest import Shard
from datamodules.photo_files import Photo


@dataclass(frozen=True)
class DenseJudgments:
    """A catalogue's judgments on dense ids, sorted by (query, product); `positive` is that of the primary column.

    `order`: the row of the user's table that each dense product id stands for.
    """

    order: np.ndarray
    query: np.ndarray
    product: np.ndarray
    gain: dict[str, np.ndarray]
    positive: np.ndarray
    train: np.ndarray

    @property
    def pairs(self) -> np.ndarray:
        """Train positives of each product."""
        return np.bincount(self.product[self.train & self.positive], minlength=len(self.order))


def write_samples(
    catalogue: Catalogue, judgments: DenseJudgments, folder: Path, shards: int, drop_broken: bool
) -> dict[str, Any]:
    """The tars and index.parquet; returns the manifest's entries about them."""
    photos, places, tars = _Photos(catalogue, drop_broken), _Places(), list[Shard]()
    judged = _Judged(judgments)
    columns = catalogue.products.columns.select(["product_id", *catalogue.fields])
    pairs = judgments.pairs
    with _progress() as progress:
        task = progress.add_task("products", total=len(pairs))
        for number, ids in enumerate(np.array_split(np.arange(len(pairs)), shards)):
            rows = judgments.order[ids]
            texts = columns.take(pa.array(rows)).to_pylist()
            with _Tar(folder / f"{number:05d}.tar") as tar:
                for id, row, cells in zip(ids.tolist(), rows.tolist(), texts, strict=True):
                    product_id, photo = cells.pop("product_id"), photos.get(row)
                    record = {"product_id": product_id, "id": id, "texts": cells, "judgments": judged.of(id)}
                    places.add(product_id, number, *tar.add(product_id, record, photo), photo is not None)
                    progress.advance(task)
            tars.append(tar.shard(pairs[ids]))
    places.write(folder / "index.parquet", pairs)
    counts = {"photos": sum(places.photo), "missing_photos": photos.missing, "broken_photos": photos.broken}
    return {**counts, "shards": tars}


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


class _Judged:
    """Train judgments by product, as a sample's JSON holds them; null where a column says nothing."""

    def __init__(self, judgments: DenseJudgments) -> None:
        train = np.flatnonzero(judgments.train)
        rows = train[np.argsort(judgments.product[train], kind="stable")]
        self.bounds = np.searchsorted(judgments.product[rows], np.arange(len(judgments.order) + 1))
        self.columns = {"query": judgments.query[rows], **{name: gain[rows] for name, gain in judgments.gain.items()}}

    def of(self, id: int) -> dict[str, list[float | None]]:
        part = slice(self.bounds[id], self.bounds[id + 1])
        return {
            name: [None if math.isnan(value) else value for value in values[part].tolist()]
            for name, values in self.columns.items()
        }


class _Photos:
    """Photos of the catalogue, with counts of those that could not be had."""

    def __init__(self, catalogue: Catalogue, drop_broken: bool) -> None:
        self.catalogue, self.drop_broken = catalogue, drop_broken
        self.missing = self.broken = 0

    def get(self, row: int) -> Photo | None:
        try:
            photo = self.catalogue.photo(row)
        except ValueError as error:
            if not self.drop_broken:
                raise ValueError(f"{error}. Replace it, or leave such photos out with on_broken_photo=drop") from error
            self.broken += 1
            return None
        self.missing += photo is None and self.catalogue.image(row) != ""
        return photo


class _Places:
    """Rows of index.parquet, in order of the dense ids."""

    def __init__(self) -> None:
        self.product_id: list[str] = []
        self.shard: list[int] = []
        self.offset: list[int] = []
        self.size: list[int] = []
        self.photo: list[bool] = []

    def add(self, product_id: str, shard: int, offset: int, size: int, photo: bool) -> None:
        self.product_id.append(product_id)
        self.shard.append(shard)
        self.offset.append(offset)
        self.size.append(size)
        self.photo.append(photo)

    def write(self, path: Path, pairs: np.ndarray) -> None:
        columns = {
            "product_id": pa.array(self.product_id, pa.string()),
            "id": np.arange(len(pairs)),
            "shard": pa.array(self.shard, pa.int32()),
            "offset": pa.array(self.offset, pa.int64()),
            "size": pa.array(self.size, pa.int64()),
            "photo": pa.array(self.photo, pa.bool_()),
            "pairs": pairs.astype(np.int32),
        }
        pq.write_table(pa.table(columns), path)


class _Tar:
    """One shard as it is written: hashed on the way, with the place of each sample."""

    def __init__(self, path: Path) -> None:
        self.path, self._hash, self._bytes = path, hashlib.sha256(), 0

    def __enter__(self) -> "_Tar":
        self._file = self.path.open("wb")
        # PAX: USTAR refuses names of more than 100 characters, and percent-encoded ids grow long
        self._tar = TarWriter(self, user="", group="", mode=0o644, encoder=False, mtime=0, format="PAX_FORMAT")
        return self

    def __exit__(self, *error: object) -> None:
        self._tar.close()
        self._file.close()

    def write(self, content: bytes) -> int:
        """What TarWriter asks of a file."""
        self._hash.update(content)
        self._bytes += len(content)
        return self._file.write(content)

    def add(self, product_id: str, record: Mapping[str, Any], photo: Photo | None) -> tuple[int, int]:
        """Offset and size of the sample: its JSON, then its photo (TarWriter alone would sort jpg before json)."""
        start, key = self._tar.tarstream.offset, sample_key(product_id)
        content = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
        self._tar.write({"__key__": key, "json": content})
        if photo:
            self._tar.write({"__key__": key, photo.ending: photo.content})
        return start, self._tar.tarstream.offset - start

    def shard(self, pairs: np.ndarray) -> Shard:
        trainable, total = int((pairs > 0).sum()), int(pairs.sum())
        return Shard(self.path.name, self._hash.hexdigest(), self._bytes, len(pairs), trainable, total)


def sample_key(product_id: str) -> str:
    """The name of a sample in a tar: what WebDataset would split at (dots, slashes) is percent-encoded as well."""
    return quote(product_id, safe="").replace(".", "%2E")
