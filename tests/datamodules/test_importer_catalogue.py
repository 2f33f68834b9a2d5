"""The catalogue importer as a user meets it: what it prints, what it refuses, and the real benchmark."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from datamodules.catalogue import read_catalogue
from datamodules.importers.catalogue import OwnCatalogue
from datamodules.importing.splits import in_val, position
from datamodules.importing.summary import histogram, print_summary
from datamodules.manifest import SPLITS, Label
from datamodules.photos.options import PhotoOptions
from datamodules.shards import Shards
from tests.datamodules.small import convert, small_catalogue, write_rows


def test_summary_tells_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = small_catalogue(tmp_path / "small", labels=("label", "stars"))
    (folder / "images" / "p1.png").unlink()
    (folder / "images" / "p2.png").write_bytes(b"")
    manifest = convert(str(folder), str(tmp_path / "out"), on_broken_photo="drop")
    console = Console(record=True, width=200)
    print_summary(read_catalogue(folder), manifest, tmp_path / "out", console)
    told = console.export_text()
    assert "64 products in 16 shards; 54 with a photo, 1 name one that could not be had, 1 photos are broken" in told
    assert "why: no such file 1, empty 1 (all in missing_photos.csv)" in told
    assert "to train on, by relevance: 48 products in 48 pairs" in told
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in told.splitlines() if "│" in line]
    assert ["train", "12", "0", "192", "unknown"] in rows
    assert ["test", "2", "0", "32", "irrelevant"] in rows
    assert ["relevance", "train", "E 48, S 144"] in rows
    assert ["stars", "val", "5 8, 1 24"] in rows
    assert "64 products" in capsys.readouterr().out


def test_options_reach_the_shards(tmp_path: Path) -> None:
    folder = small_catalogue(tmp_path / "small", labels=("label", "stars"))
    manifest = convert(
        str(folder), str(tmp_path / "out"), seed=3, shard_size=8, gains={"relevance": {"E": 2, "S": 1}},
        positive_from={"stars": 5}, primary="stars", unlisted={"train": "irrelevant"},
    )  # fmt: skip
    assert manifest.seed == 3
    assert [shard.products for shard in manifest.shards] == [8] * 8
    assert manifest.labels == {"stars": Label(None, 5.0), "relevance": Label({"E": 2.0, "S": 1.0}, 1.0)}
    assert manifest.primary == Shards.open(tmp_path / "out").manifest.primary == "stars"
    assert manifest.splits["train"].unlisted == "irrelevant"
    assert sum(shard.pairs for shard in manifest.shards) == 48


def test_histogram() -> None:
    letters = Label({"E": 1.0, "S": 0.1, "C": 0.0, "I": 0.0}, 1.0)
    assert histogram(np.array([1, 0.1, 0, 0, np.nan, 1, 1]), letters) == "E 3, S 1, C/I 2"
    assert histogram(np.array([5, 1, 5, np.nan]), Label(None, 1.0)) == "5 2, 1 1"
    assert histogram(np.arange(101.0), Label(None, 1.0)) == "101 numbers, quartiles 0 25 50 75 100"


@pytest.mark.data
def test_what_the_fashion_benchmark_holds(fashion: Path) -> None:
    catalogue = read_catalogue(fashion)
    pairs = (catalogue.split_of_judgment == SPLITS.index("train")) & catalogue.positive("relevance")
    assert len(catalogue.products) == 39435
    assert (pairs.sum(), len(np.unique(catalogue.product[pairs]))) == (211040, 28630)
    assert len(catalogue.shared_queries) == 1


@pytest.mark.data
@pytest.mark.slow
def test_the_fashion_benchmark_imported(fashion: Path, tmp_path: Path) -> None:
    """The counts that its authors state; 25 seconds on one core."""
    manifest = convert(str(fashion), str(tmp_path / "shards"))
    assert (manifest.products, manifest.photos, len(manifest.shards)) == (39435, 39435, 20)
    assert sum(shard.trainable for shard in manifest.shards) == 28630
    assert sum(shard.pairs for shard in manifest.shards) == 211040
    shards = Shards.open(tmp_path / "shards")
    assert [len(shards.queries.of(split)) for split in ("train", "val", "test")] == [6622, 481, 411]
    assert set(np.unique(shards.judgments("test").gain["relevance"])) == {0.1, 1.0}


def test_a_pair_that_is_judged_twice_is_an_error_or_counts_by_its_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_catalogue(tmp_path / "small", labels=("label", "stars"))
    once = OwnCatalogue(src=str(folder), out=str(tmp_path / "once")).run()
    with (folder / "judgments.csv").open("a") as file:
        file.write("q0,p0,S,7\nq0,p0,I,\n")  # E and 5 before
    with pytest.raises(ValueError, match=r"'q0' and product 'p0' are already judged.*repeated_pairs=best"):
        OwnCatalogue(src=str(folder), out=str(tmp_path / "twice")).run()
    capsys.readouterr()
    OwnCatalogue(src=str(folder), out=str(tmp_path / "twice"), repeated_pairs="best").run()
    assert "judged more than once: 2 judgments left out" in capsys.readouterr().out
    was, now = (Shards.open(tmp_path / name).judgments("train") for name in ("once", "twice"))
    assert (was.query == now.query).all()
    assert (was.product == now.product).all()
    assert (was.gain["relevance"] == now.gain["relevance"]).all()
    changed = np.flatnonzero(was.gain["stars"] != now.gain["stars"])
    assert now.gain["stars"][changed].tolist() == [7.0]
    assert once.splits["train"].judgments == len(now.query)


def test_a_catalogue_without_val_gets_one_by_the_texts_of_its_train_queries(tmp_path: Path) -> None:
    folder = small_catalogue(tmp_path / "small")
    lines = (folder / "queries.csv").read_text().replace(",val", ",train").splitlines()
    (folder / "queries.csv").write_text("\n".join(lines) + "\n")
    manifest = convert(str(folder), str(tmp_path / "out"), val_fraction=0.3, seed=1)
    shards = Shards.open(tmp_path / "out")
    expected = {
        query: "val" if split == "train" and in_val(query, 1, 0.3) else split
        for _, query, split in (line.split(",") for line in lines[1:])
    }
    assert dict(zip(shards.queries.query, shards.queries.split, strict=True)) == expected
    assert 0 < manifest.splits["val"].queries < 14
    assert manifest.source["val"] == "0.3 of the train queries, by a hash of seed and text"
    assert "val" not in convert(str(folder), str(tmp_path / "none"), val_fraction=0).splits
    with pytest.raises(ValueError, match="the fraction of val queries is 1"):
        convert(str(folder), str(tmp_path / "all"), val_fraction=1)


def unsplit(folder: Path, queries: list[str]) -> None:
    """All queries in train but the last two, which are test; judged on p0 and p1."""
    splits = ["train"] * (len(queries) - 2) + ["test"] * 2
    columns = {"query_id": range(len(queries)), "query": queries, "split": splits}
    (folder / "queries.csv").unlink()
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), folder / "queries.parquet")
    rows = [(str(row), f"p{product}", "E") for row in range(len(queries)) for product in (0, 1)]
    write_rows(folder / "judgments.csv", ("query_id", "product_id", "label"), rows)


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_a_few_queries_have_one_in_val_and_one_in_train_at_least(tmp_path: Path, fraction: float) -> None:
    folder = small_catalogue(tmp_path / "small")
    texts = [f"{number} cups" for number in range(10)]
    unsplit(folder, texts)
    manifest = convert(str(folder), str(tmp_path / "out"), val_fraction=fraction)
    queries = Shards.open(tmp_path / "out").queries
    at = [position(text, 0) for text in texts[:8]]
    alone = texts[at.index(min(at) if fraction < 0.5 else max(at))]
    expected = ["val" if (text == alone) == (fraction < 0.5) else "train" for text in texts[:8]]
    assert list(queries.split) == [*expected, "test", "test"]
    assert "at least one in val and in train" in manifest.source["val"]


def test_the_only_text_that_can_be_trained_on_stays_in_train(tmp_path: Path) -> None:
    folder = small_catalogue(tmp_path / "small")
    unsplit(folder, ["a cup", "A  cup", "hat", "lamp"])
    manifest = convert(str(folder), str(tmp_path / "out"), val_fraction=0.999)
    assert list(manifest.splits) == ["train", "test"]
    assert manifest.source["val"] == "none, as train queries have one text only"


def test_queries_may_be_numbers(tmp_path: Path) -> None:
    folder = small_catalogue(tmp_path / "small")
    unsplit(folder, [4711, 4712, 4713, 4714])  # type: ignore[list-item]
    manifest = convert(str(folder), str(tmp_path / "out"))
    assert manifest.splits["val"].queries == 1
    assert sorted(Shards.open(tmp_path / "out").queries.query) == ["4711", "4712", "4713", "4714"]


def test_an_address_that_is_none_is_a_photo_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = small_catalogue(tmp_path / "small")
    products = folder / "products.csv"
    products.write_text(products.read_text().replace(",p9.png", ",http://[x/1.jpg"))
    manifest = convert(str(folder), str(tmp_path / "out"))
    assert (manifest.photos, manifest.missing_photos) == (55, 1)
    assert "why: invalid address 1 (all in missing_photos.csv)" in capsys.readouterr().out


def test_photos_of_another_folder_are_a_mistake_and_a_few_missing_ones_are_not(tmp_path: Path) -> None:
    folder = small_catalogue(tmp_path / "small")
    photos = sorted((folder / "images").iterdir())
    for path in photos[1:]:
        path.unlink()
    assert convert(str(folder), str(tmp_path / "one")).missing_photos == 55
    photos[0].rename(folder / "images" / "other.png")
    expected = rf"products.csv, row 2 .*no photo 'p1.png', nor any other.* looked for at {folder}/images/p1.png\."
    with pytest.raises(ValueError, match=expected):
        convert(str(folder), str(tmp_path / "none"))


def test_a_photo_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    for tar in (False, True):
        folder = small_catalogue(tmp_path / f"small{tar}", tar=tar)
        photos = PhotoOptions(max_mib=10 / 2**20)
        manifest = convert(str(folder), str(tmp_path / f"out{tar}"), photos=photos)
        assert (manifest.photos, manifest.missing_photos) == (0, 56)
        assert "too large" in (tmp_path / f"out{tar}" / "missing_photos.csv").read_text()
