"""Judgments on dense ids, and the files through which the processes that write shards share them."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from datamodules.catalogue import Catalogue
from datamodules.manifest import SPLITS


@dataclass(frozen=True)
class DenseJudgments:
    """A catalogue's judgments on dense ids, sorted by (query, product); `positive` is that of the primary column.

    `order`: the row of the products table that each dense product id stands for. Ids are int32.
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


def dense_judgments(catalogue: Catalogue, seed: int, folder: Path) -> DenseJudgments:
    """Deals products to dense ids by a permutation of the seed. Gains are mapped from files in `folder`."""
    order = np.random.default_rng(seed).permutation(len(catalogue.products)).astype(np.int32)
    dense = np.empty_like(order)
    dense[order] = np.arange(len(order), dtype=np.int32)
    product = dense[catalogue.product]
    rows = np.argsort(catalogue.query.astype(np.int64) * len(order) + product).astype(np.int32)
    return DenseJudgments(
        order=order,
        query=catalogue.query[rows],
        product=product[rows],
        gain={
            name: _stored(folder / f"dense-gain-{number}.npy", gain[rows])
            for number, (name, gain) in enumerate(catalogue.gain.items())
        },
        positive=catalogue.positive(next(iter(catalogue.labels)))[rows],
        train=(catalogue.split_of_judgment == SPLITS.index("train"))[rows],
    )


@dataclass(frozen=True)
class Judged:
    """Train judgments by product; the first of `columns` is "query", the others are gains. Product i's are the rows
    from bounds[i] to bounds[i + 1]."""

    order: np.ndarray
    pairs: np.ndarray
    bounds: np.ndarray
    columns: dict[str, np.ndarray]

    @classmethod
    def open(cls, folder: Path, labels: list[str]) -> "Judged":
        """What `store_judged` wrote, mapped."""
        order, pairs, bounds, *columns = (
            np.load(folder / f"judged-{name}.npy", mmap_mode="r") for name in _files(len(labels))
        )
        return cls(order, pairs, bounds, dict(zip(["query", *labels], columns, strict=True)))

    def of(self, ids: np.ndarray) -> list[dict[str, list[float | None]]]:
        """What the JSON of each product holds, null where a column says nothing. `ids` follow one on the other."""
        bounds = self.bounds[ids[0] : ids[-1] + 2]
        part = slice(int(bounds[0]), int(bounds[-1]))
        columns = {name: _nullable(values[part]) for name, values in self.columns.items()}
        starts = (bounds - bounds[0]).tolist()
        return [{name: values[start:end] for name, values in columns.items()} for start, end in pairwise(starts)]


def store_judged(judgments: DenseJudgments, folder: Path) -> None:
    train = np.flatnonzero(judgments.train).astype(np.int32)
    rows = train[np.argsort(judgments.product[train], kind="stable")]
    bounds = np.searchsorted(judgments.product[rows], np.arange(len(judgments.order) + 1))
    values = [judgments.order, judgments.pairs, bounds, judgments.query[rows]]
    values += [gain[rows] for gain in judgments.gain.values()]
    for name, array in zip(_files(len(judgments.gain)), values, strict=True):
        np.save(folder / f"judged-{name}.npy", array)


def _files(labels: int) -> list[str]:
    return ["order", "pairs", "bounds", "query", *(f"gain-{number}" for number in range(labels))]


def _nullable(values: np.ndarray) -> list[float | None]:
    known: list[float | None] = values.tolist()
    return [None if value != value else value for value in known] if values.dtype.kind == "f" else known  # noqa: PLR0124


def _stored(path: Path, values: np.ndarray) -> np.ndarray:
    np.save(path, values)
    loaded: np.ndarray = np.load(path, mmap_mode="r")
    return loaded
