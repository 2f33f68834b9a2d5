"""Fashion Product Images (Kaggle, full and small): 44 thousand photos and titles, with queries made from attributes.

The data set has no queries; fashion_queries.py words them from articleType, gender, baseColour and usage and judges by
these, so say *synthetic* wherever a number of it appears. The attributes are the judge: a model that reads them has
read the answer, and any column of products can be chosen as a text field. So products do not have them at all; to slice
by, queries have `wants` (the attributes asked for, as JSON) and `kind` (their names).

Texts: `title` (productDisplayName) and `title_sparse`, the title without words of colour, gender and usage, as a
careless seller writes it: there the photo has to tell the rest (--data.text_fields=[title_sparse]).
"""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from datamodules.importers.fashion_queries import ATTRIBUTES, UNKNOWN, derived
from datamodules.importers.options import Import
from datamodules.importers.published import published_files, require, written
from datamodules.importing.staging import Source, Stream
from datamodules.photos.files import photos_of

TITLE = "productDisplayName"  # the last column, in which commas are not quoted
SHORTENED = ("navy", "turquoise")  # of Navy Blue, Turquoise Blue
GENDERS = ("men", "man", "women", "woman", "boy", "girl", "unisex", "kid", "ladies", "gent")


class Styles(NamedTuple):
    """The columns of styles.csv by name, and how many rows had commas in their last cell."""

    columns: dict[str, list[str]]
    with_commas: int


@dataclass(kw_only=True)
class Fashion(Import):
    """styles.csv and images/ into shards, with synthetic queries drawn by `seed`."""

    def source(self) -> Source:
        """Reads styles.csv and derives the queries. Raises FileNotFoundError or ValueError: what is missing."""
        path = self._path
        columns, with_commas = read_styles(path)
        ids, titles = columns["id"], columns[TITLE]
        made = derived({name: columns[name] for name in ATTRIBUTES}, ids, titles, self.seed)
        products = pa.table(
            {
                "product_id": ids,
                "title": titles,
                "title_sparse": sparse_titles(titles, columns["baseColour"], columns["usage"]),
                "image": [f"{id}.jpg" if id else "" for id in ids],
            }
        )
        options = {"importer": "fashion", "synthetic queries": True, "rows with unquoted commas": with_commas}
        return Source(
            name="fashion",
            options={**options, "left_out": made.left_out},
            products=Stream(path, partial(written, products)),
            queries=Stream(path, partial(written, made.queries)),
            judgments=Stream(path, partial(written, made.judgments)),
            photos=photos_of(Path(self.src), self.photos),
        )

    @cached_property
    def _path(self) -> Path:
        return published_files(self.src, ["styles.csv"], "Kaggle's Fashion Product Images")[0]


def read_styles(path: Path) -> Styles:
    """Rows with more cells than the header has are joined in their last one. Raises ValueError for too few cells,
    and for one with a line break, which an open quote makes of the rows that it swallows."""
    header = require(path, ["id", *ATTRIBUTES, TITLE])
    if header[-1] != TITLE:
        raise ValueError(f"{path}: the last column is {header[-1]!r}; expected {TITLE!r}, whose commas are not quoted")
    rows, with_commas = [], 0
    for number, cells in enumerate(_rows(path), 1):
        if any("\n" in cell or "\r" in cell for cell in cells):
            raise ValueError(f"{path}, row {number}: a cell holds a line break, so a quote is not closed: {cells[:3]}")
        if len(cells) < len(header):
            raise ValueError(f"{path}, row {number}: {len(cells)} cells, the header has {len(header)}: {cells}")
        with_commas += len(cells) > len(header)
        rows.append([*cells[: len(header) - 1], ",".join(cells[len(header) - 1 :])])
    if not rows:
        raise ValueError(f"{path} has no rows")
    return Styles(
        {name: [cell.strip() for cell in cells] for name, cells in zip(header, zip(*rows, strict=True), strict=True)},
        with_commas,
    )


def _rows(path: Path) -> Iterator[list[str]]:
    number = 0
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file)
        next(lines)
        try:
            for cells in filter(None, lines):
                number += 1
                yield cells
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} cannot be read as comma-separated UTF-8, behind row {number}: {error}") from error


def sparse_titles(titles: Sequence[str], colours: Sequence[str], usages: Sequence[str]) -> list[str]:
    """Titles without the words of any colour or usage that the data set names, and of gender; with 's or s behind."""
    named = sorted(
        {word.lower() for word in (*colours, *usages, *GENDERS, *SHORTENED)} - UNKNOWN,
        key=lambda word: (-len(word), word),
    )
    words = re.compile(rf"(?<![\w'’-])(?:{'|'.join(map(re.escape, named))})(?:['’]?s['’]?)?(?![\w'’-])", re.IGNORECASE)
    return [" ".join(words.sub(" ", title).split()) for title in titles]
