import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfusion.batch import Judgments
from mmfusion.retrieval import metrics
from mmfusion.retrieval.metrics import METRICS, parse_metric, ranked_gains, shares, with_policy

QUERIES, PRODUCTS, DEPTH = 40, 60, 20
ESCI = {"E": 1.0, "S": 0.1, "C": 0.01, "I": 0.0}


def drawn(
    gains: list[float], seed: int = 0, positive_from: float = 1.0, unlisted: str = "irrelevant", **labels: float
) -> Judgments:
    """About a third of all pairs judged; queries 0 to 2 judged nowhere, 3 to 5 without a gain above 0."""
    draw = np.random.default_rng(seed)
    query, product = np.nonzero(draw.random((QUERIES, PRODUCTS)) < 0.3)
    query, product = query[query > 2], product[query > 2]
    gain = draw.choice(gains, size=len(query)).astype(float)
    gain[np.isin(query, [3, 4, 5])] = 0
    other = np.where(draw.random(len(query)) < 0.5, gain, np.nan)
    gain = {"relevance": gain, "desirability": other}
    return Judgments(query, product, gain, dict.fromkeys(gain, positive_from), unlisted, {"relevance": labels})


def lists(seed: int = 0, evaluated: int = QUERIES) -> tuple[np.ndarray, np.ndarray]:
    """Query ids in no order, and their lists: some are short and padded."""
    draw = np.random.default_rng(seed + 100)
    query_ids = draw.permutation(QUERIES)[:evaluated]
    ids = np.stack([draw.permutation(PRODUCTS)[:DEPTH] for _ in query_ids])
    ids[np.arange(DEPTH) >= draw.integers(5, 30, size=len(query_ids))[:, None]] = -1
    return ids, query_ids


def judged_of(judgments: Judgments, query: int, column: str) -> dict[int, float]:
    rows = np.flatnonzero((judgments.query == query) & ~np.isnan(judgments.gain[column]))
    return {int(judgments.product[row]): float(judgments.gain[column][row]) for row in rows}


def slow_metrics(
    found: list[int], judgments: Judgments, query: int, column: str, k: int, unjudged: str = "zero"
) -> dict[str, float]:
    """The definitions, one query at a time."""
    judged = judged_of(judgments, query, column)
    listed = {int(product) for product in judgments.product[judgments.query == query]}
    shown: list[float | None] = []
    for product in found:
        known_worthless = judgments.unlisted == "irrelevant" and product not in listed
        if product >= 0:
            shown.append(0.0 if known_worthless else judged.get(product))
    values = {name: shown[:k].count(gain) / k for name, gain in [("judged", None), ("share_unjudged", None)]}
    values["judged"] = len(shown[:k]) / k - values["judged"]
    for label, gain in judgments.labels.get(column, {}).items():
        values[f"share_{label.lower()}"] = shown[:k].count(gain) / k
    if unjudged == "condensed":
        shown = [gain for gain in shown if gain is not None]
    gains, relevant = [max(0.0, gain or 0.0) for gain in shown[:k]], []
    for rank, gain in enumerate(shown[:k], 1):
        if gain is not None and gain >= judgments.positive_from[column]:
            relevant.append(rank)
    best = sorted((max(0.0, gain) for gain in judged.values()), reverse=True)[:k]
    for name, worth in {"ndcg": float, "ndcg_exp": lambda gain: 2**gain - 1}.items():
        ideal = sum(worth(gain) / math.log2(rank + 1) for rank, gain in enumerate(best, 1))
        dcg = sum(worth(gain) / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))
        values[name] = dcg / ideal if ideal else math.nan
    known = judgments.gain[column][~np.isnan(judgments.gain[column])]
    largest = max(judgments.labels.get(column, {}).values(), default=max(known, default=0))
    values["err"], reads_on = 0.0, 1.0
    for rank, gain in enumerate(gains, 1):
        satisfied = (2**gain - 1) / 2**largest
        values["err"] += reads_on * satisfied / rank
        reads_on *= 1 - satisfied
    if not any(best):
        values["err"] = math.nan
    n = sum(gain >= judgments.positive_from[column] for gain in judged.values())
    about_relevant = {
        "recall": len(relevant) / max(n, 1),
        "recall_capped": len(relevant) / max(min(n, k), 1),
        "precision": len(relevant) / k,
        "hit_rate": float(len(relevant) > 0),
        "mrr": 1 / relevant[0] if relevant else 0.0,
        "map": sum(nth / rank for nth, rank in enumerate(relevant, 1)) / max(n, 1),
    }
    return values | {name: value if n else math.nan for name, value in about_relevant.items()}


@pytest.mark.parametrize("k", [1, 3, 10, DEPTH])
@pytest.mark.parametrize("column", ["relevance", "desirability"])
@pytest.mark.parametrize("unjudged", ["zero", "condensed"])
@pytest.mark.parametrize("unlisted", ["unknown", "irrelevant"])
@pytest.mark.parametrize(
    ("gains", "positive_from", "labels"),
    [([0, 0.01, 0.1, 1], 1.0, ESCI), ([-2, 0, 0.3, 5.5], 0.3, {}), ([0, 1], 1.0, {"low": 1.0, "high": 3.0})],
)
def test_against_a_slow_loop(
    k: int, column: str, unjudged: str, unlisted: str, gains: list[float], positive_from: float, labels: dict
) -> None:
    judgments, (ids, query_ids) = drawn(gains, k, positive_from, unlisted, **labels), lists(k, evaluated=30)
    ranked = ranked_gains(ids, query_ids, judgments, column, unjudged)
    expected = [
        slow_metrics(found.tolist(), judgments, int(query), column, k, unjudged)
        for found, query in zip(ids, query_ids, strict=True)
    ]
    for name, metric in (METRICS | shares(judgments.labels.get(column, {}))).items():
        values = [of_query[name] for of_query in expected]
        np.testing.assert_allclose(metric(ranked, k), values, rtol=0, atol=1e-12, err_msg=name)
        assert np.isnan(values).any() == (not name.startswith(("judged", "share_")))
        assert not np.isnan(values).all()


def of_one_query(found: list[int], gain: list[float], positive_from: float = 1.0, **labels: float) -> metrics.Ranked:
    """One list; product i has gain[i]."""
    product = np.arange(len(gain))
    judgments = Judgments(
        np.zeros(len(gain), int), product, {"relevance": np.array(gain)}, {"relevance": positive_from}, "unknown",
        {"relevance": labels},
    )  # fmt: skip
    return ranked_gains(np.array([found]), np.array([0]), judgments, "relevance")


def test_values_by_hand() -> None:
    """Gains 0.1 and 1 found at ranks 1 and 3; one more relevant product is not found."""
    ranked = of_one_query([1, 9, 0], [1.0, 0.1, 1.0, 0.0])
    ideal = 1 + 1 / math.log2(3) + 0.1 / 2
    expected = {
        "ndcg@3": (0.1 + 1 / 2) / ideal, "recall@3": 0.5, "recall@2": 0, "recall_capped@1": 0, "recall_capped@3": 0.5,
        "mrr@3": 1 / 3, "mrr@2": 0, "map@3": 1 / 3 / 2, "precision@3": 1 / 3, "hit_rate@3": 1, "hit_rate@2": 0,
        "judged@3": 2 / 3, "share_unjudged@2": 1 / 2,
        "ndcg_exp@3": (2**0.1 - 1 + 1 / 2) / (1 + 1 / math.log2(3) + (2**0.1 - 1) / 2),
    }  # fmt: skip
    for name, value in expected.items():
        assert parse_metric(name, 3)(ranked)[0] == pytest.approx(value, abs=1e-15), name


def test_err_by_hand() -> None:
    """Chapelle's grades 0 to 4 as labels: R is 1/16, then 15/16; without labels the best of the judgments is 2."""
    labels = {"bad": 0.0, "fair": 1.0, "good": 2.0, "excellent": 3.0, "perfect": 4.0}
    assert metrics.err(of_one_query([0, 1], [1.0, 4.0], **labels), 2)[0] == 1 / 16 + 15 / 16 * 15 / 16 / 2
    assert metrics.err(of_one_query([0, 1], [1.0, 2.0]), 2)[0] == 1 / 4 + 3 / 4 * 3 / 4 / 2
    assert metrics.err(of_one_query([0, 1], [1.0, 2.0], **labels), 1)[0] == 1 / 16
    assert metrics.err(of_one_query([5, 1], [1.0, 1.0]), 2)[0] == 1 / 2 / 2  # nobody is satisfied by product 5


def test_shares_by_hand() -> None:
    """Of the first five places: E, S, one that nobody judged, I, and padding."""
    ranked = of_one_query([0, 1, 9, 3, -1], [1.0, 0.1, 0.01, 0.0], **ESCI)
    found = {name: parse_metric(f"{name}@5", 5, ESCI)(ranked)[0] for name in [*shares(ESCI), "judged"]}
    assert found == {"share_e": 0.2, "share_s": 0.2, "share_c": 0, "share_i": 0.2, "share_unjudged": 0.2, "judged": 0.6}


def test_labels_worth_the_same_share_a_name() -> None:
    labels = {"E": 1.0, "S": 0.1, "C": 0.0, "I": 0.0}
    assert list(shares(labels)) == ["share_e", "share_s", "share_c+i", "share_unjudged"]
    assert parse_metric("share_c+i@2", 2, labels)(of_one_query([0, 1], [1.0, 0.0], **labels))[0] == 0.5
    with pytest.raises(ValueError, match=r"unknown metric 'share_c@10'; .* share_s, share_c\+i"):
        parse_metric("share_c@10", 100, labels)
    assert list(shares({"a": 1.0, "A": 2.0})) == ["share_a", "share_A", "share_unjudged"]


def test_the_ideal_counts_what_no_list_could_hold() -> None:
    """Three relevant products, one retrieved: nDCG@3 stays below 1 however good the list is."""
    ranked = of_one_query([2, -1, -1], [1.0, 1.0, 1.0])
    assert metrics.ndcg(ranked, 3)[0] == pytest.approx(1 / (1 + 1 / math.log2(3) + 0.5))
    assert metrics.ndcg(ranked, 1)[0] == 1


def test_extreme_gains() -> None:
    """2^5000 fits in no float, and of 1e-12 little is left in 2^1e-12 - 1."""
    ranked = of_one_query([1, 0], [5000.0, 4999.0])
    assert metrics.ndcg_exp(ranked, 2)[0] == pytest.approx((0.5 + 1 / math.log2(3)) / (1 + 0.5 / math.log2(3)))
    assert metrics.err(ranked, 2)[0] == 0.5 + 0.5 / 2
    small = of_one_query([1, 0], [3e-12, 1e-12], positive_from=1e-12)
    assert metrics.ndcg_exp(small, 2)[0] == pytest.approx(metrics.ndcg(small, 2)[0], rel=1e-11)


def test_what_the_mean_leaves_out() -> None:
    values = np.array([0.5, np.nan, 1.0])
    assert np.isnan(with_policy(values, "skip")).tolist() == [False, True, False]
    assert with_policy(values, "zero").tolist() == [0.5, 0, 1]
    with pytest.raises(ValueError, match="expected one of: skip, zero"):
        with_policy(values, "drop")


def test_no_judgments_at_all() -> None:
    nothing = np.zeros(0, int)
    judgments = Judgments(nothing, nothing, {"relevance": np.zeros(0)}, {"relevance": 1.0}, "unknown")
    ranked = ranked_gains(np.array([[0, 1], [1, -1]]), np.array([4, 2]), judgments, "relevance")
    about_relevance = [metric for name, metric in METRICS.items() if name != "judged"]
    assert all(np.isnan(metric(ranked, 2)).all() for metric in about_relevance)
    assert metrics.judged(ranked, 2).tolist() == [0, 0]
    assert shares({})["share_unjudged"](ranked, 2).tolist() == [1, 0.5]


def test_no_queries_at_all() -> None:
    ranked = ranked_gains(np.zeros((0, 5), int), np.zeros(0, int), drawn([1.0]), "relevance")
    assert all(metric(ranked, 5).shape == (0,) for metric in (METRICS | shares(ESCI)).values())


@pytest.mark.parametrize(
    ("name", "metric", "k"),
    [
        ("ndcg@10", metrics.ndcg, 10), ("recall_capped@20", metrics.recall_capped, 20), ("mrr", metrics.mrr, DEPTH),
        ("mrr@3", metrics.mrr, 3), ("map", metrics.mean_average_precision, DEPTH),
        ("map@4", metrics.mean_average_precision, 4), ("hit_rate@5", metrics.hit_rate, 5), ("err@5", metrics.err, 5),
    ],
)  # fmt: skip
def test_names(name: str, metric: Callable, k: int) -> None:
    ids, query_ids = lists()
    ranked = ranked_gains(ids, query_ids, drawn([0, 0.3, 1.0]), "relevance")
    np.testing.assert_array_equal(parse_metric(name, DEPTH)(ranked), metric(ranked, k))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ndgc@10", "did you mean 'ndcg'"),
        ("clicks@3", "there are: ndcg, ndcg_exp, recall"),
        ("recall", "needs a depth above 0, as in recall@10"),
        ("recall@ten", "needs a depth"),
        ("ndcg@0", "needs a depth"),
        ("recall@1000", "search depth of at least 1000, got 100"),
        (
            "share_x@10",
            "'share_x@10'; the labels of this column have: share_e, share_s, share_c, share_i, share_unjudged$",
        ),
        ("share_e", "needs a depth above 0, as in share_e@10"),
    ],
)
def test_wrong_names_are_explained(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_metric(name, 100, {"E": 1.0, "S": 0.1, "C": 0.01, "I": 0.0} if "share" in name else None)


def test_lists_too_short_for_k_are_explained() -> None:
    with pytest.raises(ValueError, match="the lists have 2 places where k is 10; pad them with -1"):
        metrics.ndcg(of_one_query([0, 1], [1.0, 1.0]), 10)


GAINS = st.lists(st.sampled_from([-1.0, 0.0, 0.01, 0.1, 1.0, 1.5, 3.0]), min_size=1, max_size=12)


@given(GAINS, st.randoms(use_true_random=False), st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_no_value_leaves_0_to_1(gain: list[float], random: object, k: int) -> None:
    """Lists of judged and of other products in any order."""
    found = random.sample(range(len(gain) + 5), len(gain) + 5)
    ranked = of_one_query([*found, *[-1] * 12], gain)
    for name, metric in METRICS.items():
        value = metric(ranked, k)[0]
        assert np.isnan(value) or -1e-12 <= value <= 1 + 1e-12, name


@given(GAINS, st.data())
@settings(max_examples=150, deadline=None)
def test_a_better_product_further_up_never_hurts(gain: list[float], data: st.DataObject) -> None:
    found = data.draw(st.permutations(range(len(gain) + 2)))
    k = data.draw(st.integers(1, len(found)))
    worth = [max(0.0, gain[product]) if product < len(gain) else 0.0 for product in found]
    upper, lower = sorted(data.draw(st.lists(st.integers(0, len(found) - 1), min_size=2, max_size=2)))
    if worth[lower] < worth[upper]:
        upper, lower = lower, upper  # then the given list is the better one
    better = list(found)
    better[upper], better[lower] = found[lower], found[upper]
    if upper > lower:
        found, better = better, found
    before, after = of_one_query(list(found), gain), of_one_query(list(better), gain)
    for name, metric in METRICS.items():
        if name != "judged":
            assert not metric(after, k)[0] < metric(before, k)[0] - 1e-12, name
