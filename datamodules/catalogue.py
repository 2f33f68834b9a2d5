"""A catalogue: products, queries and judgments, staged and checked. See DESIGN.md, The data contract."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datamodules.importing.checks import (
    best_of_pairs,
    check_images,
    check_pairs,
    check_photos,
    check_products,
    check_queries,
    check_trainable,
    rows_of,
    shared_queries,
    split_codes,
    web_rows,
)
from datamodules.importing.labels import label_columns
from datamodules.importing.staged import Table
from datamodules.importing.staging import Source, Stream, stage
from datamodules.importing.tables import column_names, find_table, require_columns, table_batches
from datamodules.manifest import SPLITS, Label, Unlisted
from datamodules.photos.decode import PhotoError
from datamodules.photos.files import Photo, Photos, photos_of, prepared, web_photos
from datamodules.photos.options import Failure, PhotoOptions

NOT_TEXT = ("product_id", "image")


@dataclass(frozen=True)
class Catalogue:
    """Products, queries and judgments in the order of the published files; the tables are mapped from `folder`.

    `split_of_query` has each query's int8 position in SPLITS. `query` and `product` are int32 row numbers, one entry
    per judged pair; `gain` is NaN where a column says nothing. The first of `labels` is the primary column. `source`
    names the importer and the options that tables do not show.
    `shared_queries` tells of query texts that occur in two splits. `folder` may be a temporary one that `_home` keeps.
    """

    name: str
    source: dict[str, Any]
    products: Table
    queries: Table
    judgments: Table
    split_of_query: np.ndarray
    query: np.ndarray
    product: np.ndarray
    gain: dict[str, np.ndarray]
    labels: dict[str, Label]
    unlisted: dict[str, Unlisted]
    photos: Photos
    shared_queries: list[str]
    folder: Path
    _home: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    @property
    def fields(self) -> list[str]:
        return [name for name in self.products.names if name not in NOT_TEXT]

    @property
    def splits(self) -> list[str]:
        present = np.bincount(self.split_of_query, minlength=len(SPLITS))
        return [split for split, count in zip(SPLITS, present, strict=True) if count]

    @property
    def split_of_judgment(self) -> np.ndarray:
        """int8 position in SPLITS of each judgment's query."""
        return self.split_of_query[self.query]

    @cached_property
    def by_url(self) -> bool:
        """Whether any photo is named by URL."""
        return web_rows(self.products) > 0

    def positive(self, column: str) -> np.ndarray:
        return self.gain[column] >= self.labels[column].positive_from

    def image(self, row: int) -> str:
        """The photo's name as the table gives it, "" when the product has none."""
        return self.products["image"][row].as_py().strip() if "image" in self.products.names else ""

    def photo(self, row: int) -> Photo | None:
        """None when none is named or it cannot be had; raises ValueError when it is no image."""
        name = self.image(row)
        content = self.photos.get([name])[0] if name else None
        if content is None or isinstance(content, Failure):
            return None
        try:
            return prepared(content, self.products["product_id"][row].as_py(), None, 90)
        except PhotoError as error:
            raise broken_photo(self.products, row, name, error) from error


def broken_photo(products: Table, row: int, name: str, error: PhotoError) -> ValueError:
    return ValueError(f"{products.path}, {products.place(row)}: {error}; its file is {name!r}")


def read_catalogue(
    path: str | Path,
    gains: Mapping[str, Mapping[str, float]] | None = None,
    positive_from: Mapping[str, float] | None = None,
    primary: str | None = None,
    max_shared_queries: float = 0.01,
) -> Catalogue:
    """As `staged_catalogue`, of a folder; its tables are staged aside for as long as the catalogue is referred to."""
    home = tempfile.TemporaryDirectory(prefix="mmfusion-")
    source = folder_source(Path(path), PhotoOptions())
    return staged_catalogue(source, Path(home.name), gains, positive_from, primary, max_shared_queries, home)


def folder_source(folder: Path, photos: PhotoOptions) -> Source:
    """The tables products, queries and judgments of a folder, and its images/ or images.tar."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder; a catalogue is one with products, queries, judgments and images"
        )
    paths = {stem: find_table(folder, stem) for stem in ("products", "queries", "judgments")}
    require_columns(paths["products"], column_names(paths["products"]), ["product_id", "title", "image"])
    products, queries, judgments = (Stream(path, partial(table_batches, path)) for path in paths.values())
    source = {"importer": "catalogue"}
    return Source(folder.resolve().name, source, products, queries, judgments, photos_of(folder, photos))


def staged_catalogue(
    source: Source,
    folder: Path,
    gains: Mapping[str, Mapping[str, float]] | None = None,
    positive_from: Mapping[str, float] | None = None,
    primary: str | None = None,
    max_shared_queries: float = 0.01,
    home: tempfile.TemporaryDirectory[str] | None = None,
    photos: PhotoOptions | None = None,
    repeated_pairs: Literal["error", "best"] = "error",
) -> Catalogue:
    """Writes the tables into `folder` and checks them. Raises FileNotFoundError or ValueError naming file, row, what
    was found and what was expected.

    gains: per label column, what each label is worth (default: the source's, else E 1, S .1, C .01, I 0; numbers are
        their own gains).
    positive_from: per label column, the least gain of a positive (default: the source's, else 1).
    primary: the label column that trainable products are counted by (default: `relevance`, else the first).
    max_shared_queries: greatest fraction of val and test queries whose text may occur in another split as well.
    photos: how URLs are downloaded where the source itself has no photos.
    repeated_pairs: what to do about a pair that is judged twice: an error, or its highest gain counts.
    """
    tables = stage(source, folder)
    products, queries, judgments = tables["products"], tables["queries"], tables["judgments"]
    check_products(products, source.photos is not None)
    check_queries(queries)
    split = split_codes(queries)
    shared = shared_queries(queries, split, max_shared_queries)
    judgments.require(["query_id", "product_id"])
    query, product = rows_of(judgments, "query_id", queries), rows_of(judgments, "product_id", products)
    if repeated_pairs == "error":
        check_pairs(judgments, query, product, len(products))
    worth, threshold = {**source.gains, **(gains or {})}, {**source.positive_from, **(positive_from or {})}
    labels, gain = label_columns(judgments, worth, threshold, primary, folder)
    if repeated_pairs == "best":
        query, product, gain = best_of_pairs(query, product, gain, len(products))
    check_images(products, source.photos is not None)
    if source.photos is not None:
        check_photos(products, source.photos)
    check_trainable(judgments, labels, gain, train=split[query] == SPLITS.index("train"))
    return Catalogue(
        source.name, source.options, products, queries, judgments, split, query, product, gain, labels,
        dict(source.unlisted), source.photos or web_photos(photos or PhotoOptions()), shared, folder, home,
    )  # fmt: skip
