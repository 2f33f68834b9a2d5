"""Fashion Product Images as published, in small, and the rule that makes queries: checked against the benchmark's."""

import csv
import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules.importers.fashion import Fashion, read_styles, sparse_titles
from datamodules.importers.fashion_queries import (
    ATTRIBUTES,
    KINDS,
    WORDINGS,
    Derived,
    derived,
    judged,
    singular,
    split_of,
    worded,
)
from tests.datamodules.streams import content, rows

HEADER = "id,gender,masterCategory,subCategory,articleType,baseColour,season,year,usage,productDisplayName"
GENDERS, TYPES, COLOURS, USAGES = (
    ("Men", "Women"),
    ("Tshirts", "Casual Shoes", "Dresses"),
    ("Red", "Navy Blue"),
    ("Casual", "NA"),
)


def style(i: int) -> str:
    gender, kind = GENDERS[i % 2], TYPES[i // 2 % 3]
    colour, usage = COLOURS[i // 6 % 2], USAGES[i // 12 % 2]
    name = f"Acme {gender} {colour} {kind} {i}" + (", set of 2, boxed" if i == 5 else "")
    return f"{i},{gender},Apparel,Topwear,{kind},{colour},Fall,2011,{usage},{name}"


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """Products 0 to 239, with photos but for the last."""
    folder = tmp_path / "fashion"
    (folder / "images").mkdir(parents=True)
    write_styles(folder, [style(i) for i in range(240)])
    for i in range(239):
        Image.new("RGB", (3, 4), (i, 0, 0)).save(folder / "images" / f"{i}.jpg")
    return folder


def write_styles(folder: Path, lines: list[str]) -> None:
    (folder / "styles.csv").write_text("\n".join([HEADER, *lines]) + "\n", encoding="utf-8")


def importer(src: Path, **options: Any) -> Fashion:
    return Fashion(src=str(src), out=str(src.parent / "out"), **options)


def test_products_have_titles_and_no_attributes(src: Path) -> None:
    source = importer(src).source()
    products = rows(source.products)
    assert products[5] == {
        "product_id": "5", "title": "Acme Women Red Dresses 5, set of 2, boxed",
        "title_sparse": "Acme Dresses 5, set of 2, boxed", "image": "5.jpg",
    }  # fmt: skip
    assert products[8]["title_sparse"] == "Acme Shoes 8"
    assert len(products) == 240
    assert source.options["rows with unquoted commas"] == 1


@pytest.mark.parametrize(
    ("title", "sparse"),
    [
        ("Nike Men's Navy Blue T-shirt", "Nike T-shirt"),
        ("Puma Mens Blues Tee", "Puma Tee"),
        ("Womens' RED Casual Shoes", "Shoes"),
        ("Redtape Blueberry Mentor Off-White", "Redtape Blueberry Mentor Off-White"),
        ("Girls Navy Skirt for Women's Day", "Skirt for Day"),
        ("Black & Grey Vans", "Black & Grey Vans"),
        ("", ""),
    ],
)
def test_sparse_titles(title: str, sparse: str) -> None:
    """Colours are those that the data set names: black and grey are not among these."""
    assert sparse_titles([title], ["Navy Blue", "Blue", "Red", "White", "NA", ""], ["Casual", ""]) == [sparse]


def test_rows_that_cannot_be_read(src: Path) -> None:
    write_styles(src, [style(0), "1,Men,Apparel"])
    with pytest.raises(ValueError, match=r"styles\.csv, row 2: 3 cells, the header has 10"):
        importer(src).source()
    write_styles(src, [])
    with pytest.raises(ValueError, match=r"styles\.csv has no rows"):
        importer(src).source()
    (src / "styles.csv").write_text(HEADER.replace("baseColour", "colour") + "\n")
    with pytest.raises(ValueError, match=r"styles\.csv has no column 'baseColour'"):
        importer(src).source()
    (src / "styles.csv").write_text(",".join(reversed(HEADER.split(","))) + "\n")
    with pytest.raises(ValueError, match="the last column is 'id'; expected 'productDisplayName'"):
        importer(src).source()
    (src / "styles.csv").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no styles\.csv; Kaggle's Fashion Product Images publishes styles\.csv"
    ):
        importer(src).source()


def test_quoted_cells_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "styles.csv"
    path.write_text(f'{HEADER}\n1,Men,A,B,Ties,Red,Fall,2011,Casual,"a, ""b"" "\n\n', encoding="utf-8-sig")
    columns, with_commas = read_styles(path)
    assert (columns["id"], columns["productDisplayName"], with_commas) == (["1"], ['a, "b"'], 0)


class Slow:
    """The rule written out, product by product, from what the module's docstring says."""

    def __init__(self, src: Path, made: Derived, seed: int) -> None:
        columns, _ = read_styles(src / "styles.csv")
        self.products = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        self.part = {p["id"]: split_of(f"title {p['productDisplayName']}", seed, 0.1) for p in self.products}
        self.queries = made.queries.to_pylist()
        self.found: dict[str, dict[str, str]] = defaultdict(dict)
        for row in made.judgments.to_pylist():
            assert row["product_id"] not in self.found[row["query_id"]]
            self.found[row["query_id"]][row["product_id"]] = row["label"]

    def labels(self, wants: dict[str, str]) -> dict[str, str]:
        missed = {p["id"]: [n for n, value in wants.items() if p[n] != value] for p in self.products}
        return {
            id: "S" if names else "E" for id, names in missed.items() if len(names) < 2 and "articleType" not in names
        }

    def combinations(self) -> Iterator[tuple[dict[str, str], int]]:
        for kind in KINDS:
            counts = Counter(tuple((n, p[n]) for n in ("articleType", *kind)) for p in self.products)
            yield from ((dict(wants), n) for wants, n in counts.items() if not {v for _, v in wants} & {"", "NA"})


@pytest.mark.parametrize("seed", [0, 1])
def test_the_rule_against_itself_written_slowly(src: Path, seed: int) -> None:
    columns, _ = read_styles(src / "styles.csv")
    made = derived({n: columns[n] for n in ATTRIBUTES}, columns["id"], columns["productDisplayName"], seed)
    slow = Slow(src, made, seed)
    splits: dict[str, set[str]] = defaultdict(set)
    for query in slow.queries:
        wants, found = json.loads(query["wants"]), slow.found[query["query_id"]]
        splits[query["wants"]].add(query["split"])
        labels = slow.labels(wants)
        if query["split"] == "train":
            trained = {id: label for id, label in labels.items() if slow.part[id] == "train"}
            assert {id for id, label in found.items() if label == "E"} == {i for i, v in trained.items() if v == "E"}
            drawn = {id for id, label in found.items() if label == "S"}
            assert drawn <= {id for id, label in trained.items() if label == "S"}
            assert len(drawn) == min(10, sum(label == "S" for label in trained.values()))
        else:
            assert found == labels
        assert query["kind"] == " ".join(wants)
        assert query["query"] in {worded(tuple(wants.items()), form) for form in WORDINGS}
    assert all(len(found) == 1 for found in splits.values())
    assert {json.dumps(wants) for wants, products in slow.combinations() if products >= 3} == set(splits)
    assert {split for found in splits.values() for split in found} == {"train", "val", "test"}
    texts = Counter(query["query"] for query in slow.queries)
    assert set(texts.values()) == {1}
    train = Counter(query["wants"] for query in slow.queries if query["split"] == "train")
    assert max(train.values()) == 2


def test_seeds_draw_other_queries(src: Path) -> None:
    one, same, other = (rows(importer(src, seed=seed).source().queries) for seed in (0, 0, 1))
    assert one == same
    assert one != other


def test_products_of_equal_titles_are_in_one_part() -> None:
    values = {"articleType": ["Ties"] * 400, "gender": ["Men"] * 400, "baseColour": ["Red"] * 400, "usage": [""] * 400}
    made = derived(
        values, [str(i) for i in range(400)], [f"Tie  {'RED' if i % 2 else 'red'} {i // 2}" for i in range(400)], 0
    )
    train = [query["query_id"] for query in made.queries.to_pylist() if query["split"] == "train"]
    ids = {int(row["product_id"]) for row in made.judgments.to_pylist() if row["query_id"] == train[0]}
    assert 280 < len(ids) < 360
    assert all((id ^ 1) in ids for id in ids)


def test_what_few_products_have_or_reads_alike_is_left_out() -> None:
    values = {
        "articleType": ["Ties"] * 4 + ["Tie"] * 3, "gender": ["Men", "Men", "Women", ""] + ["Men"] * 3,
        "baseColour": ["NA"] * 7, "usage": [""] * 7,
    }  # fmt: skip
    made = derived(values, list("abcdefg"), list("abcdefg"), 0)
    assert {query["wants"] for query in made.queries.to_pylist()} <= {'{"articleType": "Tie", "gender": "Men"}'}


@pytest.mark.parametrize(
    ("type_", "one"),
    [("watches", "watch"), ("dresses", "dress"), ("accessories", "accessory"), ("scarves", "scarf"), ("ties", "tie"),
     ("booties", "bootie"), ("jeans", "jeans"), ("track pants", "track pants"), ("dupatta", "dupatta"), ("caps", "cap"),
     ("shoes", "shoe"), ("capris", "capris")],
)  # fmt: skip
def test_one_of_a_type(type_: str, one: str) -> None:
    assert singular(type_) == one


def test_wordings() -> None:
    wants = (("articleType", "Track Pants"), ("gender", "Men"), ("baseColour", "Red"))
    assert [worded(wants, form) for form in WORDINGS] == [
        "men red track pants",
        "track pants red men",
        "red track pants for men",
    ]
    assert worded((*wants[:1], *wants[2:]), WORDINGS[2]) == "red track pants"


def test_through_to_shards(src: Path) -> None:
    manifest = importer(src).run()
    assert (manifest.name, manifest.products, manifest.photos, manifest.missing_photos) == ("fashion", 240, 239, 1)
    assert manifest.fields == ["title", "title_sparse"]
    queries = Counter(query["split"] for query in rows(importer(src).source().queries))
    assert {name: split.queries for name, split in manifest.splits.items()} == dict(queries)
    assert manifest.source["synthetic queries"] is True
    again = importer(src)
    again.out = str(src.parent / "again")
    again.run()
    assert content(src.parent / "again") == content(src.parent / "out")


@pytest.mark.data
def test_the_rule_judges_as_the_benchmark_does(fashion: Path) -> None:
    """Every 20th of its val and test queries, over all 39,435 products: the published labels exactly."""
    with (fashion / "products.csv").open(encoding="utf-8") as file:
        products = list(csv.DictReader(file))
    with (fashion / "queries.csv").open(encoding="utf-8") as file:
        queries = [query for query in csv.DictReader(file) if query["split"] != "train"][::20]
    wanted = {query["query_id"] for query in queries}
    published: dict[str, dict[str, str]] = defaultdict(dict)
    with gzip.open(fashion / "judgments.csv.gz", "rt") as file:
        for row in csv.DictReader(file):
            if row["query_id"] in wanted:
                published[row["query_id"]][row["product_id"]] = row["label"]
    values = {name: np.array([product[name] for product in products]) for name in ATTRIBUTES}
    ids = np.array([product["product_id"] for product in products])
    for query in queries:
        wants = json.loads(query["wants"])
        rows_of_type = np.flatnonzero(values["articleType"] == wants["articleType"])
        exact, substitute = judged(values, rows_of_type, tuple(wants.items()))
        assert published[query["query_id"]] == {**dict.fromkeys(ids[exact], "E"), **dict.fromkeys(ids[substitute], "S")}


@pytest.mark.data
def test_sparse_titles_are_those_of_the_benchmark(fashion: Path) -> None:
    with (fashion / "products.csv").open(encoding="utf-8") as file:
        products = list(csv.DictReader(file))
    columns = ([product[name] for product in products] for name in ("title", "baseColour", "usage"))
    ours = sparse_titles(*columns)
    assert np.mean([one == product["title_sparse"] for one, product in zip(ours, products, strict=True)]) > 0.97
