import numpy as np
import pytest
from scipy import stats

from mmfusion.retrieval import student
from mmfusion.retrieval.seeds import estimate, variance_of_mean
from mmfusion.retrieval.significance import bootstrap_interval, sign_flip_test


@pytest.mark.parametrize("df", [0.7, 1, 2, 2.31, 17.5, 499, 123_456.7])
def test_student_is_that_of_scipy(df: float) -> None:
    for t in (0.0, 1e-3, 0.3, 1.96, 4.2, 31.0):
        assert student.two_sided(t, df) == pytest.approx(2 * stats.t.sf(t, df), rel=1e-8)
        assert student.two_sided(-t, df) == student.two_sided(t, df)
    for chance in (0.05, 0.5, 1e-6):
        assert student.quantile(chance, df) == pytest.approx(stats.t.isf(chance / 2, df), rel=1e-8)
    assert student.two_sided(np.inf, df) == 0


def test_by_hand() -> None:
    """Seeds' means 3 and 5, queries' 2, 4 and 6, mean 4; of the rest 0, 1, -1 and 0, -1, 1.

    MS_seed = 3 (1 + 1) / 1 = 6, MS_query = 2 (4 + 0 + 4) / 2 = 8, MS_rest = 4 / 2 = 2.
    """
    values = np.array([[1.0, 4, 4], [3, 4, 8]])
    variance, df = variance_of_mean(values)
    assert variance == pytest.approx((6 + 8 - 2) / 6)
    assert df == pytest.approx(12**2 / (6**2 / 1 + 8**2 / 2 + 2**2 / 2))
    found = estimate(values)
    half = stats.t.isf(0.025, df) * np.sqrt(2)
    assert (found.mean, found.low, found.high) == pytest.approx((4, 4 - half, 4 + half))
    assert found.p == pytest.approx(2 * stats.t.sf(4 / np.sqrt(2), df))
    assert (found.seeds, found.queries, found.left_out, found.df) == (2, 3, 0, pytest.approx(df))
    assert found.seed_sd == pytest.approx(np.sqrt(2))
    assert found.over == "queries and seeds"


def test_seeds_that_do_nothing_leave_the_t_test_over_queries() -> None:
    """Equal runs under all seeds (BM25): the seeds add no certainty."""
    of_query = np.random.default_rng(0).normal(0.1, 1, size=80)
    found = estimate(np.tile(of_query, (3, 1)))
    told = stats.ttest_1samp(of_query, 0)
    assert found.p == pytest.approx(told.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(told.confidence_interval()))
    assert found.df == 79


def test_queries_that_do_nothing_leave_the_t_test_over_seeds() -> None:
    of_seed = np.random.default_rng(1).normal(0.1, 1, size=4)
    found = estimate(np.tile(of_seed[:, None], (1, 50)))
    assert found.p == pytest.approx(stats.ttest_1samp(of_seed, 0).pvalue)
    assert found.df == 3


def test_seeds_make_it_less_certain() -> None:
    draw = np.random.default_rng(2)
    values = 0.02 + 0.01 * draw.normal(size=(3, 300))
    moved = values + np.array([[-0.03], [0.0], [0.03]])
    assert estimate(values).significant
    assert not estimate(moved).significant
    assert estimate(moved).mean == pytest.approx(estimate(values).mean)


def test_a_query_without_a_value_under_one_seed_is_left_out_of_all() -> None:
    values = np.random.default_rng(3).random((3, 20))
    holed = values.copy()
    holed[1, 4] = np.nan
    holed[:, 9] = np.nan  # in no run: nothing is lost
    found, rest = estimate(holed), estimate(np.delete(values, [4, 9], axis=1))
    assert (found.mean, found.low, found.high, found.p) == (rest.mean, rest.low, rest.high, rest.p)
    assert (found.queries, found.left_out, rest.left_out) == (18, 1, 0)


def test_one_seed_tells_of_queries_alone() -> None:
    values = np.random.default_rng(4).normal(0.1, 1, size=(1, 60))
    found = estimate(values, draw=7)
    assert (found.low, found.high) == bootstrap_interval(values[0], seed=7)
    assert found.p == found.p_holm == sign_flip_test(values[0], seed=7)
    assert found.over == "queries"
    assert np.isnan([found.df, found.seed_sd]).all()


def test_one_query_tells_nothing_of_others() -> None:
    found = estimate(np.array([[0.2], [0.4]]))
    assert (found.mean, found.p, found.over) == (pytest.approx(0.3), 1.0, "queries")


def test_equal_runs_do_not_differ() -> None:
    found = estimate(np.zeros((3, 40)))
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_no_query_in_common() -> None:
    with pytest.raises(ValueError, match="no query has a value under each of the 2 seeds"):
        estimate(np.array([[0.1, np.nan], [np.nan, 0.2]]))


# standard deviations of seeds, queries and rest, and the least and the most share of intervals that hold the mean
EFFECTS = [
    (0, 1, 1, 0.93, 0.99),
    (0.02, 1, 0.5, 0.93, 0.98),
    (0.045, 1, 0.5, 0.92, 0.98),
    (0.2, 1, 0.5, 0.9, 0.97),
    (0.1, 0, 1, 0.91, 0.97),
    (0, 0, 1, 0.94, 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "query", "rest", "least", "most"), EFFECTS)
@pytest.mark.parametrize("seeds", [3, 5])
def test_covers_the_mean_nineteen_times_in_twenty(
    seeds: int, seed: float, query: float, rest: float, least: float, most: float
) -> None:
    draw = np.random.default_rng(5)
    shape, held = (seeds, 500), []
    for _ in range(1000):
        values = (
            seed * draw.normal(size=(seeds, 1)) + query * draw.normal(size=(1, 500)) + rest * draw.normal(size=shape)
        )
        found = estimate(values)
        held.append(found.low <= 0 <= found.high)
        assert (found.p > 0.05) == held[-1]
    assert least < np.mean(held) < most
