import math
import time

import numpy as np
import pytest
import pytrec_eval
import torch

from mmfusion.batch import Judgments
from mmfusion.retrieval.metrics import METRICS, Ranked, mrr, ndcg, parse_metric, ranked_gains, recall, recall_capped
from mmfusion.retrieval.topk import search, tie_ranks

QUERIES, PRODUCTS, DEPTH = 40, 60, 20


def drawn(gains: list[float], seed: int = 0, positive_from: float = 1.0) -> Judgments:
    """About a third of all pairs judged; queries 0 to 2 judged nowhere, 3 to 5 without a gain above 0."""
    draw = np.random.default_rng(seed)
    query, product = np.nonzero(draw.random((QUERIES, PRODUCTS)) < 0.3)
    query, product = query[query > 2], product[query > 2]
    gain = draw.choice(gains, size=len(query)).astype(float)
    gain[np.isin(query, [3, 4, 5])] = 0
    other = np.where(draw.random(len(query)) < 0.5, gain, np.nan)
    gain = {"relevance": gain, "desirability": other}
    return Judgments(query, product, gain, dict.fromkeys(gain, positive_from), "irrelevant")


def lists(seed: int = 0, evaluated: int = QUERIES) -> tuple[np.ndarray, np.ndarray]:
    """Query ids in no order, and their lists: some are short and padded."""
    draw = np.random.default_rng(seed + 100)
    query_ids = draw.permutation(QUERIES)[:evaluated]
    ids = np.stack([draw.permutation(PRODUCTS)[:DEPTH] for _ in query_ids])
    ids[np.arange(DEPTH) >= draw.integers(5, 30, size=len(query_ids))[:, None]] = -1
    return ids, query_ids


def slow_metrics(found: list[int], judged: dict[int, float], positive_from: float, k: int) -> dict[str, float]:
    """The definitions, one query at a time."""
    found = [product for product in found[:k] if product >= 0]
    dcg = sum(max(0.0, judged.get(product, 0.0)) / math.log2(rank + 1) for rank, product in enumerate(found, 1))
    best = sorted((max(0.0, gain) for gain in judged.values()), reverse=True)[:k]
    ideal = sum(gain / math.log2(rank + 1) for rank, gain in enumerate(best, 1))
    relevant = {product for product, gain in judged.items() if gain >= positive_from}
    hits = [rank for rank, product in enumerate(found, 1) if product in relevant]
    n = len(relevant)
    return {
        "ndcg": dcg / ideal if ideal else math.nan,
        "recall": len(hits) / n if n else math.nan,
        "recall_capped": len(hits) / min(n, k) if n else math.nan,
        "mrr": (1 / hits[0] if hits else 0.0) if n else math.nan,
    }


def judged_of(judgments: Judgments, query: int, column: str) -> dict[int, float]:
    rows = np.flatnonzero((judgments.query == query) & ~np.isnan(judgments.gain[column]))
    return {int(judgments.product[row]): float(judgments.gain[column][row]) for row in rows}


@pytest.mark.parametrize("k", [1, 3, 10, DEPTH])
@pytest.mark.parametrize("column", ["relevance", "desirability"])
@pytest.mark.parametrize(
    ("gains", "positive_from"), [([0, 0.01, 0.1, 1], 1.0), ([-2, 0, 0.3, 5.5], 0.3), ([0, 1], 1.0)]
)
def test_against_a_slow_loop(k: int, column: str, gains: list[float], positive_from: float) -> None:
    judgments, (ids, query_ids) = drawn(gains, k, positive_from), lists(k, evaluated=30)
    ranked = ranked_gains(ids, query_ids, judgments, column)
    for name, metric in METRICS.items():
        expected = [
            slow_metrics(found.tolist(), judged_of(judgments, int(query), column), positive_from, k)[name]
            for found, query in zip(ids, query_ids, strict=True)
        ]
        np.testing.assert_allclose(metric(ranked, k), expected, rtol=0, atol=1e-12)
    assert np.isnan(expected).any()
    assert not np.isnan(expected).all()


@pytest.mark.parametrize("seed", range(5))
def test_against_pytrec_eval(seed: int) -> None:
    """Integer labels, scores with ties and both signs; trec_eval sorts by (fp32 score, id string), both descending."""
    judgments, strings = drawn([0, 1, 2, 3], seed), [f"p{i}" for i in range(PRODUCTS)]
    draw = torch.randn(QUERIES + PRODUCTS, 4, generator=torch.Generator().manual_seed(seed)).mul(2).round().div(3)
    vectors, corpus = draw[:QUERIES], draw[QUERIES:]
    found = search(vectors, corpus, torch.arange(PRODUCTS), tie_ranks(strings), PRODUCTS)
    qrels = {
        str(query): {strings[p]: int(g) for p, g in judged_of(judgments, query, "relevance").items()}
        for query in np.unique(judgments.query)
    }
    scores = (vectors.double() @ corpus.double().T).float()
    run = {str(query): dict(zip(strings, scores[query].tolist(), strict=True)) for query in range(QUERIES)}
    names = {
        "ndcg_cut_10": (ndcg, 10),
        "recall_5": (recall, 5),
        "recall_20": (recall, 20),
        "recip_rank": (mrr, PRODUCTS),
    }
    theirs = pytrec_eval.RelevanceEvaluator(qrels, set(names), relevance_level=1).evaluate(run)
    ranked = ranked_gains(found.ids.numpy(), np.arange(QUERIES), judgments, "relevance")
    for name, (metric, k) in names.items():
        ours = metric(ranked, k)
        assert np.isnan(ours[:6]).all()  # nothing positive: trec_eval leaves those unjudged out and gives the others 0
        assert max(abs(ours[q] - theirs[str(q)][name]) for q in range(QUERIES) if not np.isnan(ours[q])) < 1e-9


def test_values_by_hand() -> None:
    """Gains 0.1 and 1 found at ranks 1 and 3; one more relevant product is not found."""
    gain = np.array([1.0, 0.1, 1.0, 0.0])
    judgments = Judgments(np.zeros(4, int), np.arange(4), {"relevance": gain}, {"relevance": 1.0}, "irrelevant")
    ranked = ranked_gains(np.array([[1, 9, 0]]), np.array([0]), judgments, "relevance")
    ideal = 1 + 1 / math.log2(3) + 0.1 / 2
    assert ndcg(ranked, 3)[0] == pytest.approx((0.1 + 1 / 2) / ideal)
    assert (recall(ranked, 3)[0], recall(ranked, 2)[0]) == (0.5, 0)
    assert (recall_capped(ranked, 1)[0], recall_capped(ranked, 3)[0]) == (0, 0.5)
    assert (mrr(ranked, 3)[0], mrr(ranked, 2)[0]) == (pytest.approx(1 / 3), 0)


def test_the_ideal_counts_what_no_list_could_hold() -> None:
    """Three relevant products, one retrieved: nDCG@3 stays below 1 however good the list is."""
    judgments = Judgments(np.zeros(3, int), np.arange(3), {"relevance": np.ones(3)}, {"relevance": 1.0}, "unknown")
    ranked = ranked_gains(np.array([[2, -1, -1]]), np.array([0]), judgments, "relevance")
    assert ndcg(ranked, 3)[0] == pytest.approx(1 / (1 + 1 / math.log2(3) + 0.5))
    assert ndcg(ranked, 1)[0] == 1


def test_unjudged_products_have_no_gain() -> None:
    judgments, (ids, query_ids) = drawn([1.0]), lists()
    ranked = ranked_gains(ids, query_ids, judgments, "relevance")
    pairs = set(zip(judgments.query.tolist(), judgments.product.tolist(), strict=True))
    for row, query in enumerate(query_ids.tolist()):
        for gain, product in zip(ranked.gains[row], ids[row].tolist(), strict=True):
            assert np.isnan(gain) == ((query, product) not in pairs)


def test_no_judgments_at_all() -> None:
    nothing = np.zeros(0, int)
    judgments = Judgments(nothing, nothing, {"relevance": np.zeros(0)}, {"relevance": 1.0}, "irrelevant")
    ranked = ranked_gains(np.array([[0, 1], [1, -1]]), np.array([4, 2]), judgments, "relevance")
    assert all(np.isnan(metric(ranked, 2)).all() for metric in METRICS.values())


def test_no_queries_at_all() -> None:
    ranked = ranked_gains(np.zeros((0, 5), int), np.zeros(0, int), drawn([1.0]), "relevance")
    assert all(metric(ranked, 5).shape == (0,) for metric in METRICS.values())


def test_names() -> None:
    assert parse_metric("ndcg@10", 100) == (ndcg, 10)
    assert parse_metric("recall_capped@100", 100) == (recall_capped, 100)
    assert parse_metric("mrr", 100) == (mrr, 100)
    assert parse_metric("mrr@10", 100) == (mrr, 10)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ndgc@10", "did you mean 'ndcg'"),
        ("hits@3", "there are: ndcg, recall"),
        ("recall", "needs a depth above 0, as in recall@10"),
        ("recall@ten", "needs a depth"),
        ("ndcg@0", "needs a depth"),
        ("recall@1000", "search depth of at least 1000, got 100"),
    ],
)
def test_wrong_names_are_explained(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_metric(name, 100)


def test_an_unknown_label_column_is_explained() -> None:
    ids, query_ids = lists()
    with pytest.raises(ValueError, match=r"no label column 'label'.*relevance, desirability"):
        ranked_gains(ids, query_ids, drawn([1.0]), "label")


def test_ten_thousand_queries_take_no_loop() -> None:
    draw = np.random.default_rng(0)
    ids = draw.integers(10_000_000, size=(10_000, 100))
    query, product = np.repeat(np.arange(10_000), 20), draw.integers(10_000_000, size=200_000)
    order = np.lexsort((product, query))
    judgments = Judgments(query, product[order], {"relevance": draw.random(200_000)}, {"relevance": 0.5}, "unknown")
    start = time.perf_counter()
    ranked: Ranked = ranked_gains(ids, np.arange(10_000), judgments, "relevance")
    ndcg(ranked, 10)
    assert time.perf_counter() - start < 5  # a loop takes a minute, this .2 s on an idle core
