import numpy as np
import pytest

from mmfusion.retrieval import significance
from mmfusion.retrieval.significance import bootstrap_interval


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
