"""Shards: what went in comes out, byte for byte the same again, or nothing is left behind."""

import csv
import fcntl
import tarfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from datamodules import shards as shards_module
from datamodules.catalogue import Catalogue, read_catalogue
from datamodules.importing.writer import _shard_count, write_shards
from datamodules.shards import Shards
from tests.datamodules.small import small_catalogue, write_rows

ODD_IDS = ["a/b.c.jpg", "__meta__", "%41", "A", "ü 1", "..", "x" * 120, "NA"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return small_catalogue(tmp_path / "small", labels=("label", "stars"))


@pytest.fixture
def catalogue(folder: Path) -> Catalogue:
    return read_catalogue(folder)


@pytest.fixture
def shards(catalogue: Catalogue, tmp_path: Path) -> Shards:
    write_shards(catalogue, tmp_path / "shards")
    return Shards.open(tmp_path / "shards")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_product_comes_back(shards: Shards, folder: Path) -> None:
    samples = {sample.product_id: sample for sample in map(shards.read, range(64))}
    for row in rows_of(folder / "products.csv"):
        sample = samples[row["product_id"]]
        assert sample.texts == {"title": row["title"]}
        assert sample.photo == ((folder / "images" / row["image"]).read_bytes() if row["image"] else None)
        assert shards.index.product_id[sample.id] == row["product_id"]
        assert shards.index.photo[sample.id] == bool(row["image"])


def test_a_sample_lists_its_train_judgments_and_no_others(shards: Shards, folder: Path) -> None:
    split = {row["query_id"]: row["split"] for row in rows_of(folder / "queries.csv")}
    judged: dict[str, list[tuple[str, float, float]]] = {f"p{i}": [] for i in range(64)}
    for row in rows_of(folder / "judgments.csv"):
        if split[row["query_id"]] == "train":
            gain = {"E": 1.0, "S": 0.1}[row["label"]]
            judged[row["product_id"]].append((row["query_id"], gain, float(row["stars"])))
    for sample in map(shards.read, range(64)):
        columns = sample.judgments
        found = zip(columns["query"], columns["relevance"], columns["stars"], strict=True)
        named = [(str(shards.queries.query_id[query]), gain, stars) for query, gain, stars in found]
        assert named == sorted(judged[sample.product_id], key=lambda entry: int(entry[0][1:]))
        assert shards.index.pairs[sample.id] == sum(gain == 1 for _, gain, _ in named)


def test_judgments_of_a_split(shards: Shards, folder: Path) -> None:
    splits = {row["query_id"]: row["split"] for row in rows_of(folder / "queries.csv")}
    for split in ("train", "val", "test"):
        judgments = shards.judgments(split)
        expected = {
            (row["query_id"], row["product_id"]): row["label"] == "E"
            for row in rows_of(folder / "judgments.csv")
            if splits[row["query_id"]] == split
        }
        names = zip(shards.queries.query_id[judgments.query], shards.index.product_id[judgments.product], strict=True)
        assert dict(zip(names, judgments.gain["relevance"] == 1, strict=True)) == expected
        keys = judgments.query * 64 + judgments.product
        assert (np.diff(keys) > 0).all()
        assert judgments.unlisted == ("unknown" if split == "train" else "irrelevant")
        assert judgments.labels == {"relevance": {"E": 1.0, "S": 0.1, "C": 0.01, "I": 0.0}, "stars": {}}
    with pytest.raises(ValueError, match="has no split 'dev'; it has train, val, test"):
        shards.judgments("dev")


def test_what_is_not_judged_in_a_column_is_nan(folder: Path, tmp_path: Path) -> None:
    rows = [("q0", "p0", "E", ""), ("q0", "p1", "S", "3")]
    write_rows(folder / "judgments.csv", ("query_id", "product_id", "label", "stars"), rows)
    write_shards(read_catalogue(folder), tmp_path / "shards")
    shards = Shards.open(tmp_path / "shards")
    by_product = dict(zip(shards.index.product_id.tolist(), range(64), strict=True))
    assert np.isnan(shards.read(by_product["p0"]).judgments["stars"]).tolist() == [True]
    assert shards.read(by_product["p1"]).judgments["stars"].tolist() == [3.0]
    assert np.isnan(shards.judgments("train").gain["stars"]).sum() == 1
    assert pq.read_table(tmp_path / "shards" / "judgments.parquet")["stars"].null_count == 1


def test_the_index_says_where_tarfile_finds_the_members(shards: Shards) -> None:
    place: dict[tuple[int, str], list[tarfile.TarInfo]] = {}
    for number, shard in enumerate(shards.manifest.shards):
        with tarfile.open(shards.path / shard.name) as tar:
            for member in tar:
                place.setdefault((number, member.name.split(".")[0]), []).append(member)
                assert (member.mtime, member.uname, member.uid) == (0, "", 0)
    for id, product in enumerate(shards.index.product_id):
        members = place[int(shards.index.shard[id]), product]
        assert [member.name for member in members] == [f"{product}.json", f"{product}.png"][: len(members)]
        assert members[0].offset == shards.index.offset[id]
        end = members[-1].offset_data + -(-members[-1].size // 512) * 512
        assert end == shards.index.offset[id] + shards.index.size[id]


def test_webdataset_reads_odd_ids_as_we_do(folder: Path, tmp_path: Path) -> None:
    write_rows(folder / "products.csv", ("product_id", "title", "image"), [(id, id, "p1.png") for id in ODD_IDS])
    write_rows(folder / "judgments.csv", ("query_id", "product_id", "label"), [("q0", id, "E") for id in ODD_IDS])
    write_shards(read_catalogue(folder), tmp_path / "shards")
    shards = Shards.open(tmp_path / "shards")
    urls = [str(shards.path / shard.name) for shard in shards.manifest.shards]
    stream = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [unquote(sample["__key__"]) for sample in stream] == shards.index.product_id.tolist()
    assert sorted(shards.index.product_id.tolist()) == sorted(ODD_IDS)
    for id, sample in enumerate(stream):
        ours = shards_module.parse_sample(sample["json"], sample["png"])
        assert (ours.product_id, ours.photo) == (shards.read(id).product_id, shards.read(id).photo)


def test_same_input_and_seed_same_bytes(catalogue: Catalogue, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_shards(catalogue, tmp_path / name, seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    ids = [Shards.open(tmp_path / name).index.product_id.tolist() for name in ("a", "c")]
    assert sorted(ids[0]) == sorted(ids[1])
    assert ids[0] != ids[1]
    assert ids[0] != catalogue.products.texts("product_id")


def test_the_manifest_counts(shards: Shards) -> None:
    manifest = shards.manifest
    assert manifest == write_shards(read_catalogue(shards.path.parent / "small"), shards.path.parent / "again")
    assert (manifest.products, manifest.photos, manifest.missing_photos, manifest.broken_photos) == (64, 56, 0, 0)
    assert list(manifest.labels) == ["relevance", "stars"]
    assert {name: (split.queries, split.judgments) for name, split in manifest.splits.items()} == {
        "train": (12, 192), "val": (2, 32), "test": (2, 32)
    }  # fmt: skip
    assert sum(shard.products for shard in manifest.shards) == 64
    # 16 kinds of 4 products each, of which 4 are asked for in val and test alone
    assert sum(shard.trainable for shard in manifest.shards) == sum(shard.pairs for shard in manifest.shards) == 48
    for number, shard in enumerate(manifest.shards):
        assert shard.trainable == (shards.index.pairs[shards.index.shard == number] > 0).sum()
        assert shard.bytes == (shards.path / shard.name).stat().st_size
    assert shards.queries.positives.tolist() == [4] * 16


@pytest.mark.parametrize(
    ("products", "size", "count"), [(10, None, 10), (64, None, 16), (32768, None, 16), (39435, None, 20), (64, 10, 7)]
)
def test_how_many_shards(products: int, size: int | None, count: int) -> None:
    assert _shard_count(products, size) == count


def test_shards_are_even(catalogue: Catalogue, tmp_path: Path) -> None:
    manifest = write_shards(catalogue, tmp_path / "shards", shard_size=10)
    assert [shard.products for shard in manifest.shards] == [10, 9, 9, 9, 9, 9, 9]


def test_further_columns_of_queries_are_kept(folder: Path, tmp_path: Path) -> None:
    classes = ["é" if i % 3 else "" for i in range(16)]
    rows = [(*row.values(), of) for row, of in zip(rows_of(folder / "queries.csv"), classes, strict=True)]
    write_rows(folder / "queries.csv", ("query_id", "query", "split", "class"), rows)
    write_shards(read_catalogue(folder), tmp_path / "shards")
    table = pq.read_table(tmp_path / "shards" / "queries.parquet")
    assert table["id"].to_pylist() == list(range(16))
    shards = Shards.open(tmp_path / "shards")
    assert shards.query_columns() == ["class"]
    assert shards.query_column("class").tolist() == classes


@pytest.mark.parametrize("head", [512, 1024, 1536, 8192])
def test_texts_of_all_products(folder: Path, tmp_path: Path, head: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much of a sample is read at first: less than its header with a long name, than its JSON, or all."""
    monkeypatch.setattr(shards_module, "HEAD", head)
    rows = [(id, f"title {id}", id * 5 if number % 2 else "", "p1.png") for number, id in enumerate(ODD_IDS)]
    write_rows(folder / "products.csv", ("product_id", "title", "description", "image"), rows)
    write_rows(folder / "judgments.csv", ("query_id", "product_id", "label"), [("q0", id, "E") for id in ODD_IDS])
    write_shards(read_catalogue(folder), tmp_path / "shards")
    shards = Shards.open(tmp_path / "shards")
    found = shards.texts(["description", "title"])
    described = {id: description for id, _, description, _ in rows}
    assert list(found) == ["description", "title"]
    assert found["title"].tolist() == [f"title {id}" for id in shards.index.product_id]
    assert found["description"].tolist() == [described[id] for id in shards.index.product_id]


def test_missing_photos_are_counted(folder: Path, tmp_path: Path) -> None:
    (folder / "images" / "p1.png").unlink()
    manifest = write_shards(read_catalogue(folder), tmp_path / "shards")
    assert (manifest.photos, manifest.missing_photos) == (55, 1)


def test_a_broken_photo_stops_or_is_dropped(folder: Path, tmp_path: Path) -> None:
    (folder / "images" / "p9.png").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"products.csv, row 10 \(line 11\).*'p9.png'.*on_broken_photo=drop"):
        write_shards(read_catalogue(folder), tmp_path / "shards")
    assert not (tmp_path / "shards").exists()
    manifest = write_shards(read_catalogue(folder), tmp_path / "shards", on_broken_photo="drop")
    assert (manifest.photos, manifest.broken_photos) == (55, 1)
    assert (tmp_path / "shards" / "missing_photos.csv").read_text().splitlines()[1:] == ["p9,p9.png,not a photo"]


def test_a_photo_that_leads_out_of_the_folder_is_named(folder: Path, tmp_path: Path) -> None:
    """That of a name the tables show already; a link only when it is followed."""
    (folder / "images" / "p9.png").unlink()
    (folder / "images" / "p9.png").symlink_to(folder / "products.csv")
    with pytest.raises(ValueError, match=r"products.csv, row 10 \(line 11\): image: .*'p9.png' is a link that leads"):
        write_shards(read_catalogue(folder), tmp_path / "shards")


def test_what_a_killed_import_left_is_taken_over_but_nothing_else(catalogue: Catalogue, tmp_path: Path) -> None:
    partial = tmp_path / "shards.partial"
    partial.mkdir()
    (partial / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="is in the way"):
        write_shards(catalogue, tmp_path / "shards")
    assert (partial / "mine.txt").read_text() == "keep"
    with (partial / ".writing").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another import is writing"):
            write_shards(catalogue, tmp_path / "shards")
    write_shards(catalogue, tmp_path / "shards")
    assert not partial.exists()
    assert not (tmp_path / "shards" / ".writing").exists()


def test_the_same_shards_again_are_left_alone_and_others_refused(
    catalogue: Catalogue, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    write_shards(catalogue, out)
    inode, before = out.stat().st_ino, contents(out)
    write_shards(catalogue, out)
    with pytest.raises(ValueError, match=r"holds other shards \(seed there: 0, now: 1\)"):
        write_shards(catalogue, out, seed=1)
    with pytest.raises(ValueError, match=r"holds other shards \(shards there: 16, now: 7\)"):
        write_shards(catalogue, out, shard_size=10)
    (folder / "images" / "p1.png").write_bytes((folder / "images" / "p2.png").read_bytes())
    with pytest.raises(ValueError, match=r"tables or photos differ"):
        write_shards(read_catalogue(folder), out)
    assert out.stat().st_ino == inode
    assert contents(out) == before
    assert not (tmp_path / "shards.partial").exists()


def test_a_users_folder_is_never_touched(catalogue: Catalogue, tmp_path: Path) -> None:
    out = tmp_path / "photos"
    out.mkdir()
    write_shards(catalogue, tmp_path / "empty")
    (out / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"photos exists and is not these shards.*holiday.jpg"):
        write_shards(catalogue, out)
    assert contents(out) == {"holiday.jpg": b"x"}


def test_an_empty_folder_will_do(catalogue: Catalogue, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_shards(catalogue, tmp_path / "empty")
    assert len(Shards.open(tmp_path / "empty")) == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_size": 0}, "shard_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"unlisted": {"dev": "unknown"}}, "unlisted says dev: unknown; expected train, val, test"),
    ],
)
def test_options_that_cannot_be(catalogue: Catalogue, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_shards(catalogue, tmp_path / "shards", **options)


def test_what_unlisted_means_can_be_said(catalogue: Catalogue, tmp_path: Path) -> None:
    write_shards(catalogue, tmp_path / "shards", unlisted={"test": "unknown"})
    assert Shards.open(tmp_path / "shards").judgments("test").unlisted == "unknown"


@pytest.mark.parametrize("change", [Path.unlink, lambda tar: tar.write_bytes(tar.read_bytes()[:-512])])
def test_damaged_shards_are_not_taken_for_the_same(
    catalogue: Catalogue, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    write_shards(catalogue, tmp_path / "shards")
    change(tmp_path / "shards" / "00003.tar")
    with pytest.raises(ValueError, match=r"shards is damaged: 00003.tar is missing or short; delete it"):
        write_shards(catalogue, tmp_path / "shards")


def spoil_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))


def new_schema(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 99'))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_manifest, "changed after it was written"),
        (new_schema, "has schema 99, this version reads 1"),
        (lambda folder: (folder / "manifest.json").write_text("{"), r"manifest.json: .*line 1"),
        (lambda folder: (folder / "index.parquet").write_bytes(b"no"), "index.parquet cannot be read"),
        (lambda folder: (folder / "queries.parquet").unlink(), "queries.parquet is missing"),
    ],
)
def test_damaged_shards_are_refused(shards: Shards, spoil: Callable[[Path], None], message: str) -> None:
    spoil(shards.path)
    with pytest.raises(ValueError, match=message):
        Shards.open(shards.path)


def test_what_is_no_shards_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist.*make data FROM=catalogue"):
        Shards.open(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is a file; expected a folder of shards"):
        Shards.open(folder / "products.csv")
    with pytest.raises(
        ValueError, match=r"images, judgments.csv.*not imported yet: make them with: make data FROM=catalogue SRC="
    ):
        Shards.open(folder)


@pytest.mark.parametrize("id", [-1, 64])
def test_ids_that_are_not_there(shards: Shards, id: int) -> None:
    with pytest.raises(IndexError, match=f"product id {id} of 64"):
        shards.read(id)
