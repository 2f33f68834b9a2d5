"""The demo catalogue: drawn products whose title and photo each tell only a part of what queries ask for.

A photo shows shape, colour, pattern and contrast. A title states shape, material and brand always; colour, pattern and
contrast only now and then. Every query wants something that only titles state together with something that often only
the photo shows, so neither alone can rank well, while both together always settle the relevance: an oracle that sees
both reaches nDCG@10 of 1 (tests/datamodules/test_demo.py computes what one view alone can reach at best). Products
without photo state everything. No combination that a val or test query wants is wanted in train.
"""

import csv
import itertools
import json
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.catalogue import folder_source
from datamodules.drawing import COLOURS, CONTRASTS, PATTERNS, SHAPES, draw_photo
from datamodules.importers.options import Import
from datamodules.importing.staging import Source
from datamodules.manifest import Manifest, read_manifest

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "contrast": CONTRASTS,
    "material": ("cotton", "denim", "leather", "linen", "nylon", "silk", "velvet", "wool"),
    "brand": ("acme", "bravo", "corta", "delmo", "evora", "fenix"),
}
TIERS = (0.0, 0.0, 0.5, 0.5, 1.0, 1.0)  # how desirable each brand is
FITS = ("slim", "loose", "regular", "cropped")  # words that no query uses
STATED = {"shape": 1.0, "material": 1.0, "brand": 1.0, "colour": 0.35, "pattern": 0.35, "contrast": 0.35}
TEMPLATES = (
    ("colour", "material", "shape"),
    ("pattern", "material", "shape"),
    ("colour", "pattern", "material"),
    ("colour", "pattern", "material", "shape"),
    ("brand", "colour", "shape"),
)
NO_PHOTO = 0.03
DESIRED = 0.8  # desirability from which a product is positive
TRAIN_SAMPLES = {"S": 8, "C": 4, "I": 4}  # judgments per train query besides every E
VERSION = 1  # of what a seed draws; part of the manifest, so that old shards are recognised
Wanted = dict[str, int]
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Query:
    text: str
    split: str
    wants: Wanted


@dataclass(frozen=True)
class DemoCatalogue:
    """What is drawn, before it is drawn. `value`: each attribute's position in ATTRIBUTES, per product."""

    value: Arrays
    stated: Arrays  # whether the title says so
    photo: np.ndarray
    titles: list[str]
    queries: list[Query]

    @classmethod
    def plan(cls, seed: int, products: int, train_queries: int, test_queries: int) -> "DemoCatalogue":
        rng = np.random.default_rng([seed, VERSION, 1])
        value = {name: rng.integers(len(words), size=products) for name, words in ATTRIBUTES.items()}
        photo = rng.random(products) >= NO_PHOTO
        stated = {name: (rng.random(products) < STATED[name]) | ~photo for name in ATTRIBUTES}
        titles = [_title(row, value, stated, rng) for row in range(products)]
        return cls(value, stated, photo, titles, _queries(value, train_queries, test_queries, rng))

    def labels(self, wants: Wanted) -> np.ndarray:
        """E, S, C or I for every product.

        E: all that is wanted; S: all but one, the shape not being that one; C: all but the shape; I: the rest.
        """
        misses = sum(self.value[name] != value for name, value in wants.items())
        wrong_shape = self.value["shape"] != wants["shape"] if "shape" in wants else np.zeros(len(self.photo), bool)
        return np.select([misses == 0, (misses == 1) & ~wrong_shape, misses == 1], ["E", "S", "C"], "I")

    def desirability(self, labels: np.ndarray) -> np.ndarray:
        """0 to 1: a relevant product is wanted the more, the better its brand's tier (title), and if vivid (photo)."""
        quality = (np.array(TIERS)[self.value["brand"]] + (self.value["contrast"] == CONTRASTS.index("vivid"))) / 2
        return np.select([labels == "E", labels == "S"], [1.0, 0.25], 0.0) * (0.2 + 0.8 * quality)


def draw_demo(
    out: str | Path, seed: int = 0, products: int = 4000, train_queries: int = 3000, test_queries: int = 150
) -> Manifest:
    """Draws the demo catalogue and writes its shards; does nothing when `out` holds them already.

    Args:
        out: Folder for the shards.
        seed: Of everything that is drawn.
        products: How many.
        train_queries: At most; fewer when no other wording is found.
        test_queries: Of the test split, and as many of val.
    """
    out = Path(out)
    options = {"importer": "demo", "version": VERSION, "train_queries": train_queries, "test_queries": test_queries}
    if (out / "manifest.json").is_file():
        manifest = read_manifest(out)
        if (manifest.source, manifest.seed, manifest.products) == (options, seed, products):
            return manifest
    demo = DemoCatalogue.plan(seed, products, train_queries, test_queries)
    with tempfile.TemporaryDirectory() as folder:
        write_catalogue(demo, Path(folder), seed)
        positive_from = {"desirability": DESIRED}
        return DrawnFolder(src=folder, out=str(out), seed=seed, positive_from=positive_from, options=options).run()


@dataclass(kw_only=True)
class DrawnFolder(Import):
    """The folder that `write_catalogue` wrote, as the data set `demo`; `options`: what it was drawn by."""

    options: dict[str, Any]

    def source(self) -> Source:
        return replace(folder_source(Path(self.src), self.photos), name="demo", options=self.options)


def write_catalogue(demo: DemoCatalogue, folder: Path, seed: int) -> None:
    """The catalogue as a user would bring it: three CSV tables and images.tar."""
    names = [f"p{row:05d}.jpg" if photo else "" for row, photo in enumerate(demo.photo)]
    with tarfile.open(folder / "images.tar", "w") as tar:
        for row in np.flatnonzero(demo.photo).tolist():
            rng = np.random.default_rng([seed, VERSION, 3, row])
            word = {name: words[demo.value[name][row]] for name, words in ATTRIBUTES.items()}
            content = draw_photo(word["shape"], word["colour"], word["pattern"], word["contrast"], rng)
            member = tarfile.TarInfo(names[row])
            member.size = len(content)
            tar.addfile(member, BytesIO(content))
    rows = ((f"p{row:05d}", title, names[row]) for row, title in enumerate(demo.titles))
    _write_csv(folder / "products.csv", ("product_id", "title", "image"), rows)
    columns = ("query_id", "query", "split", "wants")
    _write_csv(
        folder / "queries.csv", columns, (_query_row(number, query) for number, query in enumerate(demo.queries))
    )
    columns = ("query_id", "product_id", "relevance", "desirability")
    _write_csv(folder / "judgments.csv", columns, _judgment_rows(demo, np.random.default_rng([seed, VERSION, 2])))


def _write_csv(path: Path, header: tuple[str, ...], rows: Iterator[tuple[Any, ...]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(itertools.chain([header], rows))


def _query_row(number: int, query: Query) -> tuple[str, str, str, str]:
    wants = {name: ATTRIBUTES[name][value] for name, value in query.wants.items()}
    return f"q{number:05d}", query.text, query.split, json.dumps(wants)


def _judgment_rows(demo: DemoCatalogue, rng: np.random.Generator) -> Iterator[tuple[str, str, str, str]]:
    """Everything but I for val and test, every E and some of the others for train."""
    for number, query in enumerate(demo.queries):
        labels = demo.labels(query.wants)
        desirability = demo.desirability(labels)
        judged = np.flatnonzero(labels != "I") if query.split != "train" else _sample(labels, rng)
        for row in judged.tolist():
            yield f"q{number:05d}", f"p{row:05d}", labels[row], f"{desirability[row]:g}"


def _sample(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    chosen = [np.flatnonzero(labels == "E")]
    for label, count in TRAIN_SAMPLES.items():
        rows = np.flatnonzero(labels == label)
        chosen.append(rng.choice(rows, min(count, len(rows)), replace=False))
    return np.sort(np.concatenate(chosen))


def _title(row: int, value: Arrays, stated: Arrays, rng: np.random.Generator) -> str:
    words = [ATTRIBUTES["brand"][value["brand"][row]], str(rng.choice(FITS))]
    for name in ("contrast", "colour", "pattern", "material", "shape"):
        if stated[name][row]:
            words.append(ATTRIBUTES[name][value[name][row]])
    return " ".join(words)


def _queries(value: Arrays, train: int, test: int, rng: np.random.Generator) -> list[Query]:
    """Val and test queries want, in equal shares per template, combinations that are kept from train."""
    held: dict[str, list[Wanted]] = {"val": [], "test": []}
    left: list[Wanted] = []
    for number, template in enumerate(TEMPLATES):
        wants = _combinations(value, template, rng)
        for wanted in held.values():
            share = test * (number + 1) // len(TEMPLATES) - len(wanted)
            wanted += [wants.pop() for _ in range(min(share, len(wants) // 3))]
        left += wants
    queries = [Query(_worded(wants, rng), split, wants) for split, wanted in held.items() for wants in wanted]
    return [*_train_queries(left, train, rng), *queries]


def _combinations(value: Arrays, template: tuple[str, ...], rng: np.random.Generator) -> list[Wanted]:
    """The template's value combinations that at least two products have, in random order."""
    rows, counts = np.unique(np.stack([value[name] for name in template], 1), axis=0, return_counts=True)
    wants = [dict(zip(template, row, strict=True)) for row in rows[counts > 1].tolist()]
    return [wants[position] for position in rng.permutation(len(wants))]


def _train_queries(wants: list[Wanted], count: int, rng: np.random.Generator) -> list[Query]:
    """Every combination once, then again in other words, until there are enough or no other words are found."""
    texts: dict[str, Wanted] = {}
    for _ in range(20):
        for position in rng.permutation(len(wants)):
            if len(texts) == count:
                break
            texts.setdefault(_worded(wants[position], rng), wants[position])
    return [Query(text, "train", wanted) for text, wanted in texts.items()]


def _worded(wants: Wanted, rng: np.random.Generator) -> str:
    """The wanted words in any order, but the shape, if any, last."""
    names = [name for name in rng.permutation([*wants]).tolist() if name != "shape"] + ["shape"] * ("shape" in wants)
    return " ".join(ATTRIBUTES[name][wants[name]] for name in names)
