"""A catalogue: the tables and photos a user brings, read and checked. See DESIGN.md, The data contract."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datamodules.labels import label_columns
from datamodules.manifest import SPLITS, Label
from datamodules.photo_files import URL, Find, Photo, checked, photos_of
from datamodules.photos import PhotoError
from datamodules.tables import Table, positions, read_table

NOT_TEXT = ("product_id", "image")
SHOWN = 3  # examples in a message
OURS = ("id", "positives")  # columns that queries.parquet adds


@dataclass(frozen=True)
class Catalogue:
    """Products, queries and judgments, in the order of the user's files. `find` gets a photo's bytes by its name.

    `query` and `product` are row numbers, one entry per judgment; `gain` is NaN where a column says nothing. The first
    of `labels` is the primary column. `source` names the importer and the options that the tables do not show.
    `shared_queries` tells of query texts that occur in two splits.
    """

    name: str
    source: dict[str, Any]
    products: Table
    queries: Table
    query: np.ndarray
    product: np.ndarray
    gain: dict[str, np.ndarray]
    labels: dict[str, Label]
    find: Find | None
    shared_queries: list[str]

    @property
    def fields(self) -> list[str]:
        return [name for name in self.products.names if name not in NOT_TEXT]

    @property
    def splits(self) -> list[str]:
        present = set(pc.unique(self.queries["split"]).to_pylist())
        return [split for split in SPLITS if split in present]

    @property
    def split_of_judgment(self) -> np.ndarray:
        """Position in SPLITS of each judgment's query."""
        return positions(self.queries["split"], pa.chunked_array([SPLITS], pa.large_string()))[self.query]

    def positive(self, column: str) -> np.ndarray:
        return self.gain[column] >= self.labels[column].positive_from

    def image(self, row: int) -> str:
        """The photo's name as the table gives it, "" when the product has none."""
        return self.products["image"][row].as_py().strip()

    def photo(self, row: int) -> Photo | None:
        """None when none is named or its file is absent; raises ValueError when the file is no image."""
        name = self.image(row)
        content = self.find(name) if self.find and name else None
        if content is None:
            return None
        try:
            return checked(content, self.products["product_id"][row].as_py())
        except PhotoError as error:
            place = f"{self.products.path}, {self.products.place(row)}"
            raise ValueError(f"{place}: {error}; its file is {name!r}") from error


def read_catalogue(
    path: str | Path,
    gains: Mapping[str, Mapping[str, float]] | None = None,
    positive_from: Mapping[str, float] | None = None,
    primary: str | None = None,
    max_shared_queries: float = 0.01,
) -> Catalogue:
    """Reads and checks a folder. Raises FileNotFoundError or ValueError naming file, row, what was found and expected.

    gains: per label column, what each label is worth (default: E 1, S .1, C .01, I 0; numbers are their own gains).
    positive_from: per label column, the least gain of a positive (default 1).
    primary: the label column that trainable products are counted by (default: `relevance`, else the first).
    max_shared_queries: greatest fraction of val and test queries whose text may occur in another split as well.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder; a catalogue is one with products, queries, judgments and images")
    products, queries, judgments = (read_table(path, stem) for stem in ("products", "queries", "judgments"))
    _check_products(products)
    _check_queries(queries)
    shared = _shared(queries, max_shared_queries)
    judgments.require(["query_id", "product_id"])
    query, product = _rows(judgments, "query_id", queries), _rows(judgments, "product_id", products)
    _check_pairs(judgments, query, product, len(products))
    labels, gain = label_columns(judgments, gains or {}, positive_from or {}, primary)
    find = _find(path, products)
    name, source = path.resolve().name, {"importer": "catalogue"}
    catalogue = Catalogue(name, source, products, queries, query, product, gain, labels, find, shared)
    _check_trainable(catalogue, judgments.path)
    return catalogue


def _check_products(products: Table) -> None:
    products.require(["product_id", "title", "image"])
    products.require_ids("product_id")
    urls = pc.match_substring_regex(products["image"], rf"^\s*{URL.pattern}").to_numpy()
    if urls.any():
        row = int(np.argmax(urls))
        found = products["image"][row].as_py()
        raise products.error(
            row,
            f"image is the URL {found!r}; photos by URL come with a later version of the importer: "
            "download them into images/ and name the files instead",
        )


def _check_queries(queries: Table) -> None:
    queries.require(["query_id", "query", "split"])
    queries.require_ids("query_id")
    queries.require_filled("query")
    for name in OURS:
        if name in queries.names:
            raise ValueError(f"{queries.path} has a column {name!r}, which the shards add themselves: rename it")
    for row, split in enumerate(queries.texts("split")):
        if split not in SPLITS:
            raise queries.error(row, f"the split is {split!r}; expected one of {', '.join(SPLITS)}")


def _shared(queries: Table, limit: float) -> list[str]:
    """Descriptions of the val and test queries whose text is also in an earlier split; ValueError above the limit."""
    if not 0 <= limit <= 1:
        raise ValueError(f"max_shared_queries is {limit}; expected a fraction between 0 and 1")
    splits = queries.texts("split")
    order = sorted(range(len(queries)), key=lambda row: SPLITS.index(splits[row]))
    texts = [" ".join(text.lower().split()) for text in queries.texts("query")]
    first: dict[str, int] = {}
    shared = [row for row in order if splits[first.setdefault(texts[row], row)] != splits[row]]
    evaluated = sum(split != "train" for split in splits)
    found = [
        f"{texts[row]!r} ({splits[row]}, {queries.place(row)}; {splits[first[texts[row]]]}, "
        f"{queries.place(first[texts[row]])})"
        for row in shared[:SHOWN]
    ] + [f"and {len(shared) - SHOWN} more"] * (len(shared) > SHOWN)
    if len(shared) > limit * evaluated:
        raise ValueError(
            f"{queries.path}: {len(shared)} of {evaluated} val and test queries have a text that another split has, "
            f"too: {', '.join(found)}. Results on them measure memory: give each text one split (at most "
            f"{limit:.1%} is let through, max_shared_queries)"
        )
    return found


def _rows(judgments: Table, column: str, of: Table) -> np.ndarray:
    """Row of each judgment's query or product."""
    rows = positions(judgments[column], of[column])
    unknown = np.flatnonzero(rows < 0)
    if len(unknown):
        row = int(unknown[0])
        more = f" ({len(unknown)} such rows)" if len(unknown) > 1 else ""
        raise judgments.error(row, f"{column} {judgments[column][row].as_py()!r} is not in {of.path.name}{more}")
    return rows


def _check_pairs(judgments: Table, query: np.ndarray, product: np.ndarray, products: int) -> None:
    """Raises ValueError when a (query, product) pair is judged twice."""
    pairs = query * products + product
    order = np.argsort(pairs, kind="stable")
    twice = np.flatnonzero(np.diff(pairs[order]) == 0)
    if len(twice):
        row, other = int(order[twice[0] + 1]), int(order[twice[0]])
        names = f"query {judgments['query_id'][row].as_py()!r} and product {judgments['product_id'][row].as_py()!r}"
        raise judgments.error(row, f"{names} are already judged in {judgments.place(other)}; a pair is judged once")


def _find(path: Path, products: Table) -> Find | None:
    find = photos_of(path)
    listed = int(pc.sum(pc.not_equal(pc.utf8_trim_whitespace(products["image"]), "")).as_py())
    if find is None and listed:
        raise FileNotFoundError(
            f"{path} has neither images/ nor images.tar, but {products.path.name} names {listed:,} photos; "
            "add them, or leave the column image blank"
        )
    return find


def _check_trainable(catalogue: Catalogue, path: Path) -> None:
    column = next(iter(catalogue.labels))
    train = catalogue.split_of_judgment == SPLITS.index("train")
    if not (train & catalogue.positive(column)).any():
        threshold = catalogue.labels[column].positive_from
        known = catalogue.gain[column][train & ~np.isnan(catalogue.gain[column])]
        best = f"the highest gain there is {known.max():g}" if len(known) else "there are none"
        raise ValueError(
            f"{path}: no judgment of a train query is positive in column {column!r}: positive is a gain of at least "
            f"{threshold:g}, {best}; nothing could be trained. Set positive_from for {column!r}, or primary"
        )
