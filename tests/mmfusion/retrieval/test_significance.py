import itertools
import time
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from mmfusion.retrieval import significance
from mmfusion.retrieval.significance import Paired, bootstrap_interval, corrected, holm, paired, sign_flip_test


def test_agrees_with_the_normal_interval_of_a_large_sample() -> None:
    values = np.random.default_rng(0).exponential(size=2000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    low, high = bootstrap_interval(values, resamples=4000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_covers_the_true_mean_nineteen_times_in_twenty() -> None:
    draw = np.random.default_rng(1)
    intervals = [bootstrap_interval(draw.normal(3, 1, size=60), resamples=400, seed=i) for i in range(300)]
    assert 0.9 < np.mean([low <= 3 <= high for low, high in intervals]) < 0.98


def test_queries_without_a_value_are_left_out() -> None:
    values = np.random.default_rng(2).random(50)
    assert bootstrap_interval(np.append(values, [np.nan] * 20)) == bootstrap_interval(values)


def test_depends_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).random(50)
    once = bootstrap_interval(values, seed=5)
    assert once == bootstrap_interval(values, seed=5)
    assert once != bootstrap_interval(values, seed=6)
    monkeypatch.setattr(significance, "DRAWS", 64)  # another size of block draws as many numbers
    low, high = bootstrap_interval(values, seed=5)
    assert (low, high) == pytest.approx(once, abs=0.02)


def test_equal_values_leave_no_doubt() -> None:
    assert bootstrap_interval(np.full(10, 0.25)) == (0.25, 0.25)
    assert bootstrap_interval(np.array([0.5])) == (0.5, 0.5)


def test_no_query_has_no_interval() -> None:
    assert np.isnan(bootstrap_interval(np.full(3, np.nan))).all()
    assert np.isnan(bootstrap_interval(np.zeros(0))).all()


def test_an_interval_is_what_it_was() -> None:
    """Recorded when results.json was first written: the same seed gives the same numbers for good."""
    assert bootstrap_interval(np.arange(10.0), resamples=100, seed=3) == (3.195, 6.052499999999999)


@pytest.mark.parametrize("n", range(1, 11))
def test_few_queries_are_tested_by_all_sign_patterns(n: int) -> None:
    draw = np.random.default_rng(n)
    rounded = draw.normal(0.5, 1, size=n).round(1)  # ties between sums, and zeros
    for differences in (draw.normal(0.5, 1, size=n), rounded, np.append(rounded, 0.0)):
        sums = [np.dot(differences, signs) for signs in itertools.product((-1, 1), repeat=len(differences))]
        extreme = np.abs(sums) >= abs(differences.sum()) - 1e-9
        assert sign_flip_test(differences) == np.mean(extreme)


def test_agrees_with_scipys_permutation_test() -> None:
    differences = np.random.default_rng(0).exponential(size=40) - 0.75
    drawn = sign_flip_test(differences, flips=20_000)
    oracle = stats.permutation_test(
        (differences,), lambda x, axis: x.mean(axis), permutation_type="samples", n_resamples=20_000,
        rng=np.random.default_rng(1),
    )  # fmt: skip
    assert 0.01 < oracle.pvalue < 0.5
    assert drawn == pytest.approx(oracle.pvalue, abs=0.015)


def test_many_queries_come_near_the_t_test() -> None:
    for seed, shift in enumerate((0.0, 0.02, 0.05)):
        differences = np.random.default_rng(seed).normal(shift, 1, size=3000)
        expected = stats.ttest_1samp(differences, 0).pvalue
        assert sign_flip_test(differences) == pytest.approx(expected, abs=0.006)


def test_p_is_uniform_where_runs_are_alike() -> None:
    draw = np.random.default_rng(2)
    p = np.array([sign_flip_test(draw.laplace(size=60), flips=2000, seed=i) for i in range(500)])
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert np.mean(p < 0.05) < 0.075


def test_p_is_never_zero_and_one_without_a_difference() -> None:
    assert sign_flip_test(np.full(100, 0.1), flips=10_000) == 1 / 10_001
    assert sign_flip_test(np.zeros(50)) == 1
    assert sign_flip_test(np.full(3, 0.1)) == 0.25  # of 8 patterns, +++ and ---


def test_a_test_depends_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = np.random.default_rng(3).normal(0.2, 1, size=50)
    once = sign_flip_test(differences, flips=5000, seed=5)
    assert once == sign_flip_test(differences, flips=5000, seed=5) != sign_flip_test(differences, flips=5000, seed=6)
    assert once == sign_flip_test(-differences, flips=5000, seed=5)
    monkeypatch.setattr(significance, "DRAWS", 999)  # smaller blocks draw other numbers
    assert sign_flip_test(differences, flips=5000, seed=5) == pytest.approx(once, abs=0.02)


def test_ten_thousand_queries_take_a_second_and_little_memory() -> None:
    differences = np.random.default_rng(4).normal(size=10_000)
    start = time.process_time()
    sign_flip_test(differences)
    assert time.process_time() - start < 10  # 0.6 s on the machine that it was written on
    tracemalloc.start()
    sign_flip_test(differences, flips=10_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * 2**20


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02], rtol=1e-12)
    np.testing.assert_allclose(holm(np.array([0.5, 0.9, 0.02])), [1.0, 1.0, 0.06], rtol=1e-12)
    assert holm(np.array([0.3])) == [0.3]
    assert len(holm(np.zeros(0))) == 0


def test_holm_finds_a_difference_by_luck_once_in_twenty_families() -> None:
    draw = np.random.default_rng(5)
    assert np.mean([holm(draw.random(8)).min() < 0.05 for _ in range(2000)]) == pytest.approx(0.05, abs=0.015)


def test_runs_are_paired_on_the_queries_that_both_have() -> None:
    before = np.array([0.1, 0.2, np.nan, 0.4, np.nan, 0.3])
    after = np.array([0.2, np.nan, 0.5, 0.7, np.nan, 0.5])
    test = paired("A", "B", "relevance/mrr", before, after)
    assert (test.queries, test.left_out) == (3, 2)
    assert test.difference == pytest.approx(0.2)
    assert (test.low, test.high) == bootstrap_interval(after[[0, 3, 5]] - before[[0, 3, 5]])
    assert test.p == test.p_holm == 0.25
    back = paired("B", "A", "relevance/mrr", after, before)
    assert (back.difference, back.p) == (-test.difference, test.p)
    assert (back.low, back.high) == pytest.approx((-test.high, -test.low), abs=0.05)


def test_the_paired_interval_is_narrower_than_two_apart() -> None:
    draw = np.random.default_rng(6)
    before = draw.random(500)
    test = paired("A", "B", "m", before, before + draw.normal(0.01, 0.02, size=500))
    low, high = bootstrap_interval(before)
    assert test.high - test.low < (high - low) / 5
    assert test.low < 0.01 < test.high


def test_no_common_query_is_an_error() -> None:
    with pytest.raises(ValueError, match="runs A and B have no query with relevance/mrr in common"):
        paired("A", "B", "relevance/mrr", np.array([0.1, np.nan]), np.array([np.nan, 0.2]))


def verdict(difference: float, low: float, high: float, p: float) -> str:
    return Paired("A", "B", "relevance/ndcg@10", 100, 0, difference, low, high, p, p).verdict


@pytest.mark.parametrize(
    ("numbers", "line"),
    [
        ((0.0211, 0.0119, 0.0302, 0.0004), "B is better by .021 [.012, .030], p = .0004"),
        ((-0.0211, -0.0302, -0.0119, 0.012), "B is worse by .021 [.012, .030], p = .012"),
        (
            (0.02, -0.0011, 0.03, 0.02),
            "B is probably better by .020 [-.001, .030], p = .02, but the interval includes 0",
        ),
        (
            (-0.02, -0.03, 0.0, 0.02),
            "B is probably worse by .020 [.000, .030], p = .02, but the interval includes 0",
        ),
        ((0.021, 0.0011, 0.04, 0.0499), "B is better by .021 [.001, .040], p = .0499"),
        ((0.021, 0.0011, 0.04, 0.049999), "B is better by .021 [.001, .040], p = .049999"),
        ((0.021, 0.0011, 0.04, 0.0494), "B is better by .021 [.001, .040], p = .049"),
        ((0.021, 0.0011, 0.04, 0.05), "B and A do not differ significantly: +.021 [.001, .040], p = .05"),
        ((0.021, 0.0011, 0.04, 0.0501), "B and A do not differ significantly: +.021 [.001, .040], p = .05"),
        ((0.3, 0.2, 1.0, 0.00001), "B is better by .300 [.200, 1.000], p < .0001"),
        ((0.003, -0.004, 0.01, 0.4107), "B and A do not differ significantly: +.003 [-.004, .010], p = .41"),
        ((-0.003, -0.01, -0.0001, 0.051), "B and A do not differ significantly: -.003 [-.010, .000], p = .051"),
        ((0.0, 0.0, 0.0, 1.0), "B and A do not differ significantly: .000 [.000, .000], p = 1"),
    ],
)
def test_verdicts(numbers: tuple[float, float, float, float], line: str) -> None:
    assert verdict(*numbers) == line


def test_many_tests_are_judged_by_their_corrected_p() -> None:
    single = [Paired("A", "B", f"m{i}", 100, 0, 0.02, 0.001, 0.04, p, p) for i, p in enumerate((0.03, 0.001, 0.2))]
    assert [test.significant for test in single] == [True, True, False]
    together = corrected(single)
    assert [test.p for test in together] == [0.03, 0.001, 0.2]
    assert [test.p_holm for test in together] == pytest.approx([0.06, 0.003, 0.2])
    assert [test.significant for test in together] == [False, True, False]
    assert together[0].verdict.endswith("p = .06")
    assert corrected([]) == []
