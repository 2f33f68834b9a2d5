"""WANDS as published, in small: tab-separated files with quoted cells, and splits by a hash of the query."""

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from datamodules.importers.wands import Wands
from datamodules.importing.splits import position
from tests.datamodules.streams import column, content, rows

PRODUCT = ("product_id", "product_name", "product_class", "category hierarchy", "product_description",
           "product_features", "rating_count", "average_rating", "review_count")  # fmt: skip
INCHES = 'fawkes 36" blue vanity'  # query 208, published in quotes
SPLITS = ("train", "val", "test")


@pytest.fixture
def src(tmp_path: Path) -> Path:
    folder = tmp_path / "wands"
    folder.mkdir()
    write_tab(folder / "product.csv", PRODUCT, [
        ("0", "solid wood bed", "Beds", "Furniture / Beds", 'say "good\tnight"\nto it', "a:1|b:2", "15", "4.5", "11"),
        ("1", "7qt cooker", "", "", "", "", "", "", ""),
        ("2", "chair, blue", "Chairs", "Furniture", "NA", "color:blue", "0", "0.0", "0"),
    ])  # fmt: skip
    texts = [INCHES, "dinosaur", *(f"salon chair {i}" for i in range(38))]
    write_tab(
        folder / "query.csv", ("query_id", "query", "query_class"), [(str(i), t, "Beds") for i, t in enumerate(texts)]
    )
    labels = ("Exact", "Partial", "Irrelevant")
    judged = [(str(i), str(p), labels[(i + p) % 3]) for i in range(40) for p in range(3)]
    write_tab(
        folder / "label.csv", ("id", "query_id", "product_id", "label"), [(str(n), *j) for n, j in enumerate(judged)]
    )
    return folder


def write_tab(path: Path, header: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([header, *lines])


def wands(src: Path, **options: Any) -> Wands:
    return Wands(src=str(src), out=str(src.parent / "out"), **options)


def test_products_and_judgments(src: Path) -> None:
    source = wands(src).source()
    products = rows(source.products)
    assert list(products[0].values()) == [
        "0", "solid wood bed", "Beds", "Furniture / Beds", 'say "good\tnight"\nto it', "a:1|b:2", "15", "4.5", "11",
    ]  # fmt: skip
    assert list(products[0]) == [
        "product_id", "title", "class", "category_hierarchy", "description", "features", "rating_count",
        "average_rating", "review_count",
    ]  # fmt: skip
    assert [product["description"] for product in products[1:]] == ["", "NA"]
    assert rows(source.judgments)[:2] == [
        {"query_id": "0", "product_id": "0", "label": "Exact"},
        {"query_id": "0", "product_id": "1", "label": "Partial"},
    ]  # fmt: skip
    assert source.photos is None
    assert source.gains == {"relevance": {"Exact": 1.0, "Partial": 0.1, "Irrelevant": 0.0}}


def test_the_hash_of_the_text_decides_the_split(src: Path) -> None:
    queries = rows(wands(src).source().queries)
    assert queries[0]["query"] == INCHES
    for query in queries:
        at = position(query["query"], 0)
        assert query["split"] == SPLITS[(at >= 0.6) + (at >= 0.7)]
    assert column(wands(src, seed=1).source().queries, "split") != [query["split"] for query in queries]
    assert set(column(wands(src, train=0.5, val=0.0).source().queries, "split")) == {"train", "test"}


def test_the_same_query_twice_is_in_one_split(src: Path) -> None:
    path = src / "query.csv"
    path.write_text(path.read_text() + "".join(f"{i}\t Salon  CHAIR {i - 100}\tBeds\n" for i in range(100, 138)))
    queries = {query["query_id"]: query["split"] for query in rows(wands(src).source().queries)}
    assert all(queries[str(i)] == queries[str(i - 98)] for i in range(100, 138))


@pytest.mark.parametrize("fractions", [(0.0, 0.1), (0.9, 0.1), (0.6, -0.1)])
def test_fractions_that_leave_a_split_empty(src: Path, fractions: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="expected fractions that leave some to test"):
        wands(src, train=fractions[0], val=fractions[1]).source()


def test_what_is_missing_is_named(src: Path) -> None:
    write_tab(src / "label.csv", ("id", "query", "product_id", "label"), [("0", "0", "0", "Exact")])
    with pytest.raises(ValueError, match=r"label\.csv has no column 'query_id'; its columns are: id, query"):
        wands(src).source()
    (src / "product.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"no product\.csv; wayfair/WANDS .*found: label\.csv, query\.csv"):
        wands(src).source()


def test_labels_of_another_kind_are_refused(src: Path) -> None:
    write_tab(src / "label.csv", ("id", "query_id", "product_id", "label"), [("0", "0", "0", "Perfect")])
    with pytest.raises(
        ValueError, match=r"'Perfect' in column 'label' is not known; known are Exact, Partial, Irrelevant"
    ):
        wands(src).run()


def test_through_to_shards(src: Path) -> None:
    manifest = wands(src).run()
    splits = Counter(column(wands(src).source().queries, "split"))
    assert {name: split.queries for name, split in manifest.splits.items()} == dict(splits)
    assert {name: split.judgments for name, split in manifest.splits.items()} == {n: 3 * c for n, c in splits.items()}
    assert (manifest.name, manifest.products, manifest.photos, manifest.missing_photos) == ("wands", 3, 0, 0)
    assert manifest.labels["relevance"].gains == {"Exact": 1.0, "Partial": 0.1, "Irrelevant": 0.0}
    Wands(src=str(src), out=str(src.parent / "again")).run()
    assert content(src.parent / "again") == content(src.parent / "out")
    other = wands(src, gains={"relevance": {"Exact": 1, "Partial": 0.5, "Irrelevant": 0}})
    other.out = str(src.parent / "other")
    assert other.run().labels["relevance"].gains == {"Exact": 1.0, "Partial": 0.5, "Irrelevant": 0.0}
