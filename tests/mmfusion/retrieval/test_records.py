"""Tables of a run folder and the breakdown of its numbers, from real shards and hand-made rankings."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.tuples import TupleDataModule
from mmfusion.retrieval import records
from mmfusion.retrieval.breakdown import breakdown
from mmfusion.retrieval.evaluation import BASELINES, Evaluation, ViewResult, add_baselines, measured
from mmfusion.retrieval.ranking import Ranking
from mmfusion.retrieval.report import write_results
from mmfusion.retrieval.topk import TopK, tie_ranks
from tests.datamodules.small import convert, small_catalogue
from tests.ddp import run_ranks
from tests.small_run import small_data, small_shards

OPTIONS = Evaluation(depth=20, metrics=["ndcg@10", "recall@20", "mrr", "share@10"], resamples=50)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


def opened(shards: Path) -> TupleDataModule:
    data = small_data(shards)
    data.setup("test")
    return data


def drawn_results(data: TupleDataModule) -> dict[str, dict[str, ViewResult]]:
    """Views text and fused of val and test: products in an order of their own, scores of both signs."""
    results: dict[str, dict[str, ViewResult]] = {}
    for seed, split in enumerate(("val", "test")):
        queries = data.shards.queries.of(split)
        for shift, view in enumerate(("text", "fused")):
            draw = np.random.default_rng(seed * 10 + shift)
            ids = np.stack([draw.permutation(64)[:20] for _ in queries])
            scores = torch.linspace(1, -1, 20).expand(len(queries), 20).contiguous()
            ranking = Ranking(queries, TopK(scores, torch.from_numpy(ids)))
            results.setdefault(split, {})[view] = measured(ranking, data.judgments(split), OPTIONS)
    return results


def test_what_is_written_is_what_was_measured(shards, tmp_path):
    data = opened(shards)
    results = drawn_results(data)
    write_results(tmp_path / "results.json", {"test": {}, "run": {}})
    records.write(tmp_path, results, "fused", data, photos_mib=1)
    found = records.read(tmp_path)
    rows = found.per_query.to_pylist()
    assert len(rows) == 2 * sum(len(views["text"].query_ids) for views in results.values())
    for row in rows:
        result = results[row["split"]][row["view"]]
        (place,) = [i for i, query in enumerate(data.query_ids(result.query_ids)) if query == row["query_id"]]
        assert row["query"] == data.query_texts(result.query_ids[[place]])[0]
        for name, values in result.per_query.items():
            assert row[name] == (None if np.isnan(values[place]) else values[place])
    labels = {(q, p): "E" if g == 1 else "S" for q, p, g in _judged(data)}
    titles = {row["product_id"]: row["title"] for row in found.products.to_pylist()}
    for row in found.rankings.to_pylist():
        result = results[row["split"]][row["view"]]
        place = data.query_ids(result.query_ids).index(row["query_id"])
        assert row["product_id"] == data.product_ids()[result.top.ids[place, row["rank"] - 1]]
        assert row["score"] == pytest.approx(float(result.top.scores[place, row["rank"] - 1]))
        label = labels.get((row["query_id"], row["product_id"]), "I")
        assert row["label/relevance"] == label, "an unlisted pair of val and test is irrelevant"
        assert row["gain/relevance"] == {"E": 1, "S": 0.1, "I": 0}[label]
        assert row["product_id"] in titles
    assert found.rankings.num_rows == 10 * len(rows)


def _judged(data: TupleDataModule) -> list[tuple[str, str, float]]:
    judged = [data.judgments(split) for split in ("val", "test")]
    products = data.product_ids()
    return [
        (query, products[product], gain)
        for some in judged
        for query, product, gain in zip(data.query_ids(some.query), some.product, some.gain["relevance"], strict=True)
    ]


def test_photos_are_small_and_products_without_one_are_known(shards, tmp_path):
    data = opened(shards)
    write_results(tmp_path / "results.json", {})
    with_photo = dict(zip(data.product_ids(), data.has_photo().tolist(), strict=True))
    assert set(with_photo.values()) == {True, False}
    for mib in (0.0, 1.0):
        records.write(tmp_path, drawn_results(data), "fused", data, photos_mib=mib)
        rows = records.read(tmp_path).products.to_pylist()
        assert [row["has_photo"] for row in rows] == [with_photo[row["product_id"]] for row in rows]
        assert [row["photo"] is not None for row in rows] == [mib > 0 and row["has_photo"] for row in rows]
    assert max(Image.open(io.BytesIO(row["photo"])).size[0] for row in rows if row["photo"]) <= records.PHOTO_SIDE


def test_photos_stop_at_the_one_that_would_exceed_their_room(shards, tmp_path):
    data = opened(shards)
    write_results(tmp_path / "results.json", {})
    records.write(tmp_path, drawn_results(data), "fused", data, photos_mib=1)
    sizes = [len(row["photo"] or b"") for row in records.read(tmp_path).products.to_pylist()]
    some = int(np.flatnonzero(sizes)[7])
    for room, kept in ((sum(sizes[: some + 1]), 8), (sum(sizes[: some + 1]) - 1, 7)):
        records.write(tmp_path, drawn_results(data), "fused", data, photos_mib=room / 2**20)
        found = [len(row["photo"] or b"") for row in records.read(tmp_path).products.to_pylist()]
        assert np.count_nonzero(found) == kept
        assert sum(found) <= room
        assert found[:some] == sizes[:some]


def test_labels_worth_the_same_are_shown_as_one(tmp_path):
    gains = {"relevance": {"E": 1.0, "S": 0.0, "I": 0.0}}
    convert(str(small_catalogue(tmp_path / "catalogue")), str(tmp_path / "shards"), gains=gains)
    data = opened(tmp_path / "shards")
    results = drawn_results(data)
    write_results(tmp_path / "results.json", {})
    records.write(tmp_path, results, "fused", data, photos_mib=0)
    found = records.read(tmp_path)
    assert set(found.rankings["label/relevance"].to_pylist()) == {"E", "S+I"}
    shown = [row for row in found.rankings.to_pylist() if row["split"] == "test" and row["view"] == "text"]
    share = np.mean([row["label/relevance"] == "S+I" for row in shown])
    assert results["test"]["text"].metrics["relevance/share_s+i@10"]["value"] == pytest.approx(share)


def test_an_incomplete_folder_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"has no results\.json, per_query\.parquet.*make eval"):
        records.read(tmp_path)


def test_breakdown(shards):
    data = opened(shards)
    results = drawn_results(data)
    options = dataclasses.replace(OPTIONS, slices=["title"])
    found = breakdown(results, data, options, ["text", "fused", "bm25"])
    by_words = found["slices"]["test"]["query_words"]
    assert list(by_words) == ["2"], "all queries are a colour and a type"
    cell = by_words["2"]["fused"]["relevance/ndcg@10"]
    assert cell["value"] == pytest.approx(results["test"]["fused"].metrics["relevance/ndcg@10"]["value"])
    assert cell["queries"] == len(results["test"]["fused"].query_ids)
    assert set(found["slices"]["test"]["photo"]) == {"present", "missing"}
    assert "title" in found["slices"]["val"]
    bins = found["calibration"]["test"]["fused"]
    assert sum(bin["pairs"] for bin in bins) == 20 * cell["queries"], "every unlisted pair is known to be irrelevant"
    with pytest.raises(ValueError, match="tittle"):
        breakdown(results, data, dataclasses.replace(OPTIONS, slices=["tittle"]), ["text"])


def _with_baselines(rank: int, world: int, shards: Path) -> tuple[float | None, dict]:
    data = opened(shards)
    results = drawn_results(data)
    weight = add_baselines(results, "fused", data, tie_ranks(data.product_ids()), OPTIONS, None)
    return weight, {
        (split, view): (result.top.ids.tolist(), result.metrics)
        for split, views in results.items()
        for view, result in views.items()
    }


def test_baselines_stand_beside_the_views_on_any_number_of_ranks(shards):
    weight, alone = _with_baselines(0, 1, shards)
    assert [view for split, view in alone if split == "test"] == ["text", "fused", *BASELINES]
    assert 0 <= weight <= 1
    assert alone["test", "hybrid_sum"][1]["relevance/ndcg@10"]["value"] > 0
    for found, lists in run_ranks(_with_baselines, 2, shards):
        assert found == weight
        assert str(lists) == str(alone), "str: NaN is not equal to itself"


def test_without_val_the_weight_is_the_one_given_or_the_row_is_left_out(shards):
    data = opened(shards)
    tie = tie_ranks(data.product_ids())
    for given in (None, 0.25):
        results = {"test": drawn_results(data)["test"]}
        assert add_baselines(results, "fused", data, tie, OPTIONS, given) == given
        assert ("hybrid_sum" in results["test"]) == (given is not None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metrics": ["ndgc@10"]}, "ndcg"),
        ({"metrics": ["recall@2000"]}, "2000"),
        ({"metrics": ["share"]}, "depth"),
        ({"metrics": ["share@many"]}, "depth"),
        ({"metrics": ["share@5000"]}, "5000"),
        ({"depth": 0}, "depth"),
        ({"resamples": 0}, "resamples"),
        ({"photos_mib": -1.0}, "photos_mib"),
    ],
)
def test_options_are_refused_when_they_are_read(options, said):
    with pytest.raises(ValueError, match=said):
        Evaluation(**options)
