"""Agreement with trec_eval through pytrec_eval: integer labels, fp32 scores, ties by product id, descending."""

import numpy as np
import pytest
import pytrec_eval
import torch

from mmfusion.batch import Judgments
from mmfusion.retrieval.metrics import parse_metric, ranked_gains, with_policy
from mmfusion.retrieval.topk import search, tie_ranks
from tests.mmfusion.retrieval.test_metrics import PRODUCTS, QUERIES, drawn, judged_of

OURS = {
    "ndcg": "ndcg@60", "recip_rank": "mrr", "map": "map",
    **{f"{theirs}_{k}": f"{ours}@{k}" for k in (1, 5, 10, 60) for theirs, ours in
       {"ndcg_cut": "ndcg", "recall": "recall", "P": "precision", "map_cut": "map", "success": "hit_rate"}.items()},
}  # fmt: skip
STRINGS = [f"p{i}" for i in range(PRODUCTS)]  # p10 sorts before p9
NOWHERE, WORTHLESS = range(3), range(3, 6)  # queries that `drawn` judges nowhere, and gives no gain above 0

Run = dict[str, dict[str, float]]


def scores_of(kind: str, seed: int) -> np.ndarray:
    """fp32 scores of every pair."""
    normal = np.random.default_rng(seed).normal(size=(QUERIES, PRODUCTS)).astype(np.float32)
    return {
        "random": normal,
        "negative": -np.abs(normal) - 1,
        "ties": np.round(normal),
        "all equal": np.zeros_like(normal),
        "one ulp apart": np.float32(1) + np.sign(normal) * np.float32(2.0**-23),
        "huge and tiny": normal * np.float32(10.0) ** np.round(normal * 9),
    }[kind]


def run_and_lists(scores: np.ndarray, lengths: np.ndarray) -> tuple[Run, np.ndarray]:
    """The first `lengths` products of each query, in a random order, as a run of trec_eval and as ranked lists."""
    draw, run = np.random.default_rng(0), {}
    ids = np.full((QUERIES, PRODUCTS), -1)
    for query, length in enumerate(lengths.tolist()):
        some = draw.permutation(PRODUCTS)[:length].tolist()
        run[str(query)] = {STRINGS[product]: float(scores[query, product]) for product in some}
        ids[query, :length] = sorted(some, key=lambda p, q=query: (scores[q, p], STRINGS[p]), reverse=True)
    return run, ids


def assert_agreement(
    judgments: Judgments, ids: np.ndarray, run: Run, names: dict[str, str], strings: list[str]
) -> None:
    """To 1e-9. What is not defined is NaN, which trec_eval, like our policy `zero`, counts as 0."""
    judged = np.unique(judgments.query).tolist()
    qrels = {str(q): {strings[p]: int(g) for p, g in judged_of(judgments, q, "relevance").items()} for q in judged}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, set(names), relevance_level=1).evaluate(run)
    ranked = ranked_gains(ids, np.arange(len(ids)), judgments, "relevance")
    for name, ours in names.items():
        values = with_policy(parse_metric(ours, ids.shape[1])(ranked), "zero")
        expected = [theirs[str(query)][name] if query in judged else 0.0 for query in range(len(ids))]
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["random", "negative", "ties", "all equal", "one ulp apart", "huge and tiny"])
@pytest.mark.parametrize("short", [False, True])
def test_against_pytrec_eval(kind: str, seed: int, short: bool) -> None:
    judgments = drawn([0, 1, 2, 3], seed)
    lengths = np.random.default_rng(seed).integers(1, 8 if short else PRODUCTS, size=QUERIES)
    run, ids = run_and_lists(scores_of(kind, seed), lengths)
    assert_agreement(judgments, ids, run, OURS, STRINGS)


def test_what_is_not_defined() -> None:
    """trec_eval is silent about queries that are judged nowhere, and gives 0 to those without a positive."""
    judgments = drawn([0, 1, 2, 3])
    _, ids = run_and_lists(scores_of("random", 0), np.full(QUERIES, PRODUCTS))
    ranked = ranked_gains(ids, np.arange(QUERIES), judgments, "relevance")
    for name in OURS.values():
        left_out = np.flatnonzero(np.isnan(parse_metric(name, PRODUCTS)(ranked))).tolist()
        assert left_out == [*NOWHERE, *WORTHLESS]


@pytest.mark.parametrize("seed", range(3))
def test_search_and_metrics_against_pytrec_eval(seed: int) -> None:
    """From vectors whose dot products tie and have both signs."""
    draw = torch.randn(QUERIES + PRODUCTS, 4, generator=torch.Generator().manual_seed(seed)).mul(2).round().div(3)
    vectors, corpus = draw[:QUERIES], draw[QUERIES:]
    found = search(vectors, corpus, torch.arange(PRODUCTS), tie_ranks(STRINGS), PRODUCTS)
    scores = (vectors.double() @ corpus.double().T).float()
    run = {str(query): dict(zip(STRINGS, scores[query].tolist(), strict=True)) for query in range(QUERIES)}
    assert_agreement(drawn([0, 1, 2, 3], seed), found.ids.numpy(), run, OURS, STRINGS)


def test_a_million_products() -> None:
    """All of them ranked for one query, with 2,000 judgments among them and few distinct scores."""
    count, draw = 1_000_000, np.random.default_rng(0)
    strings = [f"{i:06d}" for i in range(count)]
    scores = draw.normal(size=count).round(3).astype(np.float32)
    product = np.sort(draw.choice(count, size=2000, replace=False))
    gain = {"relevance": draw.choice([0.0, 1.0, 2.0, 3.0], size=2000)}
    judgments = Judgments(np.zeros(2000, int), product, gain, {"relevance": 1.0}, "unknown")
    scores[product[:3]] = 10  # or precision would be 0 at any small k
    ids = np.lexsort((np.arange(count), scores))[::-1][None]
    names = {"ndcg": f"ndcg@{count}", "map": "map", "recip_rank": "mrr", "P_10": "precision@10",
             "ndcg_cut_1000": "ndcg@1000", "recall_100000": "recall@100000"}  # fmt: skip
    assert_agreement(judgments, ids, {"0": dict(zip(strings, scores.tolist(), strict=True))}, names, strings)
