"""The weighted sum of two views' scores: against numpy over the whole corpus, and the views themselves at its ends."""

import numpy as np
import pytest
import torch

from mmfusion.batch import Judgments
from mmfusion.retrieval import score_fusion
from mmfusion.retrieval.baselines import GRID
from mmfusion.retrieval.evaluation import Evaluation, mean_ndcg, measured
from mmfusion.retrieval.ranking import Rows, rank_corpus
from mmfusion.retrieval.score_fusion import SideBySide, add_score_fusion, choose
from mmfusion.retrieval.topk import TopK, tie_ranks
from mmfusion.retrieval.vectors import write_vectors
from tests.ddp import run_ranks

QUERIES, PRODUCTS, DIM = 30, 400, 8
OPTIONS = Evaluation(metrics=["ndcg@10", "mrr"], depth=50, resamples=10)
TIE = tie_ranks([f"{i}" for i in range(PRODUCTS)])


def drawn(seed: int) -> Judgments:
    draw = np.random.default_rng(seed)
    query, product = np.nonzero(draw.random((QUERIES, PRODUCTS)) < 0.05)
    return Judgments(query, product, {"r": draw.choice([1.0, 0.1], len(query))}, {"r": 1.0}, "irrelevant")


JUDGED = {"val": drawn(3), "test": drawn(4)}


def unit(rows: int, seed: int) -> torch.Tensor:
    found = torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(found, dim=1)


def vectors() -> tuple[dict[str, Rows], dict[str, Rows]]:
    """Two views, of which text lacks some products, and queries that are near relevant products in both."""
    text, image = unit(PRODUCTS, 1), unit(PRODUCTS, 2)
    text[::7] = 0
    ids = torch.arange(PRODUCTS)
    queries = {}
    for split in ("val", "test"):
        judgments, asked = JUDGED[split], unit(QUERIES, 3) / 3
        for query, product, gain in zip(judgments.query, judgments.product, judgments.gain["r"], strict=True):
            asked[query] += (0.3 * text[product] + 0.5 * image[product]) * (gain == 1)
        queries[split] = Rows(torch.nn.functional.normalize(asked, dim=1), torch.arange(QUERIES))
    return {"text": Rows(text, ids), "image": Rows(image, ids)}, queries


def of_views(corpus: dict[str, Rows], queries: dict[str, Rows]) -> dict:
    return {
        split: {
            view: measured(rank_corpus(asked, rows, TIE, OPTIONS.depth), JUDGED[split], OPTIONS)
            for view, rows in corpus.items()
        }
        for split, asked in queries.items()
    }


def slow(corpus: dict[str, Rows], asked: Rows, weight: float, k: int) -> TopK:
    text, image = (asked.vectors.double() @ corpus[view].vectors.double().T for view in ("text", "image"))
    scores, ids = (weight * text + (1 - weight) * image).sort(1, descending=True)
    return TopK(scores[:, :k].float(), ids[:, :k])


def test_the_search_is_over_the_whole_corpus():
    corpus, queries = vectors()
    for weight in (0.0, 0.35, 1.0):
        results = {"test": of_views(corpus, queries)["test"]}
        assert add_score_fusion(results, corpus, queries, JUDGED, TIE, OPTIONS, weight) == weight
        found, expected = results["test"]["score_fusion"].top, slow(corpus, queries["test"], weight, OPTIONS.depth)
        if weight == 0.35:
            assert torch.equal(found.ids, expected.ids)
        else:  # text has ties, which go by id
            alone = results["test"]["text" if weight else "image"].top
            assert torch.equal(found.ids, alone.ids)
            assert torch.equal(found.scores, alone.scores)
        assert (found.scores - expected.scores).abs().max() < 1e-6


def test_the_weight_is_the_best_one_on_val():
    corpus, queries = vectors()
    results = of_views(corpus, queries)
    weight = add_score_fusion(results, corpus, queries, JUDGED, TIE, OPTIONS, None)
    judgments, ids = JUDGED["val"], np.arange(QUERIES)
    reached = {
        each: mean_ndcg(slow(corpus, queries["val"], each, OPTIONS.depth), ids, judgments, OPTIONS) for each in GRID
    }
    assert 0 < weight < 1
    assert reached[weight] == pytest.approx(max(reached.values()))
    assert reached[weight] > max(reached[0.0], reached[1.0])
    assert results["val"]["score_fusion"].metrics["r/ndcg@10"]["value"] == pytest.approx(reached[weight])


def test_without_val_or_without_a_view_there_is_no_row():
    corpus, queries = vectors()
    results = {"test": of_views(corpus, queries)["test"]}
    assert add_score_fusion(results, corpus, queries, JUDGED, TIE, OPTIONS, None) is None
    alone = {"text": corpus["text"]}
    assert add_score_fusion(results, alone, queries, JUDGED, TIE, OPTIONS, 0.5) is None
    assert list(results["test"]) == ["text", "image"]


@pytest.mark.parametrize("size", [7, 64])
def test_candidates_are_the_two_lists(monkeypatch, size):
    """A product in both is scored once, whatever the number of queries at a time."""
    monkeypatch.setattr(score_fusion, "QUERIES", size)
    corpus, queries = vectors()
    views = of_views(corpus, queries)["val"]
    found = score_fusion._candidates(views, corpus, queries["val"])
    for row in range(QUERIES):
        lists = {int(each) for view in ("text", "image") for each in views[view].top.ids[row]}
        ids = found.ids[row][found.ids[row] >= 0].tolist()
        assert sorted(ids) == sorted(lists)
    exact = (queries["val"].vectors @ corpus["image"].vectors.T).gather(1, found.ids.clamp(min=0))
    assert ((found.image - exact).abs() < 1e-6)[found.ids >= 0].all()


def test_files_of_vectors_are_searched_as_tensors_are(tmp_path):
    corpus, queries = vectors()
    filed = {
        view: Rows(write_vectors(tmp_path / f"{view}.npy", [rows.vectors]), rows.ids) for view, rows in corpus.items()
    }
    joined = SideBySide(*(rows.vectors for rows in filed.values()))
    assert joined.shape == (PRODUCTS, 2 * DIM)
    assert torch.equal(joined[torch.tensor([5, 2])], torch.cat([corpus[v].vectors[[5, 2]] for v in corpus], 1))
    tops = []
    for rows in (corpus, filed):
        results = {"test": of_views(rows, queries)["test"]}
        add_score_fusion(results, rows, queries, JUDGED, TIE, OPTIONS, 0.4)
        tops.append(results["test"]["score_fusion"].top.ids)
    assert torch.equal(*tops)


def _on_ranks(rank: int, world: int) -> tuple:
    corpus, queries = vectors()
    own = slice(rank, None, world)
    corpus = {view: Rows(rows.vectors[own], rows.ids[own]) for view, rows in corpus.items()}
    queries = {split: Rows(rows.vectors[own], rows.ids[own]) for split, rows in queries.items()}
    results = of_views(corpus, queries)
    weight = add_score_fusion(results, corpus, queries, JUDGED, TIE, OPTIONS, None)
    return weight, results["test"]["score_fusion"].top.ids, results["test"]["score_fusion"].top.scores


def test_ranks_choose_and_find_what_one_process_does():
    weight, ids, scores = _on_ranks(0, 1)
    for found in run_ranks(_on_ranks, 2):
        assert found[0] == weight
        assert torch.equal(found[1], ids)
        assert torch.equal(found[2], scores)
    assert weight == choose(of_views(*vectors())["val"], *(part for part in (vectors()[0], vectors()[1]["val"])),
                            JUDGED["val"], TIE, OPTIONS)  # fmt: skip
