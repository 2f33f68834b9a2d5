"""A tiny catalogue on disk, written in milliseconds, in which everything can be worked out by hand."""

import csv
import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from datamodules.importers.catalogue import OwnCatalogue
from datamodules.manifest import Manifest

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 210), "yellow": (240, 220, 40)}
TYPES = ("cup", "hat", "lamp", "shoe")
VAL, TEST = ("green hat", "blue lamp"), ("yellow shoe", "red lamp")


def small_catalogue(path: Path, products: int = 64, labels: Sequence[str] = ("label",), tar: bool = False) -> Path:
    """Writes the catalogue into the new folder `path` and returns it.

    Product i is p<i>: its colour number i % 4, its type i // 4 % 4; every eighth has no photo, and only then the title
    tells the colour. Queries q0 to q15 are all "<colour> <type>"; those of VAL and TEST are in these splits. E: both
    are right; S: the type alone. Every column of `labels` says the same, "stars" in numbers: 5 for E, 1 for S.
    """
    path.mkdir(parents=True)
    colour, kind = [list(COLOURS)[i % 4] for i in range(products)], [TYPES[i // 4 % 4] for i in range(products)]
    photos = [i for i in range(products) if i % 8]
    rows = [
        (
            f"p{i}",
            f"{kind[i]} number {i}" if i in photos else f"{colour[i]} {kind[i]}",
            f"p{i}.png" if i in photos else "",
        )
        for i in range(products)
    ]
    write_rows(path / "products.csv", ("product_id", "title", "image"), rows)
    queries = [f"{c} {t}" for t in TYPES for c in COLOURS]
    splits = ["val" if q in VAL else "test" if q in TEST else "train" for q in queries]
    write_rows(
        path / "queries.csv", ("query_id", "query", "split"), [(f"q{n}", q, splits[n]) for n, q in enumerate(queries)]
    )
    judged = [
        (f"q{n}", f"p{i}", *(_label(column, f"{colour[i]} {kind[i]}" == query) for column in labels))
        for n, query in enumerate(queries)
        for i in range(products)
        if kind[i] == query.split()[1]
    ]
    write_rows(path / "judgments.csv", ("query_id", "product_id", *labels), judged)
    _write_photos(path, {f"p{i}.png": _png(COLOURS[colour[i]]) for i in photos}, tar)
    return path


def convert(src: str, out: str, **options: Any) -> Manifest:
    """The catalogue importer, as the command runs it."""
    return OwnCatalogue(src=src, out=out, **options).run()


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def _label(column: str, exact: bool) -> str:
    if column == "stars":
        return "5" if exact else "1"
    return "E" if exact else "S"


def _png(colour: tuple[int, int, int]) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(content, "PNG")
    return content.getvalue()


def _write_photos(path: Path, photos: dict[str, bytes], tar: bool) -> None:
    if not tar:
        (path / "images").mkdir()
        for name, content in photos.items():
            (path / "images" / name).write_bytes(content)
        return
    with tarfile.open(path / "images.tar", "w") as archive:
        for name, content in photos.items():
            member = tarfile.TarInfo(f"./images/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
