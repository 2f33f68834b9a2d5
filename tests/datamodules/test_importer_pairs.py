"""Scores and negatives of others, by the catalogue's own ids: dense ids beside shards, or a mistake named by row."""

import hashlib
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.importers import pairs
from datamodules.importers.pairs import Negatives, Scores
from datamodules.manifest import read_manifest
from datamodules.pair_tables import read_pair_table
from mmfusion.cli import main
from tests.datamodules.small import convert, small_catalogue, write_rows

HEADER = ("query_id", "product_id", "score")
ROWS = [("q3", "p10", "-1.5"), ("q0", "p63", "0"), ("q3", "p2", "2e3"), ("q2", "p10", "0.25")]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    convert(str(small_catalogue(folder / "catalogue")), str(folder / "shards"))
    return folder / "shards"


@pytest.fixture
def src(tmp_path: Path) -> Path:
    path = tmp_path / "Teacher v2.csv"
    write_rows(path, HEADER, ROWS)
    return path


def own_ids(shards: Path, name: str) -> list[tuple[str, str, float]]:
    """A table with the catalogue's own ids, looked up row by row."""
    table = pq.read_table(shards / "pairs" / f"{name}.parquet")
    queries = pq.read_table(shards / "queries.parquet")["query_id"].to_pylist()
    products = pq.read_table(shards / "index.parquet")["product_id"].to_pylist()
    found = [(queries[row["query"]], products[row["product"]], row["score"]) for row in table.to_pylist()]
    dense = list(zip(table["query"].to_pylist(), table["product"].to_pylist(), strict=True))
    assert dense == sorted(dense)
    return found


def numbers(rows: Sequence[Sequence[Any]]) -> list[tuple[str, str, float]]:
    return sorted((q, p, float(np.float32(score))) for q, p, score in rows)


def test_scores_from_the_command(shards, src, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["mmfusion", "data", "--from", "scores", f"--src={src}", f"--out={shards}"])
    before = read_manifest(shards).hash
    main()
    said = capfd.readouterr().out.splitlines()
    assert said[-2:] == ["4 pairs of 3 queries, 3 of them in train", f"scores: {shards}/pairs/teacher-v2.parquet"]
    assert sorted(own_ids(shards, "teacher-v2")) == numbers(ROWS)
    manifest = read_manifest(shards)
    table = manifest.pairs["teacher-v2"]
    assert (table.kind, table.rows, manifest.hash) == ("scores", 4, before)
    assert table.made_by == {
        "importer": "scores", "file": "Teacher v2.csv", "rows": 4,
        "sha256": hashlib.sha256(src.read_bytes()).hexdigest(),
    }  # fmt: skip
    assert len(read_pair_table(shards, "teacher-v2", "scores", "data.scores")) == 4


@pytest.mark.parametrize("scored", [True, False])
def test_negatives_have_a_score_or_none(shards, tmp_path, scored):
    path, width = tmp_path / "bad.csv", 3 if scored else 2
    write_rows(path, HEADER[:width], [row[:width] for row in ROWS])
    Negatives(src=str(path), out=str(shards), name=f"bad-{scored:d}").run()
    expected = ROWS if scored else [(q, p, 0) for q, p, _ in ROWS]
    assert sorted(own_ids(shards, f"bad-{scored:d}")) == numbers(expected)
    assert read_manifest(shards).pairs[f"bad-{scored:d}"].kind == "negatives"


@pytest.mark.parametrize("kind", [pa.float64(), pa.float16(), pa.int32(), pa.string()])
def test_parquet_of_any_numbers(shards, tmp_path, kind):
    rows = [(q, p, int(float(score) * 4)) for q, p, score in ROWS]
    table = pa.table({
        "product_id": [p for _, p, _ in rows], "query_id": [q for q, _, _ in rows], "rank": [1, 2, 3, 4],
        "score": pa.array([s for *_, s in rows]).cast(pa.float64()).cast(kind),
    })  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet")
    Scores(src=str(tmp_path / "a.parquet"), out=str(shards), name=f"of-{kind}").run()
    assert sorted(own_ids(shards, f"of-{kind}")) == numbers(rows)


def test_many_rows_in_small_pieces(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "ROWS", 100)
    monkeypatch.setattr("datamodules.importing.tables.ROWS", 64)
    rows = [(f"q{q}", f"p{p}", q - p / 64) for q in range(15, -1, -1) for p in range(64)]
    columns = list(zip(*rows, strict=True))
    pq.write_table(pa.table(dict(zip(HEADER, map(list, columns), strict=True))), tmp_path / "many.parquet")
    Scores(src=str(tmp_path / "many.parquet"), out=str(shards)).run()
    assert sorted(own_ids(shards, "many")) == numbers(rows)
    monkeypatch.setattr(pairs, "ROWS", 7)
    rows[1000] = ("q1", "nothing", 0.0)
    pq.write_table(pa.table(dict(zip(HEADER, map(list, zip(*rows, strict=True)), strict=True))), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="row 1001: product_id 'nothing'"):
        Scores(src=str(tmp_path / "b.parquet"), out=str(shards)).run()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("q3", "p1", "1"), ("q77", "p1", "1")], "row 2 (line 3): query_id 'q77' is none of this catalogue's 16"),
        ([("q3", "p01", "1")], "row 1 (line 2): product_id 'p01' is none of this catalogue's 64"),
        ([("q3", "", "1")], "row 1 (line 2): product_id '' is none"),
        ([("q3", "p1", "1"), ("q3", "p2", "nan")], "row 2 (line 3): the score is 'nan'; expected a finite number"),
        ([("q3", "p1", "1"), ("q3", "p2", "high")], "row 2 (line 3): the score is 'high'"),
        ([("q3", "p1", "")], "row 1 (line 2): the score is ''"),
        ([("q3", "p1", "1e39")], "row 1 (line 2): the score is '1e39'"),
        (
            [("q3", "p1", "1"), ("q2", "p1", "1"), ("q3", "p1", "1")],
            "row 3 (line 4): the same query and product as in row 1 (line 2); a pair is listed once",
        ),
        ([], "has no rows"),
    ],
)
def test_a_mistake_is_named_by_its_row_and_writes_nothing(shards, tmp_path, rows, said):
    path = tmp_path / "wrong.csv"
    write_rows(path, HEADER, rows)
    before = (shards / "manifest.json").read_bytes()
    for kind in (Scores, Negatives):
        with pytest.raises(ValueError, match=re.escape(said)) as error:
            kind(src=str(path), out=str(shards)).run()
        assert str(path) in str(error.value)
    assert (shards / "manifest.json").read_bytes() == before
    assert not (shards / "pairs" / "wrong.parquet").exists()


def test_a_null_score_is_named(shards, tmp_path):
    table = pa.table({"query_id": ["q1", "q1"], "product_id": ["p1", "p2"], "score": [0.5, None]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="row 2: the score is None"):
        Scores(src=str(tmp_path / "a.parquet"), out=str(shards)).run()


def test_wrong_places_and_names(shards, src, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv is no file"):
        Scores(src="nowhere.csv", out=str(shards)).run()
    with pytest.raises(ValueError, match="It looks like a catalogue that is not imported yet"):
        Scores(src=str(src), out=str(shards.parent / "catalogue")).run()
    with pytest.raises(ValueError, match="Upper"):
        Scores(src=str(src), out=str(shards), name="Upper").run()
    write_rows(tmp_path / "unscored.csv", HEADER[:2], [row[:2] for row in ROWS])
    with pytest.raises(ValueError, match="no column 'score'"):
        Scores(src=str(tmp_path / "unscored.csv"), out=str(shards)).run()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Upper", "NAME=Upper: a table of pairs is called 'Upper'; expected lower-case letters"),
        ("judged", "NAME=judged: 'judged' is a label column or another source"),
        ("relevance", "NAME=relevance: 'relevance' is a label column"),
        ("", "NAME=: a table of pairs is called ''"),
        (None, r"SRC=.* gives the table the name '': .*Choose a name by NAME=\.\.\. \(--name\)"),
    ],
)
def test_a_bad_name_is_told_before_the_file_is_read(shards, tmp_path, name, said):
    path = tmp_path / "点.csv"
    path.write_text("no table at all")
    with pytest.raises(ValueError, match=said):
        Scores(src=str(path), out=str(shards), name=name).run()


def test_the_command_replaces(shards, src, monkeypatch, capfd):
    command = ["mmfusion", "data", "--from=negatives", f"--src={src}", f"--out={shards}", "--name=old"]
    monkeypatch.setattr(sys, "argv", command)
    main()
    write_rows(src, HEADER, ROWS[:2])
    with pytest.raises(SystemExit):
        main()
    assert "choose another name, or replace it (--replace)" in capfd.readouterr().err
    assert len(read_pair_table(shards, "old", "negatives", "data.hard_from")) == 4
    monkeypatch.setattr(sys, "argv", [*command, "--replace"])
    main()
    assert len(read_pair_table(shards, "old", "negatives", "data.hard_from")) == 2


@pytest.mark.parametrize(("kind", "usage"), [("scores", "SRC=file OUT=shards"), ("catalogue", "SRC=folder OUT=folder")])
def test_what_is_missing_is_told_with_an_example(monkeypatch, capfd, kind, usage):
    monkeypatch.setattr(sys, "argv", ["mmfusion", "data", "--from", kind, "--src=", "--out="])
    with pytest.raises(SystemExit):
        main()
    assert f"make data FROM={kind} needs SRC and OUT: make data FROM={kind} {usage}" in capfd.readouterr().err


def test_make_hands_the_name_on():
    made = subprocess.run(
        ["make", "-n", "--no-print-directory", "-o", "setup", "data", "FROM=scores", "SRC=a.csv", "OUT=b",
         "NAME=teacher", "ARGS=--replace"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shlex.split(made.stdout.splitlines()[-1])[1:] == [
        "data", "--from", "scores", "--src=a.csv", "--out=b", "--name=teacher", "--replace"
    ]  # fmt: skip


def test_the_same_again_is_fine_and_other_content_is_not(shards, src):
    first = Scores(src=str(src), out=str(shards), name="again").run()
    content = first.read_bytes()
    assert Scores(src=str(src), out=str(shards), name="again").run() == first
    write_rows(src, HEADER, ROWS[:2])
    with pytest.raises(ValueError, match="exists with other content"):
        Scores(src=str(src), out=str(shards), name="again").run()
    assert first.read_bytes() == content
