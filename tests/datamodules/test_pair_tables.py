"""Tables of pairs beside the shards: whole or not listed, checked when read, local and at an address."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules import pair_tables
from datamodules.catalogue import read_catalogue
from datamodules.importing.writer import write_shards
from datamodules.manifest import Manifest, PairKind, read_manifest
from datamodules.pair_tables import PairRows, read_pair_table, write_pair_table
from datamodules.shards import Shards
from datamodules.stores.store import LocalStore, open_store
from tests.datamodules.faulty import serving
from tests.datamodules.small import small_catalogue

QUERIES, PRODUCTS = 16, 24
QUERY, PRODUCT, SCORE = np.array([2, 0, 2]), np.array([5, 23, 1]), np.array([0.5, -1.0, 2.0])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_shards(read_catalogue(small_catalogue(folder / "small", products=PRODUCTS)), folder / "shards", shard_size=8)
    return folder / "shards"


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "shards"))


def write(folder: Path | str, name: str = "mined", kind: PairKind = "negatives", **changed: Any) -> Path:
    rows = {"query": QUERY, "product": PRODUCT, "score": SCORE, "made_by": {"run": "runs/a", "top": 3}}
    return write_pair_table(folder, name, kind, **{**rows, **changed})


def read(source: Path | str, name: str = "mined", kind: PairKind = "negatives") -> PairRows:
    return read_pair_table(source, name, kind, "data.hard_from")


def as_lists(rows: PairRows) -> list[list[float]]:
    return [rows.query.tolist(), rows.product.tolist(), rows.score.tolist()]


def test_what_is_written_is_read(shards: Path) -> None:
    before = read_manifest(shards)
    path = write(shards)
    assert path == shards / "pairs" / "mined.parquet"
    assert as_lists(read(shards)) == [[0, 2, 2], [23, 1, 5], [-1.0, 2.0, 0.5]]
    assert pq.read_table(path).to_pydict() == {"query": [0, 2, 2], "product": [23, 1, 5], "score": [-1.0, 2.0, 0.5]}
    after = read_manifest(shards)
    assert after.hash == before.hash
    assert before.pairs == {}
    (table,) = after.pairs.values()
    assert (table.kind, table.rows, table.made_by) == ("negatives", 3, {"run": "runs/a", "top": 3})
    assert dataclasses.replace(after, pairs={}) == before
    write(shards, "teacher", "scores", score=SCORE + 1)
    assert as_lists(read(shards, "teacher", "scores"))[2] == [0.0, 3.0, 1.5]
    assert list(read_manifest(shards).pairs) == ["mined", "teacher"]
    assert Shards.open(shards).manifest.hash == before.hash
    assert sorted(path.name for path in (shards / "pairs").iterdir()) == [".lock", "mined.parquet", "teacher.parquet"]


@pytest.fixture(scope="module")
def changing(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(made, tmp_path_factory.mktemp("changing") / "shards"))


PAIR = st.tuples(st.integers(0, QUERIES - 1), st.integers(0, PRODUCTS - 1))


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(PAIR, st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_any_rows_come_back_sorted(changing: Path, rows: dict[tuple[int, int], float]) -> None:
    query, product = ([pair[side] for pair in rows] for side in (0, 1))
    ids = {"query": np.array(query, np.int64), "product": np.array(product, np.int64)}
    write(changing, "any", **ids, score=np.array(list(rows.values()), np.float32), replace=True)
    expected = [[*pair, score] for pair, score in sorted(rows.items())]
    assert [list(row) for row in zip(*as_lists(read(changing, "any")), strict=True)] == expected


def test_an_import_of_the_same_leaves_them(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = Path(shutil.copytree(made.parent, tmp_path / "again")) / "shards"
    write(shards)
    write_shards(read_catalogue(shards.parent / "small"), shards, shard_size=8)
    assert "holds these shards already" in capsys.readouterr().err
    assert len(read(shards)) == 3


def test_a_manifest_from_before_is_read_and_means_none(shards: Path) -> None:
    record = json.loads((shards / "manifest.json").read_text())
    assert record.pop("pairs") == {}
    (shards / "manifest.json").write_text(json.dumps(record))
    assert read_manifest(shards).pairs == {}
    write(shards)
    assert len(read(shards)) == 3
    assert read_manifest(shards).hash == record["hash"]


def test_a_name_that_is_taken(shards: Path) -> None:
    path = write(shards)
    content, manifest = path.read_bytes(), (shards / "manifest.json").read_bytes()
    order = [2, 1, 0]
    write(shards, query=QUERY[order], product=PRODUCT[order], score=SCORE[order], made_by={"run": "another"})
    assert (path.read_bytes(), (shards / "manifest.json").read_bytes()) == (content, manifest)
    for other in ({"score": SCORE * 2}, {"kind": "scores"}):
        with pytest.raises(ValueError, match=r"mined.parquet exists with other content: choose another name"):
            write(shards, **other)
    assert (path.read_bytes(), (shards / "manifest.json").read_bytes()) == (content, manifest)
    write(shards, score=SCORE * 2, replace=True)
    assert as_lists(read(shards))[2] == [-2.0, 4.0, 1.0]
    assert list(read_manifest(shards).pairs) == ["mined"]


@pytest.mark.parametrize("content", [None, b"", b"PAR1"])
def test_the_same_rows_restore_a_file(shards: Path, content: bytes | None) -> None:
    path = write(shards)
    whole, manifest = path.read_bytes(), (shards / "manifest.json").read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    for other in ({"score": SCORE * 2}, {"kind": "scores"}):
        with pytest.raises(ValueError, match=r"choose another name, or replace it \(--replace\)"):
            write(shards, **other)
    assert write(shards, made_by={"run": "another"}) == path
    assert (path.read_bytes(), (shards / "manifest.json").read_bytes()) == (whole, manifest)
    assert len(read(shards)) == 3


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ((QUERY[:2], PRODUCT, SCORE), "of 2 queries, 3 products and 3 scores"),
        ((QUERY, PRODUCT, SCORE[:0]), "of 3 queries, 3 products and 0 scores"),
        ((QUERY + 0.5, PRODUCT, SCORE), "the query column holds float64; expected dense ids"),
        ((QUERY, PRODUCT.astype(str), SCORE), "the product column holds <U21; expected dense ids"),
    ],
)
def test_columns_that_are_no_pairs(columns: tuple[np.ndarray, np.ndarray, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair_tables._check_columns(*columns)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "Mined"}, "a table of pairs is called 'Mined'; expected lower-case letters, digits"),
        ({"name": "../x"}, "expected lower-case"),
        ({"name": ""}, "expected lower-case"),
        ({"name": "judged"}, "cannot be called 'judged': that is another source's name"),
        ({"query": np.array([0, 1, QUERIES])}, "it has the query 16, the shards have 16: are its ids those of another"),
        ({"product": np.array([0, -1, 2])}, "it has the product -1, the shards have 24"),
        ({"score": np.array([0.0, np.nan, 1.0])}, "it has the score nan; expected finite numbers"),
        ({"score": np.array([0.0, np.inf, 1.0])}, "it has the score inf"),
        ({"product": np.array([5, 23, 5])}, "it has query 2 with product 5 twice"),
        ({"made_by": {"x": {1}}}, "made_by cannot be written as JSON"),
        ({"made_by": {"x": float("nan")}}, "made_by cannot be written as JSON"),
    ],
    ids=str,
)
def test_what_is_refused(shards: Path, changed: dict[str, Any], message: str) -> None:
    before = (shards / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        write(shards, **changed)
    assert (shards / "manifest.json").read_bytes() == before
    assert not (shards / "pairs").exists()


def test_scores_are_not_called_as_a_label_column(shards: Path) -> None:
    """A loss names either by `label`."""
    before = (shards / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match=r"scores cannot be called 'relevance': .* label columns \(relevance\)"):
        write(shards, "relevance", "scores")
    assert (shards / "manifest.json").read_bytes() == before
    write(shards, "relevance")
    assert len(read(shards, "relevance")) == 3, "negatives are named elsewhere"
    record = json.loads(before)
    record["pairs"] = {"relevance": {"kind": "scores", "sha256": "a" * 64, "rows": 3, "made_by": {}}}
    (shards / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"data.scores names 'relevance', a table that is called as one of the label"):
        read_pair_table(shards, "relevance", "scores", "data.scores")


@pytest.mark.parametrize("address", ["https://server/folder", "s3://bucket/folder", "pipe:cat {name}"])
def test_it_is_written_into_a_local_folder_alone(address: str) -> None:
    with pytest.raises(ValueError, match=r"written into a local folder of shards, not to (https|s3|pipe):\.\.\."):
        write(address)


def test_a_local_address_is_a_folder(shards: Path) -> None:
    assert write(f"file://{shards}") == shards / "pairs" / "mined.parquet"
    assert len(read(f"file://{shards}")) == 3


def _die_at(step: int, folder: Path, name: str, replace: bool) -> None:
    """Writes a table and is killed at the `step`-th rename."""
    done, rename = [0], os.replace

    def dying(*paths: Any) -> None:
        done[0] += 1
        if done[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*paths)

    os.replace = dying
    write(folder, name, score=SCORE * 3, replace=replace)


def killed(step: int, folder: Path, name: str, replace: bool = False) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=_die_at, args=(step, folder, name, replace))
    process.start()
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize("step", [1, 2])
def test_killed_at_a_rename_it_is_not_listed_and_written_again(shards: Path, step: int) -> None:
    write(shards)
    before = (shards / "manifest.json").read_bytes()
    assert killed(step, shards, "more") == -signal.SIGKILL
    assert (shards / "manifest.json").read_bytes() == before
    assert (shards / "pairs" / "more.parquet").exists() == (step == 2)
    assert len(read(shards)) == 3
    assert killed(9, shards, "more") == 0
    assert as_lists(read(shards, "more"))[2] == [-3.0, 6.0, 1.5]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_killed_while_it_replaces_the_manifest_lists_nothing_wrong(shards: Path, step: int) -> None:
    write(shards)
    write(shards, "other")
    assert killed(step, shards, "mined", replace=True) == -signal.SIGKILL
    listed = read_manifest(shards).pairs
    assert list(listed) == (["mined", "other"] if step == 1 else ["other"])
    for name in listed:
        assert len(read(shards, name)) == 3
    write(shards, score=SCORE * 3, replace=step == 1)
    assert as_lists(read(shards))[2] == [-3.0, 6.0, 1.5]


def _write_many(folder: Path, names: list[str]) -> None:
    for name in names:
        write(folder, name)


def test_several_write_and_read_at_once(shards: Path) -> None:
    write(shards)
    context = multiprocessing.get_context("fork")
    names = [[f"{writer}-{number}" for number in range(6)] for writer in "abc"]
    writers = [context.Process(target=_write_many, args=(shards, some)) for some in names]
    for process in writers:
        process.start()
    rounds = 0
    while any(process.is_alive() for process in writers) or not rounds:
        store = open_store(shards)  # a manifest that is whole, of which every table is
        for name in store.manifest.pairs:
            assert len(read_pair_table(store, name, "negatives", "data.hard_from")) == 3
        rounds += 1
    for process in writers:
        process.join(60)
        assert process.exitcode == 0
    assert set(read_manifest(shards).pairs) == {"mined", *(name for some in names for name in some)}


def test_a_name_that_is_not_there(shards: Path) -> None:
    with pytest.raises(
        ValueError, match=r"hard_from names 'mined'; expected .* negatives, of which .*shards has none$"
    ):
        read(shards)
    write(shards)
    write(shards, "second")
    write(shards, "teacher", "scores")
    with pytest.raises(
        ValueError,
        match=r"'mind'; did you mean 'mined'\? expected a table of negatives, of which .* mined, second$",
    ):
        read(shards, "mind")
    with pytest.raises(ValueError, match=r"names 'teacher'; that is a table of scores; expected a table of negatives"):
        read(shards, "teacher")


def damaged(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "pairs" / "mined.parquet"
        path.write_bytes(change(path.read_bytes()))

    return damage


def relisted(**columns: Any) -> Callable[[Path], None]:
    """The file with other columns, under the sha256 that it has."""

    def damage(folder: Path) -> None:
        path = folder / "pairs" / "mined.parquet"
        table = pq.read_table(path)
        found = {name: columns.get(name, table[name]) for name in {**dict.fromkeys(table.column_names), **columns}}
        kept = {name: values for name, values in found.items() if values is not None}
        pq.write_table(pa.table(kept).replace_schema_metadata(table.schema.metadata), path)
        list_again(folder)

    return damage


def list_again(folder: Path) -> None:
    record = json.loads((folder / "manifest.json").read_text())
    record["pairs"]["mined"]["sha256"] = hashlib.sha256((folder / "pairs" / "mined.parquet").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(record))


def not_parquet(folder: Path) -> None:
    (folder / "pairs" / "mined.parquet").write_bytes(b"{}")
    list_again(folder)


def half_parquet(folder: Path) -> None:
    path = folder / "pairs" / "mined.parquet"
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)
    path.write_bytes(content)
    list_again(folder)


def twice(folder: Path) -> None:
    path = folder / "pairs" / "mined.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("query", table["query"]), path)
    list_again(folder)


def of_other_shards(folder: Path) -> None:
    path = folder / "pairs" / "mined.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata({"manifest": "f" * 64}), path)
    list_again(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            damaged(lambda content: content[:-1] + b"\0"),
            r"mined.parquet has the sha256 .*, the manifest says .*: it",
        ),
        (lambda folder: (folder / "pairs" / "mined.parquet").unlink(), r"mined.parquet is missing.*write or copy that"),
        (not_parquet, "is no Parquet file"),
        (half_parquet, "is no Parquet file"),
        (twice, "Multiple matches"),
        (relisted(score=pa.array([1, 2, 3])), "has the columns query int64, product int64, score int64; expected"),
        (relisted(score=None), "has the columns query int64, product int64; expected"),
        (relisted(query=pa.array([0, None, 2])), "expected query int64, product int64, score float, without gaps"),
        (
            relisted(product=pa.array([1, 2, 999])),
            "does not belong to these shards: it has the product 999, the",
        ),
        (relisted(product=pa.array([1, 5, 5])), "it has query 2 with product 5 twice"),
        (relisted(product=pa.array([1, 5, 4])), r"its rows are not sorted by \(query, product\)"),
        (relisted(score=pa.array([1, np.nan, 4], pa.float32())), "it has the score nan"),
        (of_other_shards, "it was made for other shards"),
    ],
)
def test_what_is_not_what_the_manifest_says(shards: Path, damage: Callable[[Path], None], message: str) -> None:
    write(shards)
    damage(shards)
    with pytest.raises(ValueError, match=message):
        read(shards)


def test_a_table_of_another_count_of_rows(shards: Path) -> None:
    write(shards)
    record = json.loads((shards / "manifest.json").read_text())
    record["pairs"]["mined"]["rows"] = 4
    (shards / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="it has 3 rows, the manifest says 4"):
        read(shards)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "pairs is .*expected dict"),
        ({"x": {}}, "pairs: x has nothing; expected kind, sha256, rows, made_by"),
        ({"x": {"kind": "other", "sha256": "0" * 64, "rows": 1, "made_by": {}}}, "pairs: x: kind is 'other'"),
        ({"x": {"kind": "scores", "sha256": "../../y", "rows": 1, "made_by": {}}}, r"x has the sha256 '\.\./\.\./y'"),
        ({"../x": {"kind": "scores", "sha256": "0" * 64, "rows": 1, "made_by": {}}}, "is called '../x'"),
    ],
    ids=str,
)
def test_a_manifest_that_lists_nonsense(shards: Path, pairs: Any, message: str) -> None:
    record = json.loads((shards / "manifest.json").read_text())
    (shards / "manifest.json").write_text(json.dumps({**record, "pairs": pairs}))
    with pytest.raises(ValueError, match=message):
        read_manifest(shards)


def test_the_hash_is_that_of_everything_else(shards: Path) -> None:
    manifest = read_manifest(shards)
    table = pair_tables.PairTable("scores", "0" * 64, 1, {})
    assert dataclasses.replace(manifest, pairs={"x": table}).hash == manifest.hash
    assert dataclasses.replace(manifest, name="x").hash != manifest.hash
    again = Manifest.from_json(dataclasses.replace(manifest, pairs={"x": table}).to_json())
    assert again.pairs == {"x": table}


def test_from_a_server_it_comes_once_and_anew_when_it_was_replaced(shards: Path, tmp_path: Path) -> None:
    write(shards)
    cache = tmp_path / "cache"
    with serving(shards) as site:
        for expected in (SCORE, SCORE * 2):
            for _ in range(2):
                store = open_store(site.url, cache=cache)
                found = read_pair_table(store, "mined", "negatives", "data.hard_from")
                assert found.score.tolist() == expected[[1, 2, 0]].tolist()
            assert site.counts["pairs/mined.parquet"] == (1 if expected is SCORE else 2)
            write(shards, score=SCORE * 2, replace=True)
        assert store.manifest.hash == LocalStore(shards).manifest.hash
        path = shards / "pairs" / "mined.parquet"
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
        with pytest.raises(ValueError, match=r"pairs/mined.parquet has the sha256 .* \(downloaded twice\)"):
            read_pair_table(open_store(site.url, cache=tmp_path / "new"), "mined", "negatives", "data.hard_from")
        path.unlink()
        with pytest.raises(ValueError, match=r"pairs/mined.parquet does not exist\. data.hard_from names it"):
            read_pair_table(open_store(site.url, cache=tmp_path / "new"), "mined", "negatives", "data.hard_from")
        with pytest.raises(ValueError, match="names 'x'"):
            read_pair_table(store, "x", "negatives", "data.hard_from")
        with pytest.raises(ValueError, match="expected a plain file name"):
            store.path("pairs/x.parquet")


def test_a_command_gives_it_too(shards: Path, tmp_path: Path) -> None:
    write(shards)
    store = open_store(f"pipe:cat {shards}/{{name}}", cache=tmp_path / "cache", allow_pipe=True)
    assert len(read_pair_table(store, "mined", "negatives", "data.hard_from")) == 3
