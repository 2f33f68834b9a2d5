import numpy as np
import pytest
import torch
from torch import Tensor

from mmfusion.batch import Judgments
from mmfusion.retrieval.evaluation import VALIDATION, Evaluation, ViewResult, measured
from mmfusion.retrieval.ranking import Collector, Rows, rank_corpus
from mmfusion.retrieval.topk import tie_ranks
from mmfusion.retrieval.vectors import VectorFile
from tests.ddp import run_ranks

QUERIES, PRODUCTS = 25, 300


def vectors() -> tuple[Rows, Rows]:
    """Queries with gaps between their ids, and a corpus with a third of its vectors equal."""
    draw = torch.randn(QUERIES + PRODUCTS, 8, generator=torch.Generator().manual_seed(0))
    corpus = draw[QUERIES:]
    corpus[::3] = corpus[0]
    return Rows(draw[:QUERIES], 10 + 2 * torch.arange(QUERIES)), Rows(corpus, torch.arange(PRODUCTS))


def judged() -> Judgments:
    draw = np.random.default_rng(0)
    query, product = np.nonzero(draw.random((80, PRODUCTS)) < 0.05)
    gain = {"relevance": draw.choice([0, 0.1, 1], len(query)), "desirability": draw.choice([0, 1, np.nan], len(query))}
    gain["relevance"][query == 10] = 0.0  # query 10 has nothing relevant
    return Judgments(query, product, gain, dict.fromkeys(gain, 1.0), "irrelevant")


def ties() -> Tensor:
    return tie_ranks([f"{i}" for i in range(PRODUCTS)])


OPTIONS = Evaluation(metrics=list(VALIDATION), depth=100)


def evaluate(queries: Rows, corpus: Rows) -> ViewResult:
    return measured(rank_corpus(queries, corpus, ties(), OPTIONS.depth), judged(), OPTIONS)


def test_one_process_by_hand() -> None:
    """Each product's own vector as query, unit norm: it is found first, so all that it is judged for is at rank 1."""
    corpus = Rows(torch.nn.functional.normalize(vectors()[1].vectors[1:3]), torch.tensor([0, 1]))
    judgments = Judgments(np.array([5, 6]), np.array([0, 0]), {"relevance": np.ones(2)}, {"relevance": 1.0}, "unknown")
    ranking = rank_corpus(Rows(corpus.vectors, torch.tensor([5, 6])), corpus, ties()[:2].argsort(), OPTIONS.depth)
    result = measured(ranking, judgments, OPTIONS)
    assert result.top.ids[:, :3].tolist() == [[0, 1, -1], [1, 0, -1]]
    assert {name: cell["value"] for name, cell in result.metrics.items()} == {
        "relevance/ndcg@1": 0.5,
        "relevance/ndcg@10": pytest.approx((1 + 1 / np.log2(3)) / 2),
        "relevance/recall@10": 1,
        "relevance/recall@100": 1,
        "relevance/mrr": 0.75,
    }


def test_the_means_leave_out_what_has_no_positive_and_say_so() -> None:
    result = evaluate(*vectors())
    assert list(result.metrics)[:2] == ["relevance/ndcg@1", "relevance/ndcg@10"]
    assert result.query_ids.tolist() == list(range(10, 60, 2))
    assert result.left_out()["relevance/mrr"] >= 1
    for name, cell in result.metrics.items():
        per_query = result.per_query[name]
        assert cell["value"] == pytest.approx(np.nanmean(per_query))
        assert cell["low"] <= cell["value"] <= cell["high"]
        assert np.isnan(per_query).sum() == result.left_out()[name]
    assert np.isnan(result.per_query["relevance/ndcg@10"][0])


def test_no_positive_at_all_is_no_number() -> None:
    queries, corpus = vectors()
    one = Rows(queries.vectors[:1], queries.ids[:1])
    assert all(np.isnan(value) for value in evaluate(one, corpus).metrics["relevance/ndcg@10"].values())


def test_padding_and_copies_change_nothing() -> None:
    queries, corpus = vectors()
    collectors = Collector(), Collector()
    for collector, rows in zip(collectors, (queries, corpus), strict=True):
        for ids, part in zip(rows.ids.split(9), rows.vectors.split(9), strict=True):
            padded = torch.cat([part, torch.full((3, 8), torch.nan)])
            valid = torch.arange(len(padded)) < len(ids)
            collector.add(padded, torch.cat([ids, ids[:1].repeat(3)]), valid)
        collector.add(rows.vectors[:5], rows.ids[:5], torch.ones(5, dtype=torch.bool))  # these came before
    assert_same(evaluate(collectors[0].rows(), collectors[1].rows()), evaluate(queries, corpus))


def test_a_corpus_in_a_file_is_the_one_in_memory(tmp_path) -> None:
    queries, corpus = vectors()
    collector = Collector(tmp_path / "new")
    for start in range(0, PRODUCTS, 70):
        part = slice(start, start + 70)
        collector.add(corpus.vectors[part], corpus.ids[part], torch.ones(len(corpus.ids[part]), dtype=torch.bool))
    rows = collector.rows()
    assert isinstance(rows.vectors, VectorFile)
    del collector
    assert not list((tmp_path / "new").iterdir()), "the file goes with its collector, and stays readable"
    assert_same(evaluate(queries, rows), evaluate(queries, corpus))


def _evaluate_share(rank: int, world: int) -> ViewResult:
    """Unequal shares, in mixed order, that overlap: queries 3 to 5 and products 90 to 99 come up on two ranks."""
    queries, corpus = vectors()
    query_cut, product_cut = [0, 4, 17, QUERIES][rank : rank + 2], [0, 95, 230, PRODUCTS][rank : rank + 2]
    if rank == world - 1:
        query_cut[1], product_cut[1] = QUERIES, PRODUCTS
    mine = torch.arange(max(0, query_cut[0] - 1), min(QUERIES, query_cut[1] + 2)).flip(0)
    own = torch.arange(max(0, product_cut[0] - 5), min(PRODUCTS, product_cut[1] + 5)).flip(0)
    return evaluate(Rows(queries.vectors[mine], queries.ids[mine]), Rows(corpus.vectors[own], corpus.ids[own]))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_equal_one_process(world: int) -> None:
    alone = evaluate(*vectors())
    for result in run_ranks(_evaluate_share, world):
        assert_same(result, alone)


def _evaluate_without_corpus_on_one(rank: int, world: int) -> ViewResult:
    queries, corpus = vectors()
    some = slice(0, 0) if rank == 0 else slice(None)
    mine = slice(None) if rank == 0 else slice(0, 0)
    return evaluate(Rows(queries.vectors[mine], queries.ids[mine]), Rows(corpus.vectors[some], corpus.ids[some]))


def test_a_rank_may_hold_nothing() -> None:
    for result in run_ranks(_evaluate_without_corpus_on_one, 2):
        assert_same(result, evaluate(*vectors()))


def assert_same(ours: ViewResult, theirs: ViewResult) -> None:
    assert torch.equal(ours.top.ids, theirs.top.ids)
    assert torch.equal(ours.top.scores, theirs.top.scores)
    assert ours.query_ids.tolist() == theirs.query_ids.tolist()
    assert ours.metrics == theirs.metrics
    for name, values in theirs.per_query.items():
        np.testing.assert_array_equal(ours.per_query[name], values)
