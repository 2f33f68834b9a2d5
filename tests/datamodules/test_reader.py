"""Reading: whatever is wrong with a shard or a sample is one exception with a reason; tables must suit the manifest."""

import dataclasses
import json
import multiprocessing
import pickle
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.shards import Shards
from datamodules.stores.store import LocalStore
from datamodules.stores.transfer import ShardError
from datamodules.stream import tars
from datamodules.stream.failures import REASONS
from datamodules.stream.members import find_record, parse_sample
from datamodules.stream.verify import find_unusable
from datamodules.tuples import TupleDataModule
from tests.datamodules.damage import (
    Elsewhere,
    changed,
    content_of,
    copied,
    header,
    member,
    overwrite,
    parts_of,
    sample,
    tar_of,
)
from tests.datamodules.drawn import PRODUCTS, SIZE, Tables, draw_shards
from tests.ddp import run_ranks

ID = 45  # a trainable product with a photo, in the third shard


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    return draw_shards(tmp_path_factory.mktemp("catalogue"))


@pytest.fixture
def path(tables: Tables, tmp_path: Path) -> Path:
    path = copied(tables, tmp_path)
    index = Shards.open(path).index
    assert index.photo[ID]
    assert index.trainable[ID]
    return path


def reason(shards: Shards, id: int = ID) -> str:
    with pytest.raises(ShardError) as caught:
        shards.read(id)
    assert caught.value.reason in REASONS
    assert repr(str(shards.index.product_id[id])) in str(caught.value)
    return caught.value.reason


def judged(record: bytes, change: Callable[[dict[str, list[Any]]], None]) -> bytes:
    judgments = json.loads(record)["judgments"]
    change(judgments)
    return changed(record, judgments=judgments)


# each: key, JSON and photo of the sample -> what lies in its place instead
WRONG_MEMBERS: dict[str, Callable[[str, bytes, bytes], bytes]] = {
    "zeros": lambda key, record, photo: b"",
    "a bit of the header": lambda key, record, photo: b"\x01" + sample(key, record, photo)[1:],
    "a bit of the photo's header": lambda key, record, photo: member(f"{key}.json", record) + b"\xff" * 512,
    "a link": lambda key, record, photo: member(f"{key}.json", record, kind=b"2") + member(f"{key}.png", photo),
    "a folder": lambda key, record, photo: header(f"{key}.json", 0, kind=b"5"),
    "a hole": lambda key, record, photo: header(f"{key}.json", 0, kind=b"S"),
    "the photo first": lambda key, record, photo: member(f"{key}.png", photo) + member(f"{key}.json", record),
    "text for the photo": lambda key, record, photo: sample(key, record, photo, ending="txt"),
    "a pickle for the photo": lambda key, record, photo: sample(key, record, photo, ending="pyd"),
    "JSON twice": lambda key, record, photo: sample(key, record, photo, ending="json"),
    "another's photo": lambda key, record, photo: member(f"{key}.json", record) + member(f"x{key}.png", photo),
    "JSON alone": lambda key, record, photo: member(f"{key}.json", record),
    "larger than its place": lambda key, record, photo: header(f"{key}.json", 10**6) + record,
    "a photo larger than its place": lambda key, record, photo: (
        member(f"{key}.json", record) + header(f"{key}.png", 10**6)
    ),
    "a negative size": lambda key, record, photo: header(f"{key}.json", 0, size_field=b"-00000000512"),
    "a size with spaces": lambda key, record, photo: header(f"{key}.json", 0, size_field=b"  0_0_7     "),
    "a size with a 9": lambda key, record, photo: header(f"{key}.json", 0, size_field=b"00000000099\0"),
    "a binary size": lambda key, record, photo: header(f"{key}.json", 0, size_field=b"\x80" + bytes(10) + b"\x09"),
    "extra headers without end": lambda key, record, photo: header("x", 0, kind=b"x") * 3,
    "another id": lambda key, record, photo: sample(key, changed(record, id=44), photo),
    "another product": lambda key, record, photo: sample(key, changed(record, product_id="p1"), photo),
}


@pytest.mark.parametrize("damage", WRONG_MEMBERS)
def test_wrong_members(path: Path, damage: str) -> None:
    overwrite(path, ID, WRONG_MEMBERS[damage](*parts_of(content_of(path, ID))))
    assert reason(Shards.open(path)) == "wrong member"


def test_what_these_are_made_from_is_right(path: Path) -> None:
    """Else the test above would prove less than it says: nothing but the damage is wrong."""
    shards = Shards.open(path)
    before, content = shards.read(ID), content_of(path, ID)
    key, record, photo = parts_of(content)
    overwrite(path, ID, sample(key, changed(record), photo))
    after = shards.read(ID)
    assert (after.texts, after.photo) == (before.texts, before.photo) == (before.texts, photo)
    with tarfile.open(tar_of(path, ID)) as tar:
        assert sum(entry.name.endswith(".json") for entry in tar) == 19


INVALID: dict[str, bytes] = {
    "nothing": b"",
    "not UTF-8": b'{"product_id": "\xff"}',
    "UTF-16": '{"product_id": "a"}'.encode("utf-16"),
    "half of it": b'{"product_id": "a", "id": 1, "te',
    "a list": b"[]",
    "null": b"null",
    "no id": b'{"product_id": "a"}',
    "texts a list": b'{"product_id": "a", "id": 1, "texts": [], "judgments": {"query": []}}',
    "texts of numbers": b'{"product_id": "a", "id": 1, "texts": {"title": 1}, "judgments": {"query": []}}',
    "half a surrogate pair": b'{"product_id": "a", "id": 1, "texts": {"title": "\\ud800"}, "judgments": {"query": []}}',
    "id a text": b'{"product_id": "a", "id": "1", "texts": {}, "judgments": {"query": []}}',
    "id true": b'{"product_id": "a", "id": true, "texts": {}, "judgments": {"query": []}}',
    "product_id a number": b'{"product_id": 1, "id": 1, "texts": {}, "judgments": {"query": []}}',
    "nested too deep": b"[" * 200_000,
    "a number too long": b'{"id": ' + b"9" * 5000 + b"}",
    **{
        f"judgments {judgments[:40]!r}": b'{"product_id": "a", "id": 1, "texts": {}, "judgments": ' + judgments + b"}"
        for judgments in (
            b"null",
            b"[]",
            b"{}",
            b'{"query": null}',
            b'{"query": {}}',
            b'{"query": "12"}',
            b'{"query": ["1"]}',
            b'{"query": [1.0]}',
            b'{"query": [true]}',
            b'{"query": [[1]]}',
            b'{"query": [2, 1]}',
            b'{"query": [1, 1]}',
            b'{"query": [-1]}',
            b'{"query": [9223372036854775808]}',
            b'{"query": [1], "relevance": []}',
            b'{"query": [1], "relevance": {"1": 1}}',
            b'{"query": [1], "relevance": "1"}',
            b'{"query": [1], "relevance": ["1"]}',
            b'{"query": [1], "relevance": [NaN]}',
            b'{"query": [1], "relevance": [-Infinity]}',
            b'{"query": [1], "relevance": [1e999]}',
            b'{"query": [1], "relevance": [-1e999]}',
            b'{"query": [1], "relevance": [' + b"9" * 400 + b"]}",
        )
    },
}


@pytest.mark.parametrize("content", INVALID.values(), ids=INVALID)
def test_invalid_json(content: bytes) -> None:
    with pytest.raises(ShardError) as caught:
        parse_sample(content, None)
    assert caught.value.reason == "invalid JSON"


def test_gaps_between_judgments_are_nan() -> None:
    content = b'{"product_id": "a", "id": 1, "texts": {}, "judgments": {"query": [1, 4], "relevance": [null, 2]}}'
    found = parse_sample(content, b"photo")
    assert found.judgments["query"].tolist() == [1, 4]
    assert np.isnan(found.judgments["relevance"]).tolist() == [True, False]
    assert (found.product_id, found.id, found.photo) == ("a", 1, b"photo")


CONTRADICTIONS: dict[str, Callable[[bytes], bytes]] = {
    "a text field less": lambda record: changed(record, texts={"title": ""}),
    "a text field more": lambda record: changed(record, texts={**json.loads(record)["texts"], "x": ""}),
    "a label column less": lambda record: judged(record, lambda judgments: judgments.pop("desirability")),
    "a query that is not there": lambda record: judged(
        record, lambda judgments: judgments["query"].__setitem__(-1, 99)
    ),
    "other positives": lambda record: judged(
        record, lambda judgments: judgments.update(relevance=[0] * len(judgments["query"]))
    ),
}


@pytest.mark.parametrize("damage", CONTRADICTIONS)
def test_json_that_contradicts_the_manifest(path: Path, damage: str) -> None:
    key, record, photo = parts_of(content_of(path, ID))
    overwrite(path, ID, sample(key, CONTRADICTIONS[damage](record), photo))
    assert reason(Shards.open(path)) == "invalid JSON"


def test_a_head_is_asked_for_more_where_it_ends_too_soon() -> None:
    content = member("a" * 90 + ".json", b"{}" * 600)
    for length in (0, 511, 512, 1600):
        assert find_record(content[:length], len(content)) is None
    found = find_record(content[:1712], len(content))
    assert found is not None
    assert content[found.start : found.end] == b"{}" * 600


def test_missing_and_short_shards_are_known_and_the_others_read(path: Path) -> None:
    (path / "00001.tar").unlink()
    (path / "00002.tar").write_bytes((path / "00002.tar").read_bytes()[:-512])
    (path / "00003.tar").write_bytes((path / "00003.tar").read_bytes() + b"\0")
    shards = Shards.open(path)
    expected = {1: "missing shard", 2: "truncated", 3: "checksum"}
    assert shards.tars.unusable == expected
    for id in range(PRODUCTS):
        number = int(shards.index.shard[id])
        assert number not in expected or reason(shards, id) == expected[number]
        assert number in expected or shards.read(id).id == id
    assert pickle.loads(pickle.dumps(shards)).tars.unusable == expected


def test_a_shard_that_changes_while_it_is_read(path: Path) -> None:
    shards = Shards.open(path)
    last = int(np.flatnonzero(shards.index.shard == 2)[-1])
    shards.read(ID)
    tar = tar_of(path, ID)
    with tar.open("r+b") as file:
        file.truncate(int(shards.index.offset[last]) + 100)
    assert reason(shards, last) == "truncated"
    assert shards.read(ID).id == ID
    tar.unlink()
    assert shards.read(ID).id == ID, "an open file stays readable"
    shards.close()
    assert reason(shards) == "missing shard"
    tar.mkdir()
    shards.close()
    assert reason(shards) == "missing shard"


def opened(path: Path, **options: Any) -> TupleDataModule:
    data = TupleDataModule(str(path), batch_size=16, image_size=SIZE, **options)
    data.setup("fit")
    return data


def test_too_many_products_in_lost_shards_stop_the_run_before_it_starts(path: Path) -> None:
    (path / "00001.tar").unlink()
    (path / "00004.tar").write_bytes(b"")
    named = r"2 of 8 shards of .* cannot be used \(1 missing shard, 1 truncated\), with 38 of 150 products: 00001.tar"
    with pytest.raises(
        ValueError, match=named + r" \(19\), 00004.tar \(19\). That is over the limit data.max_broken=0.2"
    ):
        opened(path, max_broken=0.2)
    with pytest.warns(UserWarning, match=named + r".*; the run goes on without them"):
        opened(path, max_broken=0.3)


def test_verify_finds_what_no_size_tells(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overwrite(path, ID, content_of(path, ID)[:-1] + b"\1")  # behind the photo: the sample itself is right
    assert opened(path).shards.read(ID).id == ID
    with pytest.warns(UserWarning, match=r"1 of 8 shards .* \(1 checksum\), with 19 of 150 products: 00002.tar"):
        data = opened(path, verify=True, max_broken=0.2)
    assert "verify shards: 100%" in capsys.readouterr().err
    assert reason(data.shards) == "checksum"
    with pytest.raises(ValueError, match=r"00002.tar \(19\). That is over the limit data.max_broken=0.01"):
        opened(path, verify=True)


def _verified(rank: int, world: int, path: Path) -> dict[int, str]:
    shards = Shards.open(path)
    if rank == 1:
        shards.tars.unusable = {5: "missing shard"}  # as on another machine's disk
    return find_unusable(shards, rank, world, verify=True)


def test_ranks_share_what_each_has_hashed(path: Path) -> None:
    for id in (ID, 70):
        overwrite(path, id, content_of(path, id)[:-1] + b"\1")
    wrong = {2: "checksum", 3: "checksum", 5: "missing shard"}
    assert run_ranks(_verified, 2, path) == [wrong, wrong]


def rewritten(path: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes columns of a table."""
    table = pq.read_table(path / name)
    columns = {column: table[column].to_numpy() for column in table.column_names}
    change(columns)
    pq.write_table(pa.table({column: pa.array(values) for column, values in columns.items()}), path / name)


def shortened(columns: dict[str, Any]) -> None:
    columns.update({name: values[:-1] for name, values in columns.items()})


def moved(name: str, row: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(columns: dict[str, Any]) -> None:
        columns[name] = columns[name].copy()
        columns[name][row] = value

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("index.parquet", shortened, "149 products where the manifest has 150"),
        ("index.parquet", moved("shard", -1, 8), "shards that are not there"),
        ("index.parquet", moved("shard", 0, -1), "shards that are not there"),
        ("index.parquet", moved("shard", 0, 1), "or not ascending"),
        ("index.parquet", moved("shard", 19, 0), "other numbers of products"),
        ("index.parquet", moved("pairs", 0, 77), "other numbers of products or pairs"),
        ("index.parquet", moved("offset", 1, 512), "places of samples that overlap"),
        ("index.parquet", moved("offset", 0, -512), "places of samples that overlap or leave"),
        ("index.parquet", moved("size", -1, 2**40), "places of samples that overlap or leave their shard"),
        ("index.parquet", moved("size", 3, 0), "places of samples"),
        ("index.parquet", lambda columns: columns.update(size=columns["size"] * 1.0), "columns of other types"),
        ("index.parquet", lambda columns: columns.pop("pairs"), "index.parquet cannot be read"),
        ("queries.parquet", shortened, "queries.parquet does not belong to its manifest.json"),
        ("queries.parquet", moved("split", 0, "dev"), "queries.parquet does not belong to its manifest.json"),
        ("judgments.parquet", shortened, "judgments.parquet does not belong to its manifest.json"),
        ("judgments.parquet", moved("product", 3, 150), "expected .* with a product below 150"),
        ("judgments.parquet", moved("query", 3, -1), "expected .* with a query below 40"),
    ],
)
def test_tables_that_contradict_the_manifest(path: Path, name: str, change: Callable[..., None], message: str) -> None:
    rewritten(path, name, change)
    with pytest.raises(ValueError, match=message):
        Shards.open(path).judgments("val")


@pytest.mark.parametrize("name", ["index.parquet", "queries.parquet"])
def test_tables_that_cannot_be_read(path: Path, name: str) -> None:
    (path / name).write_bytes(b"no")
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        Shards.open(path)
    (path / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        Shards.open(path)


@pytest.mark.parametrize("name", ["../00000.tar", "/etc/passwd", "a/b.tar", "..", ""])
def test_shards_that_are_no_plain_files_are_refused(path: Path, name: str) -> None:
    manifest = LocalStore(path).manifest
    others = [dataclasses.replace(manifest.shards[0], name=name), *manifest.shards[1:]]
    (path / "manifest.json").write_text(dataclasses.replace(manifest, shards=others).to_json())
    with pytest.raises(ValueError, match="expected a plain file name"):
        Shards.open(path)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (["labels"], ["relevance"], r"labels is \['relevance'\]; expected dict"),
        (["labels", "relevance", "positive_from"], "1", "positive_from is '1'; expected float"),
        (["labels", "relevance", "gains"], ["E", "S"], "gains is .* expected dict"),
        (["splits", "val", "unlisted"], "perhaps", "unlisted is 'perhaps'; expected .*Literal"),
        (["splits", "val"], {"queries": 1}, "val has queries; expected queries, judgments, unlisted"),
        (["shards", 0, "name"], 5, r"shards \[0\]: name is 5; expected str"),
        (["shards", 0, "bytes"], "1024", "bytes is '1024'; expected int"),
        (["shards", 0, "bytes"], 2**64, "expected int"),
        (["shards"], {"name": "00000.tar"}, "shards is .* expected list"),
        (["tables"], None, "tables is None; expected dict"),
        (["fields", 0], None, "None; expected str"),
        (["products"], True, "products is True; expected int"),
        (["more"], 1, "the manifest has .*more; expected name, seed"),
    ],
)
def test_a_manifest_made_by_hand_is_told_of(path: Path, place: list[Any], value: Any, said: str) -> None:
    record = json.loads((path / "manifest.json").read_text())
    within = record
    for step in place[:-1]:
        within = within[step]
    within[place[-1]] = value
    (path / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=said):
        Shards.open(path)


def test_a_shard_that_goes_while_shards_are_verified_is_missing(path: Path) -> None:
    shards = Shards.open(path)
    (path / "00002.tar").unlink()
    assert find_unusable(shards, 0, 1, verify=True) == {2: "missing shard"}


def test_the_files_used_last_stay_open(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "OPEN_FILES", 2)
    shards = Shards.open(path)
    for shard in (0, 1, 0, 2):
        shards.tars.read(shard, 0, 512)
    assert set(shards.tars._files) == {0, 2}


def test_few_files_are_open_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "OPEN_FILES", 2)
    shards = Shards.open(path)
    ids = np.random.default_rng(0).permutation(PRODUCTS).tolist()
    assert [shards.read(id).id for id in ids] == ids
    assert len(shards.tars._files) == 2
    shards.close()
    assert not shards.tars._files


def test_other_processes_read_too(path: Path) -> None:
    """A pickled reader carries neither open files nor tables; a forked one reads through those it inherits."""
    shards = Shards.open(path)
    texts = [shards.read(id).texts for id in range(PRODUCTS)]
    shards.judgments("train")
    packed = pickle.dumps(shards)
    copy = pickle.loads(packed)
    assert not copy.tars._files
    assert len(packed) < 3000
    assert [copy.read(id).texts for id in range(PRODUCTS)] == texts
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(partial(texts_of, shards), range(PRODUCTS)) == texts


def texts_of(shards: Shards, id: int) -> dict[str, str]:
    return shards.read(id).texts


def test_only_what_is_asked_for_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.shards.HEAD", 1024)
    shards = Shards.open(path)
    sizes: list[int] = []
    read = shards.tars.read
    monkeypatch.setattr(shards.tars, "read", lambda *place: sizes.append(place[2]) or read(*place))
    assert shards.read(ID, photo=False).photo is None
    assert shards.read(ID).photo is not None
    assert sizes == [1024, int(shards.index.size[ID])]


def test_a_store_that_fails_is_not_asked_for_every_sample(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Elsewhere(path, lacks=["00002.tar"])
    shards = Shards.open(store)
    store.asked.clear()
    for _ in range(3):
        assert reason(shards) == "unreachable"
    assert store.asked == ["00002.tar"]
    monkeypatch.setattr(tars, "PATIENCE", 0.0)
    store.lacks.clear()
    assert shards.read(ID).id == ID
