"""Gates, hidden photos, exclusive matches and answers: against slow loops, by hand, and in a real run."""

import math
import re
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.catalogue import read_catalogue
from datamodules.importing.writer import write_shards
from datamodules.tuples import TupleDataModule
from mmfusion.batch import Judgments, ProductBatch
from mmfusion.dashboard import exclusive_rows, gate_rows
from mmfusion.fusion import ConcatMLP, MoEBilinear
from mmfusion.outcome import leave
from mmfusion.retrieval.answers import EVERYTHING, LITTLE, MUCH, NONE, answer_slices, stated, words
from mmfusion.retrieval.breakdown import breakdown
from mmfusion.retrieval.collected import Either
from mmfusion.retrieval.evaluation import Evaluation, ViewResult
from mmfusion.retrieval.examination import WITHOUT, Examination, places
from mmfusion.retrieval.exclusive import among, exclusive_matches
from mmfusion.retrieval.gates import entropies, gate_summary
from mmfusion.retrieval.topk import TopK
from tests.datamodules.small import write_rows
from tests.ddp import run_ranks
from tests.mmfusion.retrieval.test_html import Page
from tests.small_run import small_data, small_module, small_shards, small_trainer


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


# ---- a run, from the step to the page --------------------------------------------------------------------------------


def trained(rank: int, world: int, shards: Path, folder: Path, head=MoEBilinear, **options) -> tuple:
    module = small_module(fusion=head, evaluation=Evaluation(depth=100, resamples=20, **options))
    ranks = {"devices": world, "strategy": "ddp"} if world > 1 else {}
    trainer, data = small_trainer(folder, steps=8, **ranks), small_data(shards)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    return module, data


def test_a_run_tells_what_its_head_does(shards, tmp_path):
    module, data = trained(0, 1, shards, tmp_path, stated=["title"])
    (tmp_path / "run").mkdir()
    results = leave(tmp_path / "run", module, data, {"gains": data.gains})
    batch = module.eval() and data.products(np.arange(64))
    with torch.no_grad():
        projected = module.product.project(module.product.encode(batch, {"fused"}))
        gates = module.product.fusion.gates(projected["text"], projected["image"], batch.present)
        photo = data.has_photo()
        for name, weights in gates.items():
            for value, kept in (("present", photo), ("missing", ~photo)):
                cell = results["gates"]["slices"]["photo"][value]
                assert cell["products"] == kept.sum()
                assert cell["mean"][name] == pytest.approx(float(weights[torch.from_numpy(kept)].mean()), abs=1e-5)
    for split in ("val", "test"):
        dropped = results["slices"][split]["photos_dropped"]
        assert list(dropped) == ["0 %", "25 %", "50 %", "100 %"]
        for metric in ("relevance/ndcg@10", "relevance/recall@100", "relevance/mrr"):
            assert dropped["0 %"]["fused"][metric]["value"] == results[split]["fused"][metric]["value"]
        assert "25 %" not in results[split], "no views of their own"
        for hidden in module.dropped[split].values():
            assert [name.rpartition("/")[2] for name in hidden.metrics] == ["ndcg@10", "recall@100", "mrr"]
            assert all(math.isnan(cell["low"]) for cell in hidden.metrics.values()), "a slice draws its own"
        assert {"query_in_text", "relevant_products", "states_title"} <= set(results["slices"][split])
        assert set(results["slices"][split]["states_title"]) <= {"all", "no relevant product"}
        assert results["exclusive"][split]["depths"] == {"fused": 10, "text": 100, "image": 100}
    page = Page(tmp_path / "run" / "report.html")
    said = " ".join(page.written.split())
    assert {"gates", "exclusive"} <= page.ids
    assert re.search(r"\d\.\d of 4 experts are in use over 64 products\.", said)
    assert "score_fusion (weight chosen here)" in " ".join(
        cell for table in page.tables for row in table for cell in row
    )
    bars = [figure for figure in page.data["figures"] if figure["layout"].get("barmode") == "stack"]
    assert len(bars) == 3
    assert all(sum(trace["x"][0] for trace in figure["data"]) == pytest.approx(1) for figure in bars)
    assert len(gate_rows(results["gates"]["slices"])[0]) == 6
    assert all(len(row) == 6 for row in exclusive_rows(results["exclusive"]["test"]))


def test_without_its_photo_a_product_is_what_its_text_makes_it(shards, tmp_path):
    """The view that misses half of the photos, product by product, from a batch that never had them."""
    module, data = trained(0, 1, shards, tmp_path)
    module.eval()
    batch = data.products(np.arange(64))
    examination = Examination(data.product_ids(), [1.0, 0.5])
    assert examination.hidden == ["50 %", "100 %"]
    with torch.no_grad():
        views, gates = module.features.examined(batch, {"text", "fused"}, examination.visible(batch))
        plain = module.features.evaluated(batch, {"text", "fused"})
        assert list(views) == ["text", "fused", WITHOUT]
        lost = examination.hides("50 %", batch.id)
        half = Either(views["fused"], views[WITHOUT], lost)[:]
        assert examination.hides("100 %", batch.id).all()
        assert all(torch.equal(views[name], plain[name]) for name in plain)
        keep = torch.from_numpy(places(data.product_ids()) >= 0.5)
        assert torch.equal(lost, ~keep)
        present = batch.present.clone()
        present[:, 1] &= keep
        blank = torch.where(keep[:, None, None, None], batch.photo, 0)
        poorer = ProductBatch(batch.text, blank, present, batch.id, batch.draw, batch.valid)
        without = module.features.evaluated(poorer, {"fused"})["fused"]
    assert torch.equal(half, without)
    assert torch.equal(half[keep], views["fused"][keep])
    lost = ~keep & batch.present[:, 1]
    assert 10 < int(lost.sum()) < 54
    assert not torch.isclose(half[lost], views["fused"][lost]).all(1).any()
    assert set(gates) == {"expert_0", "expert_1", "expert_2", "expert_3"}


def _told(rank: int, world: int, shards: Path, folder: Path) -> tuple:
    module, _ = trained(rank, world, shards, folder)
    return module.gate_weights, module.dropped["test"]["50 %"].top.ids, module.results["test"]["score_fusion"].metrics


def test_two_ranks_tell_the_same(shards, tmp_path):
    (weights, ids, metrics), (others, other_ids, other_metrics) = run_ranks(_told, 2, shards, tmp_path)
    assert str(metrics) == str(other_metrics)
    assert torch.equal(ids, other_ids)
    for name, of_gate in weights.items():
        assert not np.isnan(of_gate).any(), "every product is on one of the ranks"
        assert np.array_equal(of_gate, others[name])


def test_what_a_head_or_an_option_does_not_give_is_left_out(shards, tmp_path):
    module, data = trained(0, 1, shards, tmp_path, head=ConcatMLP, drop_photos=[], baselines=False)
    results = leave(tmp_path, module, data, {"gains": data.gains})
    assert "gates" not in results
    assert "photos_dropped" not in results["slices"]["test"]
    assert "score_fusion" not in results["test"]
    assert results["run"]["score_fusion_weight"] is None
    for wrong in (0.0, 1.5, -0.1):
        with pytest.raises(ValueError, match=r"drop_photos holds .*; expected above 0"):
            Evaluation(drop_photos=[0.5, wrong])


# ---- hidden photos ---------------------------------------------------------------------------------------------------


def test_photos_are_hidden_by_the_id_alone():
    names = [f"p{i}" for i in range(4000)]
    drawn = places(names)
    assert drawn[17] == int.from_bytes(blake2b(b"p17", digest_size=6).digest()) / 2**48
    assert np.array_equal(places(names[::-1])[::-1], drawn)
    assert drawn.max() < 1
    for fraction in (0.25, 0.5):
        assert abs((drawn < fraction).mean() - fraction) < 4 * math.sqrt(0.25 / 4000)


def test_rows_that_pad_and_products_without_anything_are_not_weighed():
    examination = Examination(["a", "b", "c", "d"], [])
    present = torch.tensor([[True, True], [False, False], [True, False], [True, True]])
    valid = torch.tensor([True, True, True, False])
    none = torch.zeros(4, 3, 0, 0, dtype=torch.uint8)
    batch = ProductBatch([""] * 4, none, present, torch.tensor([3, 0, 1, 2]), torch.zeros(4).long(), valid)
    examination.add({"text": torch.tensor([0.25, 0.5, 1.0, 0.75])}, batch)
    assert examination.weights()["text"].tolist() == pytest.approx([math.nan, 1.0, math.nan, 0.25], nan_ok=True)
    assert examination.hidden == []
    assert examination.visible(batch) == {}


def _weighed(rank: int, world: int) -> tuple:
    """The first rank has no batch of the corpus."""
    examination = Examination(["a", "b"], [])
    if rank:
        ids, none = torch.arange(2), torch.zeros(2, 3, 0, 0, dtype=torch.uint8)
        present = torch.ones(2, 2, dtype=torch.bool)
        batch = ProductBatch([""] * 2, none, present, ids, torch.zeros(2).long(), torch.ones(2, dtype=torch.bool))
        examination.add({"text": torch.tensor([0.25, 0.5])}, batch)
    return {name: values.tolist() for name, values in examination.weights().items()}


@pytest.mark.slow
def test_a_rank_without_a_batch_knows_the_weights():
    assert run_ranks(_weighed, 2) == [{"text": [0.25, 0.5]}] * 2


# ---- entropy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "of_mean", "mean", "in_use"),
    [
        ([[0.25] * 4] * 3, 1.0, 1.0, 4.0),  # all alike, for all products
        ([[1.0, 0, 0, 0]] * 3, 0.0, 0.0, 1.0),  # collapse
        (np.eye(4).tolist(), 1.0, 0.0, 4.0),  # each product has an expert of its own
        ([[0.5, 0.5, 0, 0]] * 2, 0.5, 0.5, 2.0),
        ([[1.0, 0, 0, 0], [0, 1.0, 0, 0]], 0.5, 0.0, 2.0),
    ],
)
def test_entropies_by_hand(rows, of_mean, mean, in_use):
    found = entropies(np.array(rows, float))
    assert found == pytest.approx({"of_mean": of_mean, "mean": mean, "in_use": in_use, "of": 4})


def test_gates_of_no_product_are_no_gates(shards):
    data = small_data(shards)
    data.setup("test")
    of_products = {"category": np.array(["hats"] * 64)}
    assert gate_summary({}, of_products) == {}
    assert gate_summary({"text": np.full(64, np.nan, np.float32)}, of_products) == {}


def test_gates_by_a_column_of_the_catalogue(tmp_path):
    """Every value of the column, as its products are found by their ids; what is left out of the weights, nowhere."""
    kinds = {f"p{i}": ("hats", "cups", "")[i % 3] for i in range(12)}
    rows = [[p, f"a {kind}", kind, "", ""] for p, kind in kinds.items()]
    write_rows(tmp_path / "products.csv", ["product_id", "title", "kind", "photo", "image"], rows)
    queries = [["q0", "hats", "train"], ["q1", "cups", "val"], ["q2", "a cup", "test"]]
    write_rows(tmp_path / "queries.csv", ["query_id", "query", "split"], queries)
    judged = [["q0", "p0", "E"], ["q1", "p1", "E"], ["q2", "p4", "E"]]
    write_rows(tmp_path / "judgments.csv", ["query_id", "product_id", "label"], judged)
    write_shards(read_catalogue(tmp_path, max_shared_queries=1.0), tmp_path / "shards")
    data = TupleDataModule(str(tmp_path / "shards"))
    data.setup("test")
    text = np.arange(1, 13, dtype=np.float32) / 16
    text[3] = np.nan
    weights, shown = {"text": text, "image": 1 - text}, Evaluation(slices=["kind"], resamples=5)
    found = breakdown({}, data, shown, [], weights=weights)["gates"]["slices"]
    assert set(found) == {"all", "train_positives", "text_words", "photo", "kind"}
    ids = data.product_ids()
    for value, kind in (("hats", "hats"), ("cups", "cups"), ("(none)", "")):
        own = [float(text[at]) for at, name in enumerate(ids) if kinds[name] == kind and not np.isnan(text[at])]
        cell = found["kind"][value]
        assert cell["products"] == len(own)
        assert cell["mean"] == pytest.approx({"text": np.mean(own), "image": 1 - np.mean(own)})
        assert cell["std"]["text"] == pytest.approx(np.std(own))
    assert sum(cell["products"] for cell in found["kind"].values()) == found["all"]["all"]["products"] == 11


# ---- exclusive matches -----------------------------------------------------------------------------------------------


def result(ids: np.ndarray, query_ids: np.ndarray) -> ViewResult:
    return ViewResult(query_ids, TopK(torch.zeros(ids.shape), torch.from_numpy(ids)))


@pytest.mark.parametrize("depth", [150, 20])
def test_exclusive_matches_are_the_slow_loop(depth):
    draw, query_ids = np.random.default_rng(0), np.arange(5, 25)
    ids = {view: np.stack([draw.permutation(300)[:150] for _ in query_ids]) for view in ("text", "image", "fused")}
    ids["fused"][0, 6:] = -1
    query, product = np.divmod(np.sort(draw.permutation(30 * 300)[:2000]), 300)
    gain = draw.choice([1.0, 0.1, 0.0], 2000)
    judgments = Judgments(query, product, {"r": gain}, {"r": 1.0}, "unknown", {"r": {"E": 1.0, "S": 0.1, "I": 0.0}})
    gains = dict(zip(zip(query.tolist(), product.tolist(), strict=True), gain.tolist(), strict=True))
    views = {view: result(of_view, query_ids) for view, of_view in ids.items()}
    found = exclusive_matches(views, judgments, Evaluation(metrics=["ndcg@10"], depth=depth, resamples=10))
    names, beyond = {1.0: "E", 0.1: "S", 0.0: "I", None: "unjudged"}, min(100, depth)
    only, every, relevant = [], [], {}
    for row, asked in enumerate(query_ids.tolist()):
        for each in ids["fused"][row, :10].tolist():
            if each < 0:
                continue
            every.append(names[gains.get((asked, each))])
            if each not in ids["text"][row, :beyond] and each not in ids["image"][row, :beyond]:
                only.append(every[-1])
                relevant[asked] = relevant.get(asked, 0) + (every[-1] == "E")
    assert found["products"] == len(only) > 20
    assert found["per_query"]["value"] == pytest.approx(len(only) / len(query_ids))
    assert found["depths"] == {"fused": 10, "text": beyond, "image": beyond}
    for label, shares in found["labels"]["r"].items():
        assert shares["exclusive"] == pytest.approx(only.count(label) / len(only))
        assert shares["first"] == pytest.approx(every.count(label) / len(every))
    assert [relevant[query] for query in found["most"]] == sorted(relevant.values(), reverse=True)[: len(found["most"])]
    assert exclusive_matches({"text": views["text"]}, judgments, Evaluation()) == {}


def test_labels_that_are_numbers_are_relevant_or_not():
    one = result(np.array([[0, 1, 2]]), np.array([0]))
    none = result(np.array([[-1, -1, -1]]), np.array([0]))
    judgments = Judgments(np.zeros(2, int), np.array([0, 1]), {"r": np.array([3.0, 0.5])}, {"r": 1.0}, "unknown")
    views = {"text": none, "image": none, "fused": one}
    found = exclusive_matches(views, judgments, Evaluation(resamples=5))
    third = {"exclusive": pytest.approx(1 / 3), "first": pytest.approx(1 / 3)}
    assert found["labels"]["r"] == {"relevant": third, "not relevant": third, "unjudged": third}
    assert found["most"] == [0]


def test_among_knows_whose_list_it_is():
    assert among(np.array([[1, 2], [1, -1]]), np.array([[2, -1], [3, 1]])).tolist() == [[False, True], [True, False]]


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_queries_by_what_their_answers_say():
    queries = ["red shirts", "Blue Shirt", "green", "red green blue shirt", "nothing relevant"]
    products = ["Red shirt, size 3", "shirt", "blues", "blue", ""]
    query = np.array([0, 1, 1, 2, 3, 4])
    product = np.array([0, 1, 3, 4, 1, 0])
    gain = {"r": np.array([1.0, 1, 1, 1, 1, 0.1])}
    judgments, ids = Judgments(query, product, gain, {"r": 1.0}, "irrelevant"), np.array([4, 3, 2, 1, 0])
    found = answer_slices(queries[::-1], products, ids, judgments, {})
    assert found["query_in_text"].tolist() == ["no relevant product", LITTLE, NONE, MUCH, EVERYTHING]
    assert found["relevant_products"].tolist() == ["0", *["1-4 (tail)"] * 4]
    shares = stated(queries[::-1], products, 4 - query[:5], product[:5])
    assert shares.tolist() == pytest.approx([math.nan, 0.25, 0.0, 0.5, 1.0], nan_ok=True)


def test_queries_of_other_splits_do_not_count():
    query, product = np.array([0, 1, 2, 2, 7]), np.array([0, 0, 0, 1, 1])
    judgments = Judgments(query, product, {"r": np.ones(5)}, {"r": 1.0}, "unknown")
    found = answer_slices(["c"], ["a", "c"], np.array([2]), judgments, {"is": np.array(["c", "c"])})
    assert {name: values.tolist() for name, values in found.items()} == {
        "query_in_text": [MUCH],
        "relevant_products": ["1-4 (tail)"],
        "states_is": ["some"],
    }


def test_queries_by_whether_texts_state_a_column():
    """Navy Blue is stated by both words; a product without a value, one that is not relevant, tells nothing."""
    titles = ["Navy blue shirts", "blue shirt", "red shirt", "shirt", "shirt, reds"]
    colours = np.array(["Navy Blue", "Navy Blue", "Red", "", "red"], dtype=np.dtypes.StringDType())
    relevant = {0: [0, 2], 1: [0, 1], 2: [1], 3: [3], 4: [0, 3], 5: [4], 6: []}
    pairs = [(query, product, 1.0) for query, products in relevant.items() for product in products]
    pairs += [(2, 0, 0.1), (6, 0, 0.1)]
    query, product, gain = (np.array(column) for column in zip(*sorted(pairs), strict=True))
    judgments = Judgments(query, product, {"r": gain}, {"r": 1.0}, "unknown")
    ids = np.arange(7)
    found = answer_slices(["shirt"] * 7, titles, ids, judgments, {"colour": colours})["states_colour"]
    assert found.tolist() == ["all", "some", "none", "(none has a value)", "all", "all", "no relevant product"]


def test_words():
    assert words("Women's  T-Shirts, XS bus") == {"women", "s", "t", "shirt", "xs", "bus"}
