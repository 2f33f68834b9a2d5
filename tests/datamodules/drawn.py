"""A drawn catalogue with everything that a batch has to get right, and its shards."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from datamodules.catalogue import read_catalogue
from datamodules.importing.writer import write_shards
from datamodules.tuples import TupleDataModule
from mmfusion.batch import TupleBatch
from tests.datamodules.small import write_rows

PRODUCTS, QUERIES, SIZE = 150, 40, (5, 4)


@dataclass
class Tables:
    """What the catalogue says, by the user's ids; `colour` is the photo's, None without one."""

    path: Path
    title: dict[str, str]
    brand: dict[str, str]
    colour: dict[str, tuple[int, int, int] | None]
    query: dict[str, str]
    split: dict[str, str]
    label: dict[tuple[str, str], tuple[str, float | None]]  # (query, product) -> relevance, desirability

    def positives(self, product: str) -> list[str]:
        return [q for (q, p), (label, _) in self.label.items() if p == product and label == "E" and self.trains(q)]

    def trains(self, query: str) -> bool:
        return self.split[query] == "train"


def draw_tables(path: Path) -> Tables:
    random = np.random.default_rng(0)
    ids = [f"p{i}" for i in range(PRODUCTS)]
    queries = [f"q{i}" for i in range(QUERIES)]
    pairs = [(q, p) for q in queries for p in ids if random.random() < 0.15]
    return Tables(
        path,
        title={p: "" if i % 10 == 3 else f"title {i}" for i, p in enumerate(ids)},
        brand={p: "" if i % 2 else f"brand {i}" for i, p in enumerate(ids)},
        colour={p: None if i % 7 == 5 else (i, 255 - i, (i * 7) % 256) for i, p in enumerate(ids)},
        query={q: f"words {q}" for q in queries},
        split={q: ("train", "train", "val", "test")[i % 4] for i, q in enumerate(queries)},
        label={pair: ("ESI"[random.integers(3)], [None, 0.0, 2.0][random.integers(3)]) for pair in pairs},
    )


def draw_shards(folder: Path) -> Tables:
    """Draws the tables, writes them as a catalogue and imports it; the shards are in `path`."""
    return write_drawn(draw_tables(folder / "shards"), folder)


def write_drawn(made: Tables, folder: Path) -> Tables:
    (folder / "images").mkdir()
    for p, colour in made.colour.items():
        if colour:
            Image.new("RGB", SIZE[::-1], colour).save(folder / "images" / f"{p}.png")
    rows: list[list[Any]] = [
        [p, made.title[p], made.brand[p], f"{p}.png" if made.colour[p] else ""] for p in made.title
    ]
    write_rows(folder / "products.csv", ["product_id", "title", "brand", "image"], rows)
    rows = [[q, made.query[q], made.split[q]] for q in made.query]
    write_rows(folder / "queries.csv", ["query_id", "query", "split"], rows)
    rows = [[q, p, label, "" if wish is None else wish] for (q, p), (label, wish) in made.label.items()]
    write_rows(folder / "judgments.csv", ["query_id", "product_id", "label", "desirability"], rows)
    write_shards(read_catalogue(folder), made.path, shard_size=20)
    return made


def module(tables: Tables, stage: str = "fit", **options: Any) -> TupleDataModule:
    """A datamodule on these shards, set up without a trainer."""
    options = {"batch_size": 16, "image_size": SIZE, "eval_batch_size": 16, **options}
    data = TupleDataModule(str(tables.path), **options)
    data.setup(stage)
    return data


def tuples_of(batch: TupleBatch) -> list[tuple[int, ...]]:
    """(query, product, draw) of each tuple, and then (product, source) of its hard negatives."""
    own = zip(batch.query.id.tolist(), batch.product.id.tolist(), batch.product.draw.tolist(), strict=False)
    found, of_each = list(own), len(batch.hard) // len(batch)
    negatives = torch.stack([batch.product.id[len(batch) :], batch.hard], 1).reshape(len(batch), 2 * of_each)
    return [(*one, *others) for one, others in zip(found, negatives.tolist(), strict=True)]


def same(a: Any, b: Any) -> bool:
    """Whether two batches are equal in every field."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return (
        a == b if isinstance(a, list | bool) else all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    )
