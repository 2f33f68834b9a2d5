import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmfusion.study.finished import load
from mmfusion.study.results import Results, read_study
from tests.mmfusion.study.drawn_runs import METRICS, draw_arm, draw_run, study_of

NDCG = METRICS[0]
TEXT = """
reference: moe
variants: {sparse: ["--a=1"], full: []}
arms:
  bm25: {row_of: moe, view: bm25}
  image_only: {once: true}
  gated: {variants: [sparse]}
  moe: {}
"""


def results_of(folder: Path, text: str = TEXT) -> Results:
    return read_study(folder / "runs", study_of(folder, text))


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """Two variants, three seeds; image_only on the first variant alone."""
    draw_arm(tmp_path / "runs", "moe", 0.6, ("sparse", "full"))
    draw_arm(tmp_path / "runs", "gated", 0.5, ("sparse",))
    for seed in (1, 2, 3):
        draw_run(tmp_path / "runs" / "image_only" / f"sparse-{seed}", {"image": 0.4})
    return tmp_path


def test_every_arm_variant_and_seed(whole: Path) -> None:
    results = results_of(whole)
    assert (results.seeds, results.split, results.metric) == ([1, 2, 3], "test", NDCG)
    assert {variant: list(rows) for variant, rows in results.rows.items()} == {
        "sparse": ["bm25", "image_only", "gated", "moe"],
        "full": ["bm25", "image_only", "moe"],
    }
    assert not any(row.missing for row in results.all_rows())
    views = {row.arm: row.view for row in results.all_rows()}
    assert views == {"bm25": "bm25", "image_only": "image", "gated": "fused", "moe": "fused"}


def test_a_mean_is_that_of_the_tables(whole: Path) -> None:
    """And of a run that counts for all variants, the same in each."""
    results = results_of(whole)
    tables = [pq.read_table(whole / "runs" / "moe" / f"full-{seed}" / "per_query.parquet") for seed in (1, 2, 3)]
    rows = [row for table in tables for row in table.to_pylist() if (row["split"], row["view"]) == ("test", "fused")]
    found = results.rows["full"]["moe"].mean("test", NDCG)
    assert found is not None
    assert found.mean == pytest.approx(np.mean([row[NDCG] for row in rows]))
    assert (found.seeds, found.queries, found.over) == (3, 200, "queries and seeds")
    assert np.mean(list(results.rows["full"]["moe"].by_seed("test", NDCG).values())) == pytest.approx(found.mean)
    image = [results.rows[variant]["image_only"].mean("test", NDCG) for variant in ("sparse", "full")]
    assert image[0] == image[1]


def test_differences_are_paired_by_query_id_and_seed(whole: Path) -> None:
    """Rows of a table in another order change nothing."""
    rows = results_of(whole).rows["sparse"]
    before = rows["moe"].less(rows["gated"], "test", NDCG)
    assert before is not None
    assert before.mean == pytest.approx(0.1, abs=0.005)
    assert before.high - before.low < 0.01  # what makes a query hard is in both
    for seed in (1, 3):
        path = whole / "runs" / "gated" / f"sparse-{seed}" / "per_query.parquet"
        table = pq.read_table(path)
        pq.write_table(table.take(pa.array(np.random.default_rng(0).permutation(len(table)))), path)
    rows = results_of(whole).rows["sparse"]
    after = rows["moe"].less(rows["gated"], "test", NDCG)
    assert after is not None
    assert (after.mean, after.p) == pytest.approx((before.mean, before.p))


def test_a_query_without_a_value_in_one_run_is_left_out(whole: Path) -> None:
    path = whole / "runs" / "gated" / "sparse-2" / "per_query.parquet"
    table = pq.read_table(path)
    values = [
        None if id == "q7" else value
        for id, value in zip(table["query_id"].to_pylist(), table[NDCG].to_pylist(), strict=True)
    ]
    place = table.column_names.index(NDCG)
    pq.write_table(table.set_column(place, NDCG, pa.array(values, pa.float64())), path)
    rows = results_of(whole).rows["sparse"]
    found = rows["moe"].less(rows["gated"], "test", NDCG)
    assert found is not None
    assert (found.queries, found.left_out) == (199, 1)


def test_what_is_not_there_is_listed_with_its_reason(whole: Path) -> None:
    runs = whole / "runs"
    (runs / "gated" / "sparse-1" / "results.json").unlink()
    (runs / "gated" / "sparse-2" / "results.json").write_text("{")
    for path in (runs / "moe" / "full-3").iterdir():
        path.unlink()
    (runs / "jobs.json").write_text(json.dumps({
        "moe/full-3": {"state": "failed", "rc": 1, "tail": ["Traceback", "ValueError: no room"]},
    }))  # fmt: skip
    (runs / "study.json").write_text(json.dumps({"seeds": [1, 2, 3, 4]}))
    rows = results_of(whole).rows
    gated = rows["sparse"]["gated"]
    assert list(gated.runs) == [3]
    assert gated.missing[1] == "was stopped before its end"
    assert "is not JSON" in gated.missing[2]
    assert gated.missing[4] == "was not trained yet"
    failed = "failed with exit code 1: ValueError: no room"
    assert rows["full"]["moe"].missing[3] == rows["full"]["bm25"].missing[3] == failed
    difference = rows["sparse"]["moe"].less(gated, "test", NDCG)
    assert difference is not None
    assert (difference.seeds, difference.over) == (1, "queries")


def test_runs_on_other_data_do_not_count(whole: Path) -> None:
    draw_run(whole / "runs" / "gated" / "sparse-4", {"fused": 0.9}, manifest="other")
    draw_run(whole / "runs" / "gated" / "sparse-5", {"fused": 0.9}, evaluation={"depth": 10})
    gated = results_of(whole).rows["sparse"]["gated"]
    assert list(gated.runs) == [1, 2, 3]
    assert "manifest is other, of" in gated.missing[4]
    assert "depth is 10, of" in gated.missing[5]


def test_a_view_and_a_metric_that_a_run_lacks(tmp_path: Path) -> None:
    draw_run(tmp_path / "runs" / "moe" / "all-1", {"fused": 0.5})
    rows = results_of(tmp_path, "{reference: moe, arms: {moe: {}, bm25: {row_of: moe, view: bm25}}}").rows["all"]
    assert rows["bm25"].missing == {1: "its results have no bm25, only fused"}
    rows = results_of(tmp_path, "{reference: moe, metric: relevance/map, arms: {moe: {}}}").rows["all"]
    assert "evaluated without relevance/map on test" in rows["moe"].missing[1]


def test_nothing_there_yet(tmp_path: Path) -> None:
    results = results_of(tmp_path)
    assert (results.seeds, results.metric) == ([], "relevance/ndcg@10")
    assert all(row.mean("test", NDCG) is None for row in results.all_rows())
    assert load(tmp_path) is None


def test_seeds_of_a_variant_whose_name_begins_another(tmp_path: Path) -> None:
    """`full-1` is a variant here, and `full-1-2` its second seed: no seed of `full`."""
    draw_run(tmp_path / "runs" / "moe" / "full-1-2", {"fused": 0.5})
    results = results_of(tmp_path, '{reference: moe, variants: {full: [], full-1: ["--a=1"]}, arms: {moe: {}}}')
    assert results.seeds == [2]
    assert results.rows["full"]["moe"].missing == {2: "was not trained yet"}
    assert list(results.rows["full-1"]["moe"].runs) == [2]
