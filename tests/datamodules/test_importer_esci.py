"""ESCI as published, in small: nulls, HTML, other locales and versions, and the photos of SQID and ESCI-S."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datamodules.importers.amazon_photos import repaired
from datamodules.importers.esci import Esci
from datamodules.importers.html_text import _parsed, shown_text
from datamodules.importing.splits import in_val
from datamodules.photos.options import PhotoOptions
from mmfusion import cli
from tests.datamodules.images import encoded
from tests.datamodules.small import write_rows
from tests.datamodules.streams import column, content, rows
from tests.datamodules.web import page, web_server

EXAMPLES = (
    "query",
    "query_id",
    "product_id",
    "product_locale",
    "esci_label",
    "small_version",
    "large_version",
    "split",
)
PRODUCT = ("title", "description", "bullet_point", "brand", "color")
VAL = next(f"red hat {i}" for i in range(1000) if in_val(f"red hat {i}", 0, 0.05))
DEFAULT = "https://m.media-amazon.com/images/G/01/digital/video/web/Default_Background_Art_LTR._SX1080_FMjpg_.jpg"
I = "https://m.media-amazon.com/images"  # noqa: E741  (as in the address)


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """Query 0 is train, 1 val by its hash, 2 test, 3 in the large version alone; B4 is judged by nobody."""
    folder = tmp_path / "esci"
    folder.mkdir()
    write_examples(
        folder,
        ("blue cup", 0, "B0", "us", "E", 1, 1, "train"),
        ("blue cup", 0, "B1", "us", "S", 1, 1, "train"),
        (VAL, 1, "B2", "us", "E", 1, 1, "train"),
        ("blue cup", 0, "B0", "es", "C", 1, 1, "train"),
        ("lamp", 2, "B0", "us", "I", 1, 1, "test"),
        ("lamp", 2, "B2", "us", "E", 1, 1, "test"),
        ("large", 3, "B3", "us", "E", 0, 1, "train"),
    )
    write_products(
        folder,
        ("B0", "us", "Cup", "<p>Big &amp; <b>bl</b>ue</p><ul><li>one<li>two</ul>", "a\nb", "Acme", "Blue"),
        ("B0", "es", "Taza", None, None, None, None),
        ("B1", "us", None, None, None, None, None),
        ("B2", "us", "Hat", "plain  text", "", "", ""),
        ("B3", "us", "Lamp", "1 < 2 & 3 > 2", None, None, None),
        ("B4", "us", "Shoe", None, None, None, None),
    )
    write_rows(
        folder / "shopping_queries_dataset_sources.csv", ("query_id", "source"), [("0", "other"), ("2", "behavioral")]
    )
    return folder


def write_examples(folder: Path, *examples: Sequence[Any]) -> None:
    table = pa.table({name: list(cells) for name, cells in zip(EXAMPLES, zip(*examples, strict=True), strict=True)})
    table = table.add_column(0, "example_id", pa.array(range(len(table))))
    pq.write_table(table, folder / "shopping_queries_dataset_examples.parquet", row_group_size=3)


def write_products(folder: Path, *products: Sequence[str | None]) -> None:
    names = ("product_id", "product_locale", *(f"product_{name}" for name in PRODUCT))
    columns = {
        name: pa.array(cells, pa.string()) for name, cells in zip(names, zip(*products, strict=True), strict=True)
    }
    pq.write_table(pa.table(columns), folder / "shopping_queries_dataset_products.parquet", row_group_size=2)


def esci(src: Path, **options: Any) -> Esci:
    return Esci(src=str(src), out=str(src.parent / "out"), **options)


def test_products_and_their_texts(src: Path) -> None:
    products = rows(esci(src).source().products)
    assert [product["product_id"] for product in products] == ["us:B0", "us:B1", "us:B2", "us:B3", "us:B4"]
    assert [product["#row"] for product in products] == [0, 2, 3, 4, 5]
    assert {name: products[0][name] for name in PRODUCT} == {
        "title": "Cup", "description": "Big & blue one two", "bullet_point": "a\nb", "brand": "Acme", "color": "Blue",
    }  # fmt: skip
    assert [product["description"] for product in products[1:]] == ["", "plain text", "1 < 2 & 3 > 2", ""]
    assert "image" not in products[0]


def test_queries_splits_and_sources(src: Path) -> None:
    queries = rows(esci(src).source().queries)
    assert [tuple(query.values()) for query in queries] == [
        ("us:0", "blue cup", "train", "us", "other", 0),
        ("us:1", VAL, "val", "us", "", 2),
        ("us:2", "lamp", "test", "us", "behavioral", 4),
    ]
    assert column(esci(src, val_fraction=0.0).source().queries, "split") == ["train", "train", "test"]
    other = next(seed for seed in range(1000) if not in_val(VAL, seed, 0.05) and in_val("blue cup", seed, 0.05))
    assert column(esci(src, seed=other).source().queries, "split") == ["val", "train", "test"]


def test_judgments(src: Path) -> None:
    judged = rows(esci(src).source().judgments)
    assert [tuple(row.values()) for row in judged] == [
        ("us:0", "us:B0", "E", 0), ("us:0", "us:B1", "S", 1), ("us:1", "us:B2", "E", 2),
        ("us:2", "us:B0", "I", 4), ("us:2", "us:B2", "E", 5),
    ]  # fmt: skip


def test_locales_and_versions(src: Path) -> None:
    assert column(esci(src, locale="es").source().products, "title") == ["Taza"]
    both = esci(src, locale=["us", "es"]).source()
    assert column(both.queries, "query_id") == ["us:0", "us:1", "es:0", "us:2"]
    assert "es:B0" in column(both.products, "product_id")
    assert both.name == "esci-us-es-small"
    large = esci(src, version="large").source()
    assert column(large.queries, "query_id")[-1] == "us:3"
    assert large.options["version"] == "large"
    judged = column(esci(src, corpus="judged").source().products, "product_id")
    assert judged == ["us:B0", "us:B1", "us:B2"]
    assert column(esci(src, corpus="judged", version="large").source().products, "product_id") == [*judged, "us:B3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"locale": []}, r"locale is \[\]"),
        ({"locale": ["us", "us"]}, "each once"),
        ({"val_fraction": 1.0}, "fraction of val queries is 1.0"),
        ({"images": "no.csv"}, "'no.csv', which is no file"),
    ],
)
def test_options_that_cannot_be(src: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        esci(src, **options).source()


def test_what_is_missing_is_named(src: Path) -> None:
    sources = src / "shopping_queries_dataset_sources.csv"
    sources.write_text("query_id,origin\n0,other\n")
    with pytest.raises(ValueError, match=r"sources\.csv has no column 'source'; its columns are: query_id, origin"):
        esci(src).source()
    sources.unlink()
    with pytest.raises(FileNotFoundError, match=r"no shopping_queries_dataset_sources\.csv; amazon-science/esci-data"):
        esci(src).source()
    with pytest.raises(FileNotFoundError, match="is no folder"):
        esci(src / "none").source()


def test_a_column_that_is_missing(src: Path) -> None:
    path = src / "shopping_queries_dataset_products.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["product_brand"]), path)
    with pytest.raises(ValueError, match=r"products\.parquet has no column 'product_brand'"):
        esci(src).source()


def test_a_locale_without_rows(src: Path) -> None:
    source = esci(src, locale="jp").source()
    for stream in (source.products, source.queries, source.judgments):
        with pytest.raises(ValueError, match="no rows of locale jp"):
            list(stream.batches())


def sqid(src: Path) -> Path:
    images = src.parent / "sqid"
    images.mkdir()
    header = ("product_id", "image_url")
    write_rows(images / "product_image_urls.csv", header, [("B0", f"{I}/I/0.jpg"), ("B1", DEFAULT), ("B2", "")])
    write_rows(images / "supp_product_image_urls.csv", header, [("B4", f"{I}/I/4.jpg"), ("B0", f"{I}/I/other.jpg")])
    return images / "product_image_urls.csv"


def test_photos_of_sqid(src: Path) -> None:
    source = esci(src, locale=["us", "es"], images=str(sqid(src))).source()
    assert dict(zip(column(source.products, "product_id"), column(source.products, "image"), strict=True)) == {
        "us:B0": f"{I}/I/0.jpg", "es:B0": "", "us:B1": "", "us:B2": "", "us:B3": "", "us:B4": f"{I}/I/4.jpg",
    }  # fmt: skip
    assert source.photos is not None
    assert source.options["images"]["left_out"] == {"default picture": 1}
    (src.parent / "sqid" / "supp_product_image_urls.csv").unlink()
    alone = esci(src, images=str(src.parent / "sqid" / "product_image_urls.csv")).source()
    assert column(alone.products, "image") == [f"{I}/I/0.jpg", "", "", "", ""]


def test_sqid_is_of_us_and_has_its_columns(src: Path) -> None:
    path = sqid(src)
    with pytest.raises(ValueError, match="photos of us products only; the locales are es"):
        esci(src, locale="es", images=str(path)).source()
    path.write_text("product_id,url\nB0,x\n")
    with pytest.raises(ValueError, match=r"product_image_urls\.csv has no column 'image_url'"):
        esci(src, images=str(path)).source()


def esci_s(path: Path) -> Path:
    products = [
        {"type": "product", "locale": "us", "asin": "B0", "image": f"{I}/W/IMAGERENDERING_52-T1/images/I/0._AC_.jpg"},
        {"type": "error", "asin": "B1", "error": "404"},
        {"type": "book", "locale": "us", "asin": "B2", "img": f"{I}/I/2.jpg"},
        {"type": "product", "locale": "es", "asin": "B0", "image": f"{I}/I/es.jpg"},
        {"type": "product", "locale": "us", "asin": "B3", "image": None},
        {"type": "product", "locale": "us", "asin": "B4", "image": DEFAULT},
    ]
    lines = "".join(json.dumps(product) + "\n" for product in products).encode()
    if path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(lines)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


@pytest.mark.parametrize("name", ["sample.json", "esci.jsonl", "sample.json.gz", "esci.json.zst"])
def test_photos_of_esci_s(src: Path, name: str) -> None:
    source = esci(src, locale=["us", "es"], images=str(esci_s(src.parent / name))).source()
    assert dict(zip(column(source.products, "product_id"), column(source.products, "image"), strict=True)) == {
        "us:B0": f"{I}/I/0._AC_.jpg", "es:B0": f"{I}/I/es.jpg", "us:B1": "", "us:B2": f"{I}/I/2.jpg", "us:B3": "",
        "us:B4": "",
    }  # fmt: skip
    assert source.options["images"] == {
        "from": "esci-s", "files": [name], "left_out": {"type error": 1, "default picture": 1},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is no JSON"),
        ("[]", "line 1 has no key 'type'"),
        ('{"type": "product", "asin": "B0"}', "line 1 has no locale; its keys are: type, asin"),
    ],
)
def test_lines_that_are_not_esci_s(src: Path, line: str, message: str) -> None:
    path = src.parent / "lines.json"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        esci(src, images=str(path)).source()


def test_files_that_hold_no_addresses(src: Path) -> None:
    for name, message in (
        ("photos.parquet", "expected SQID's .csv or ESCI-S's"),
        ("lines.json.gz", "cannot be unpacked"),
    ):
        (src.parent / name).write_bytes(b"no gzip")
        with pytest.raises(ValueError, match=message):
            esci(src, images=str(src.parent / name)).source()


def test_addresses_that_need_no_repair_stay() -> None:
    for address in (f"{I}/I/81bd.jpg", f"{I}/W/x/other/I/81bd.jpg", ""):
        assert repaired(address) == address


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("no markup,  two spaces", "no markup, two spaces"),
        ("a<br>b<br/>c", "a b c"),
        ("H<sub>2</sub>O <b>wa</b>ter", "H2O water"),
        ("<style>p {color: red}</style><p>red</p><script>if (a < b) alert()</script>", "red"),
        ("caf&eacute; &#8217; &lt;b&gt; &nbsp;x", "café ’ <b> x"),
        ("<div title='a>b'>in</div", "in"),
        ("3 <4 and R&D, AT&T;", "3 <4 and R&D, AT&T;"),
        ("<!-- hidden <p>-->shown", "shown"),
        ("a<P >b</LI>c<bR />d&am<b>p;</b>", "a b c d&amp;"),
    ],
)
def test_shown_text(html: str, text: str) -> None:
    assert shown_text(html) == text


PIECES = (
    "<b>",
    "</B>",
    "<p>",
    "<br/>",
    "<LI >",
    "<td />",
    "a",
    "&amp;",
    "&eacute",
    " ",
    ">",
    "<",
    "<i x=1>",
    "é;",
    "\n",
)


@given(st.lists(st.sampled_from(PIECES), max_size=12))
def test_plain_markup_needs_no_parser(pieces: list[str]) -> None:
    assert shown_text("".join(pieces)) == _parsed("".join(pieces))


def test_a_query_id_with_two_texts_is_refused(src: Path) -> None:
    write_examples(
        src, ("blue cup", 0, "B0", "us", "E", 1, 1, "train"), ("red cup", 0, "B1", "us", "E", 1, 1, "train"),
        ("lamp", 2, "B0", "us", "E", 1, 1, "test"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"row 2: query_id 'us:0' is already that of row 1"):
        esci(src).run()


def test_one_text_in_train_and_test_is_refused(src: Path) -> None:
    write_examples(src, ("Lamp ", 0, "B0", "us", "E", 1, 1, "train"), ("lamp", 2, "B0", "us", "E", 1, 1, "test"))
    with pytest.raises(ValueError, match="1 of 1 val and test queries have a text that another split has"):
        esci(src).run()
    write_examples(src, ("lamp", 0, "B0", "es", "E", 1, 1, "train"), ("lamp", 2, "B0", "us", "E", 1, 1, "test"))
    assert esci(src, locale=["us", "es"]).run().splits["test"].queries == 1


def test_a_product_published_twice_is_refused(src: Path) -> None:
    write_products(src, *[("B0", "us", "Cup", None, None, None, None)] * 2)
    with pytest.raises(ValueError, match="product_id 'us:B0' is already that of row 1"):
        esci(src).run()


def test_through_to_shards(src: Path) -> None:
    manifest = esci(src).run()
    assert (manifest.name, manifest.products, manifest.photos) == ("esci-us-small", 5, 0)
    assert {name: (split.queries, split.judgments) for name, split in manifest.splits.items()} == {
        "train": (1, 2), "val": (1, 1), "test": (1, 2),
    }  # fmt: skip
    assert manifest.labels["relevance"].gains == {"E": 1.0, "S": 0.1, "C": 0.01, "I": 0.0}
    assert manifest.fields == list(PRODUCT)
    assert manifest.source["importer"] == "esci"
    first = content(src.parent / "out")
    moved = src.rename(src.parent / "moved")
    Esci(src=str(moved), out=str(src.parent / "again")).run()
    assert content(src.parent / "again") == first


def test_photos_of_addresses_reach_the_shards(src: Path) -> None:
    """B0 is there, B2 is not: one of two may fail. The published address of B0 needs the repair to be found."""
    jpeg = encoded(Image.new("RGB", (64, 32), (200, 0, 0)), "JPEG")
    with web_server() as web:
        web.add("/images/I/0.jpg", page(jpeg))
        lines = [("B0", "/images/W/IMAGERENDERING/images/I/0.jpg"), ("B2", "/images/I/gone.jpg")]
        products = [{"type": "product", "locale": "us", "asin": id, "image": web.url(path)} for id, path in lines]
        path = src.parent / "sample.json"
        path.write_text("".join(json.dumps(product) + "\n" for product in products))
        options = PhotoOptions(max_side=16, retries=0, max_failed=0.5)
        manifest = esci(src, images=str(path), photos=options).run()
        assert dict(web.requests) == {"/images/I/0.jpg": 1, "/images/I/gone.jpg": 1}
        command = ["--from=esci", f"--src={src}", f"--out={src.parent / 'by command'}", f"--images={path}"]
        cli.data([*command, "--photos.max_side=16", "--photos.retries=0", "--photos.max_failed=0.5"])
        assert content(src.parent / "by command") == content(src.parent / "out")
    assert (manifest.photos, manifest.missing_photos) == (1, 1)
    missing = (src.parent / "out" / "missing_photos.csv").read_text()
    assert "us:B2" in missing
    assert "HTTP 404" in missing
