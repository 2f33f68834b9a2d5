import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfusion.batch import Judgments
from mmfusion.retrieval.metrics import METRICS
from mmfusion.retrieval.ranked import PLACES, ranked_gains
from tests.mmfusion.retrieval.test_metrics import drawn, judged_of, lists


def one_column(query: list[int], product: list[int], gain: list[float], unlisted: str = "unknown") -> Judgments:
    """Sorted, as the contract says."""
    order = np.lexsort((product, query))
    columns = {"relevance": np.array(gain, float)[order]}
    return Judgments(np.array(query)[order], np.array(product)[order], columns, {"relevance": 1.0}, unlisted)


@pytest.mark.parametrize("column", ["relevance", "desirability"])
@pytest.mark.parametrize("unlisted", ["unknown", "irrelevant"])
def test_each_retrieved_product_has_its_gain(column: str, unlisted: str) -> None:
    """A pair that is listed, but not judged in this column, is not judged, whatever unlisted pairs are."""
    judgments, (ids, query_ids) = drawn([-1.0, 0.0, 0.5, 2.0], unlisted=unlisted), lists(evaluated=30)
    ranked = ranked_gains(ids, query_ids, judgments, column)
    listed = set(zip(judgments.query.tolist(), judgments.product.tolist(), strict=True))
    for row, query in enumerate(query_ids.tolist()):
        judged = judged_of(judgments, query, column)
        for gain, product in zip(ranked.shown[row], ids[row].tolist(), strict=True):
            worthless = unlisted == "irrelevant" and product >= 0 and (query, product) not in listed
            np.testing.assert_equal(gain, 0.0 if worthless else judged.get(product, np.nan))


def test_the_ideal_holds_the_largest_gains_however_uneven_the_queries() -> None:
    """0, 1, 2, 3, 4, 5, 8, 100 judgments: below, at and above powers of two, and more than a list is long."""
    draw = np.random.default_rng(0)
    query = np.repeat([0, 5, 6, 7, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5, 8, 100])
    gain = draw.normal(size=len(query))
    judgments = one_column(query.tolist(), draw.permutation(len(query)).tolist(), gain.tolist())
    for k in (1, 4, 50, 120):
        query_ids = draw.permutation(12)
        ideal = ranked_gains(np.full((12, k), -1), query_ids, judgments, "relevance").ideal
        assert ideal.shape == (12, min(k, 100))
        for row, q in enumerate(query_ids):
            expected = sorted(judged_of(judgments, int(q), "relevance").values(), reverse=True)[:k]
            np.testing.assert_array_equal(ideal[row, : len(expected)], np.maximum(expected, 0))
            assert not ideal[row, len(expected) :].any()


def test_ids_alike_in_their_low_bits_are_told_apart() -> None:
    """Products 2^16 apart, -1 as 2^16 - 1, more pairs than are compared at a time, ids beyond 32 bits."""
    judgments = one_column([0, 0, 1, 1], [7, 65_535, 7 + 2**16, 7 + 2**40], [1, 2, 3, 4])
    ids = np.array([[7 + 2**16, 7, -1], [7, 7 + 2**40, 7 + 2**16]])
    np.testing.assert_array_equal(
        ranked_gains(ids, np.array([0, 1]), judgments, "relevance").shown, [[np.nan, 1, np.nan], [np.nan, 4, 3]]
    )
    many = PLACES // 2**7 + 5  # rows of more tables than are held at a time
    judgments = one_column(list(range(many)), list(range(many)), [1.0] * many)
    shown = ranked_gains(np.arange(many)[:, None] + [[1, 0, 2]], np.arange(many), judgments, "relevance").shown
    assert (shown[:, 1] == 1).all()
    assert np.isnan(shown[:, [0, 2]]).all()


@pytest.mark.parametrize("stride", [1, 2**7, 2**10, 2**20, 2**31])
def test_products_that_fall_into_one_place_are_all_found(stride: int) -> None:
    """A hundred judged products of a query, alike in their low bits, among as many that are not judged."""
    judged = np.arange(100) * 2 * stride
    judgments = one_column([0] * 100, judged.tolist(), np.arange(1.0, 101).tolist())
    order = np.random.default_rng(0).permutation(200)
    shown = ranked_gains((order * stride)[None], np.array([0]), judgments, "relevance").shown[0]
    np.testing.assert_array_equal(shown, np.where(order % 2 == 0, order / 2 + 1, np.nan))


def test_the_order_of_queries_changes_nothing() -> None:
    ids, query_ids = lists()
    order = np.argsort(query_ids)
    ours = ranked_gains(ids, query_ids, drawn([0, 0.1, 1]), "relevance")
    sorted_ = ranked_gains(ids[order], query_ids[order], drawn([0, 0.1, 1]), "relevance")
    for metric in METRICS.values():
        np.testing.assert_array_equal(metric(ours, 10)[order], metric(sorted_, 10))


@given(st.permutations(range(12)), st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_a_condensed_list_is_the_list_without_what_is_not_judged(found: list[int], k: int) -> None:
    """Products 0 to 5 are judged."""
    judgments = one_column([0] * 6, list(range(6)), [0, 0.1, 1, 1, 2, -1])
    without = [product for product in found if product < 6] + [-1] * 6
    lists_, query = (np.array([found]), np.array([without])), np.array([0])
    condensed = ranked_gains(lists_[0], query, judgments, "relevance", "condensed")
    plain = ranked_gains(lists_[1], query, judgments, "relevance")
    for name, metric in METRICS.items():
        if name != "judged":
            np.testing.assert_array_equal(metric(condensed, k), metric(plain, k))
    shown = ranked_gains(lists_[0], query, judgments, "relevance")
    assert METRICS["judged"](condensed, k) == METRICS["judged"](shown, k)  # of the list that people see


def test_nothing_is_taken_off_where_unlisted_pairs_are_irrelevant() -> None:
    ids, query_ids = lists()
    zero, condensed = (ranked_gains(ids, query_ids, drawn([0, 1]), "relevance", way) for way in ("zero", "condensed"))
    np.testing.assert_array_equal(zero.gains, condensed.gains)
    full = (ids >= 0).all(1)
    assert (METRICS["judged"](condensed, ids.shape[1])[full] == 1).all()


@pytest.mark.parametrize(
    ("ids", "query_ids", "options", "message"),
    [
        ([[0, 1]], [0], {"column": "label"}, r"no label column 'label'.*there are: relevance"),
        ([[0, 1]], [0], {"unjudged": "drop"}, "unjudged is 'drop'; expected one of: zero, condensed"),
        ([[0, 1], [1, 0]], [3, 3], {}, "query id 3 has more than one list"),
        ([[5, 6], [1, 1]], [0, 3], {}, "the list of query id 3 holds product id 1 twice"),
    ],
)
def test_what_cannot_be_measured_is_explained(ids: list, query_ids: list, options: dict, message: str) -> None:
    judgments = one_column([0, 3], [5, 1], [1, 1])
    options = {"column": "relevance"} | options
    with pytest.raises(ValueError, match=message):
        ranked_gains(np.array(ids), np.array(query_ids), judgments, **options)


def test_ten_thousand_queries_take_no_loop() -> None:
    """All metrics at depth 1000 with 200,000 judgments: a loop takes minutes, this .3 s on an idle core."""
    draw = np.random.default_rng(0)
    ids = np.arange(1000) + draw.integers(10_000_000, size=(10_000, 1))
    query, product = np.repeat(np.arange(10_000), 20), draw.integers(10_000_000, size=200_000)
    order = np.lexsort((product, query))
    judgments = Judgments(query, product[order], {"relevance": draw.random(200_000)}, {"relevance": 0.5}, "unknown")
    start = time.perf_counter()
    ranked = ranked_gains(ids, np.arange(10_000), judgments, "relevance")
    for metric in METRICS.values():
        metric(ranked, 10)
    assert time.perf_counter() - start < 5
