"""Reading a catalogue: what the tables say arrives, and every mistake is named with its file and row."""

import gzip
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datamodules.catalogue import read_catalogue
from tests.datamodules.small import small_catalogue, write_rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return small_catalogue(tmp_path / "small")


def edit(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    """Changes the lines of a file; line 0 is the header."""
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


def replace_line(path: Path, number: int, line: str) -> None:
    edit(path, lambda lines: [*lines[: number - 1], line, *lines[number:]])


def test_tables_arrive_as_they_are_written(folder: Path) -> None:
    catalogue = read_catalogue(folder)
    assert catalogue.name == "small"
    assert catalogue.fields == ["title"]
    assert catalogue.products.texts("product_id") == [f"p{i}" for i in range(64)]
    assert catalogue.splits == ["train", "val", "test"]
    assert len(catalogue.query) == 16 * 16
    assert list(catalogue.labels) == ["relevance"]
    exact = catalogue.gain["relevance"] == 1
    for query, product, is_exact in zip(catalogue.query, catalogue.product, exact, strict=True):
        assert is_exact == (query % 4 == product % 4 and query // 4 == product // 4 % 4)
    assert np.unique(catalogue.gain["relevance"]).tolist() == [0.1, 1.0]
    assert catalogue.photo(0) is None
    photo = catalogue.photo(1)
    assert photo is not None
    assert photo.ending == "png"
    assert photo.content == (folder / "images" / "p1.png").read_bytes()


def test_ids_stay_strings_and_nothing_is_null(folder: Path) -> None:
    """NA, nan and null are ids like any other, 007 keeps its zeros, true is no truth value."""
    ids = ["NA", "nan", "null", "007", "1e5", "true", "7"]
    rows = [(product, "NULL", "") for product in ids]
    write_rows(folder / "products.csv", ("product_id", "title", "image"), rows)
    write_rows(folder / "judgments.csv", ("query_id", "product_id", "label"), [("q0", product, "E") for product in ids])
    catalogue = read_catalogue(folder)
    assert catalogue.products.texts("product_id") == ids
    assert catalogue.products.texts("title") == ["NULL"] * 7
    assert catalogue.product.tolist() == list(range(7))


def test_parquet_and_gzip_say_the_same_as_csv(folder: Path) -> None:
    plain = read_catalogue(folder)
    for stem in ("products", "queries"):
        pq.write_table(pacsv.read_csv(folder / f"{stem}.csv"), folder / f"{stem}.parquet")
        (folder / f"{stem}.csv").unlink()
    (folder / "judgments.csv.gz").write_bytes(gzip.compress((folder / "judgments.csv").read_bytes()))
    (folder / "judgments.csv").unlink()
    other = read_catalogue(folder)
    assert other.products.columns.equals(plain.products.columns)
    assert other.queries.columns.equals(plain.queries.columns)
    assert (other.gain["relevance"] == plain.gain["relevance"]).all()
    assert (other.product == plain.product).all()


def test_parquet_numbers_and_nulls_become_text(folder: Path) -> None:
    columns = {"product_id": [1, 2], "title": ["cup", None], "image": [None, None], "price": [9.5, None]}
    columns["image"] = pa.array([None, None], pa.string())
    pq.write_table(pa.table(columns), folder / "products.parquet")
    (folder / "products.csv").unlink()
    write_rows(folder / "judgments.csv", ("query_id", "product_id", "label"), [("q0", "1", "E")])
    catalogue = read_catalogue(folder)
    assert catalogue.products.texts("product_id") == ["1", "2"]
    assert catalogue.products.texts("title") == ["cup", ""]
    assert catalogue.products.texts("price") == ["9.5", ""]
    assert catalogue.fields == ["title", "price"]


MISTAKES = [
    ("products.csv", 1, "product_id,name,image", r"products.csv has no column 'title'.*product_id, name, image"),
    ("products.csv", 1, "product_id,title,photo", r"products.csv has no column 'image'"),
    (
        "queries.csv",
        1,
        "query_id,query,part",
        r"queries.csv has no column 'split'; its columns are: query_id, query, part",
    ),
    ("judgments.csv", 1, "query,product_id,label", r"judgments.csv has no column 'query_id'"),
    (
        "products.csv",
        6,
        "p1,cup,",
        r"products.csv, row 5 \(line 6\): product_id 'p1' is already that of row 2 \(line 3\)",
    ),
    ("products.csv", 6, " ,cup,", r"products.csv, row 5 \(line 6\): product_id is blank"),
    ("products.csv", 6, "p4,cup,ftp://x.org/a.jpg", r"row 5 \(line 6\): image is 'ftp://x.org/a.jpg'; .*http or https"),
    ("products.csv", 6, "p4,cup,file:///etc/passwd", r"row 5 \(line 6\): image is 'file:///etc/passwd'"),
    ("products.csv", 6, "p4,cup,/etc/passwd", r"row 5 \(line 6\): image is '/etc/passwd'"),
    ("products.csv", 6, "p4,cup,images/../../x.png", r"row 5 \(line 6\): image is 'images/../../x.png'"),
    ("products.csv", 6, "p4,cup", r"products.csv cannot be read.*row 5 \(line 6\): Expected 3 columns, got 2"),
    ("queries.csv", 4, "q1,pink cup,train", r"queries.csv, row 3 \(line 4\): query_id 'q1' is already"),
    ("queries.csv", 4, "q2,  ,train", r"queries.csv, row 3 \(line 4\): query is blank"),
    ("queries.csv", 4, "q2,pink cup,dev", r"row 3 \(line 4\): the split is 'dev'; expected one of train, val, test"),
    (
        "queries.csv",
        4,
        "q2,Yellow  shoe,train",
        r"1 of 4 val and test queries.*'yellow shoe' \(test, row 16 .*train, row 3 ",
    ),
    ("judgments.csv", 9, "q99,p1,E", r"judgments.csv, row 8 \(line 9\): query_id 'q99' is not in queries.csv"),
    ("judgments.csv", 9, "q0,p99,E", r"judgments.csv, row 8 \(line 9\): product_id 'p99' is not in products.csv"),
    (
        "judgments.csv",
        9,
        "q0,p0,S",
        r"row 8 \(line 9\): query 'q0' and product 'p0' are already judged in row 1 \(line 2\)",
    ),
    (
        "judgments.csv",
        9,
        "q0,p20,X",
        r"row 8 \(line 9\): the label 'X' in column 'label' is not known; known are E, S, C, I",
    ),
    (
        "judgments.csv",
        9,
        "q0,p20,2",
        r"row 8 \(line 9\): the label '2'.*known are E, S, C, I; .*numbers or letters, not both",
    ),
    ("judgments.csv", 9, "q0,p20,", r"row 8 \(line 9\): no label in label"),
]


@pytest.mark.parametrize(("file", "line", "content", "message"), MISTAKES)
def test_a_mistake_is_named_with_file_and_row(folder: Path, file: str, line: int, content: str, message: str) -> None:
    replace_line(folder / file, line, content)
    with pytest.raises(ValueError, match=message):
        read_catalogue(folder)


def test_lines_are_counted_through_line_breaks_in_cells_and_empty_lines(folder: Path) -> None:
    replace_line(folder / "products.csv", 3, 'p1,"a cup\n\nof tea",\n')
    edit(folder / "products.csv", lambda lines: [*lines, "p1,cup,"])
    lines = (folder / "products.csv").read_text().splitlines()
    with pytest.raises(ValueError, match=rf"row 65 \(line {len(lines)}\).*row 2 \(line 3\)"):
        read_catalogue(folder)


def test_files_that_are_absent_or_doubled(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder"):
        read_catalogue(tmp_path / "nowhere")
    (folder / "judgments.csv.gz").write_bytes(gzip.compress((folder / "judgments.csv").read_bytes()))
    with pytest.raises(ValueError, match=r"judgments.csv and judgments.csv.gz"):
        read_catalogue(folder)
    (folder / "judgments.csv").unlink()
    (folder / "judgments.csv.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no judgments.csv, judgments.csv.gz or judgments.parquet"):
        read_catalogue(folder)


def test_photos_named_but_nowhere(folder: Path) -> None:
    (folder / "images").rename(folder / "pictures")
    with pytest.raises(FileNotFoundError, match=r"neither images/ nor images.tar, but products.csv names 56 photos"):
        read_catalogue(folder)


def test_a_tar_of_images_is_as_good_as_a_folder(folder: Path, tmp_path: Path) -> None:
    loose, tarred = read_catalogue(folder), read_catalogue(small_catalogue(tmp_path / "tarred", tar=True))
    assert [loose.photo(row) for row in range(64)] == [tarred.photo(row) for row in range(64)]


def test_the_ending_is_that_of_the_content(folder: Path) -> None:
    content = io.BytesIO()
    Image.new("RGB", (4, 4)).save(content, "JPEG")
    (folder / "images" / "p1.png").write_bytes(content.getvalue())
    photo = read_catalogue(folder).photo(1)
    assert photo is not None
    assert photo.ending == "jpg"


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", "half"])
def test_an_image_that_is_none_is_named(folder: Path, content: bytes | str) -> None:
    path = folder / "images" / "p1.png"
    path.write_bytes(path.read_bytes()[:40] if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=r"products.csv, row 2 \(line 3\): the photo of product 'p1'.*'p1.png'"):
        read_catalogue(folder).photo(1)


def test_several_label_columns(tmp_path: Path) -> None:
    folder = small_catalogue(tmp_path / "two", labels=("Stars", "label"))
    edit(folder / "judgments.csv", lambda lines: [lines[0], *(line.replace(",E,", ",4.5,") for line in lines[1:])])
    edit(folder / "judgments.csv", lambda lines: [lines[0], *(line.replace(",S,", ",,") for line in lines[1:])])
    catalogue = read_catalogue(folder, positive_from={"stars": 4})
    assert list(catalogue.labels) == ["relevance", "stars"]
    assert catalogue.labels["stars"].gains is None
    assert catalogue.labels["stars"].positive_from == 4
    exact = catalogue.gain["relevance"] == 1
    assert (catalogue.gain["stars"][exact] == 4.5).all()
    assert np.isnan(catalogue.gain["stars"][~exact]).all()
    assert list(read_catalogue(folder, primary="stars").labels) == ["stars", "relevance"]


def test_gains_can_be_given(folder: Path) -> None:
    catalogue = read_catalogue(folder, gains={"relevance": {"E": 3, "S": 2}}, positive_from={"relevance": 2})
    assert np.unique(catalogue.gain["relevance"]).tolist() == [2, 3]
    assert catalogue.positive("relevance").all()
    with pytest.raises(ValueError, match="the label 'S' in column 'label' is not known; known are E"):
        read_catalogue(folder, gains={"relevance": {"E": 1}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gains": {"label": {"E": 1}}}, "gains names the label column 'label'; there are: relevance"),
        ({"gains": {"relevance": {"E": -1}}}, "gains of 'label': E: -1"),
        ({"positive_from": {"stars": 1}}, "positive_from names the label column 'stars'"),
        ({"positive_from": {"relevance": 0}}, "positive_from of 'relevance' is 0; expected a gain above 0"),
        ({"positive_from": {"relevance": 2}}, "no judgment of a train query is positive.*highest gain there is 1"),
        ({"primary": "stars"}, "primary names the label column 'stars'"),
        ({"max_shared_queries": 2}, "max_shared_queries is 2; expected a fraction"),
    ],
)
def test_options_that_cannot_be(folder: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_catalogue(folder, **options)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["5", "x"], r"row 2 \(line 3\): the label 'x'.*other labels there are numbers"),
        (["5", "-1"], r"row 2 \(line 3\): the label '-1'.*is negative"),
        (["5", "nan"], r"row 2 \(line 3\): the label 'nan'"),
        (["good", "bad"], r"row 1 \(line 2\): the label 'good' in column 'label' is not known; known are E, S, C, I"),
    ],
)
def test_labels_that_cannot_be(folder: Path, labels: list[str], message: str) -> None:
    rows = [("q0", f"p{number}", label) for number, label in enumerate(labels)]
    write_rows(folder / "judgments.csv", ("query_id", "product_id", "label"), rows)
    with pytest.raises(ValueError, match=message):
        read_catalogue(folder)


@pytest.mark.parametrize("columns", [("query",), ("label", "relevance"), ("a/b",)])
def test_label_columns_that_cannot_be(folder: Path, columns: tuple[str, ...]) -> None:
    rows = [("q0", "p0", *("E" for _ in columns))]
    write_rows(folder / "judgments.csv", ("query_id", "product_id", *columns), rows)
    with pytest.raises(ValueError, match="rename it"):
        read_catalogue(folder)


def test_a_text_in_two_splits_is_let_through_up_to_the_limit_and_told(folder: Path) -> None:
    replace_line(folder / "queries.csv", 4, "q2,Yellow  shoe,train")
    catalogue = read_catalogue(folder, max_shared_queries=0.25)
    assert len(catalogue.shared_queries) == 1
    assert "'yellow shoe'" in catalogue.shared_queries[0]
