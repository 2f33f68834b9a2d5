"""Drawing hard negatives, against a slow drawing from lists and against what chance allows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.negatives import RANDOM, Candidates
from datamodules.stream.substitutes import TRIES
from tests.datamodules.slow_negatives import slow_draw

Pairs = list[tuple[int, int]]
PRODUCTS = 9
pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, PRODUCTS - 1)), max_size=25)


def arrays(listed: Pairs) -> tuple[np.ndarray, np.ndarray]:
    query, product = zip(*listed, strict=True) if listed else ((), ())
    return np.array(query, np.int64), np.array(product, np.int64)


def candidates(positives: Pairs, sources: list[Pairs], products: int = PRODUCTS, queries: int = 4) -> Candidates:
    return Candidates.of(queries, products, arrays(positives), [arrays(source) for source in sources])


@settings(max_examples=100, deadline=None)
@given(pairs, st.lists(pairs, max_size=3), st.integers(0, 4), st.integers(-5, 5), st.integers(0, 3))
def test_it_is_the_slow_drawing(positives: Pairs, sources: list[Pairs], k: int, seed: int, epoch: int) -> None:
    made = candidates(positives, sources)
    asked = [(q, p) for q in range(4) for p in (0, 3, 8) if PRODUCTS - len({x for y, x in positives if y == q}) >= k]
    query, product = arrays(asked)
    found, source = made.draw(seed, epoch, query, product, k)
    assert found.shape == source.shape == (len(asked), k)
    for row, (q, p) in enumerate(asked):
        expected = slow_draw((seed, epoch), q, p, k, positives, sources, PRODUCTS)
        assert list(zip(found[row].tolist(), source[row].tolist(), strict=True)) == expected


@settings(max_examples=100, deadline=None)
@given(pairs, pairs)
def test_free_counts_what_is_no_positive(positives: Pairs, source: Pairs) -> None:
    made = candidates(positives, [source])
    expected = [PRODUCTS - len({p for q, p in positives if q == query}) for query in range(4)]
    assert made.free(np.arange(4)).tolist() == expected


def test_by_hand() -> None:
    """Query 0: products 1 and 3 are positives, 0, 3 and 4 are listed; so 0 and 4 are drawn, and then 2."""
    made = candidates([(0, 1), (0, 3)], [[(0, 4), (0, 3)], [(0, 0), (0, 4)]], products=5, queries=1)
    for epoch in range(20):
        found, source = made.draw(0, epoch, np.array([0]), np.array([1]), 3)
        assert sorted(found[0, :2].tolist()) == [0, 4]
        assert dict(zip(found[0].tolist(), source[0].tolist(), strict=True)) == {4: 1, 0: 2, 2: RANDOM}


def drawn(made: Candidates, tuples: int, k: int) -> np.ndarray:
    """Negatives of query 0 with several products in 20 epochs."""
    product = np.arange(tuples // 20)
    return np.concatenate([made.draw(5, epoch, product * 0, product, k)[0] for epoch in range(20)])


def test_every_candidate_comes_equally_often_in_every_place() -> None:
    """Chi-square over 20,000 tuples; with 11 degrees of freedom 31.3 is exceeded once in 1,000 fair drawings."""
    n, k, tuples = 12, 3, 20_000
    made = candidates([(0, 0)], [[(0, 2 * i + 1) for i in range(n)]], products=40, queries=1)
    found = drawn(made, tuples, k)
    assert (np.sort(found, 1)[:, 1:] > np.sort(found, 1)[:, :-1]).all()
    for column in found.T:
        seen = np.bincount(column, minlength=40)[1 : 2 * n : 2]
        assert seen.sum() == tuples
        assert ((seen - tuples / n) ** 2 / (tuples / n)).sum() < 31.3
    together = np.bincount(found[:, 0] * 40 + found[:, 1], minlength=1600)
    expected = tuples / (n * (n - 1))
    filled = together[together > 0]
    assert len(filled) == n * (n - 1)
    assert ((filled - expected) ** 2 / expected).sum() < 185.3  # 131 degrees of freedom, 1 in 1,000


def test_random_ones_are_as_even_and_never_positives() -> None:
    made = candidates([(0, p) for p in range(0, 30, 3)], [[(0, 1)]], products=30, queries=1)
    found = drawn(made, 10_000, 3)
    assert (found[:, 0] == 1).all()
    for column in found[:, 1:].T:
        seen = np.bincount(column, minlength=30)
        assert not seen[::3].any()
        assert not seen[1]
        counts = seen[seen > 0]
        assert len(counts) == 19
        assert ((counts - 10_000 / 19) ** 2 / (10_000 / 19)).sum() < 42.3  # 18 degrees of freedom


def test_it_depends_on_seed_epoch_query_and_product_alone() -> None:
    random = np.random.default_rng(0)
    listed = [(q, p) for q in range(20) for p in range(200) if random.random() < 0.3]
    made = candidates([], [listed], products=200, queries=20)
    query, product = np.repeat(np.arange(20), 10), np.tile(np.arange(10), 20)
    whole, _ = made.draw(3, 4, query, product, 4)
    order = random.permutation(200)[:50]
    assert (made.draw(3, 4, query[order], product[order], 4)[0] == whole[order]).all()
    assert (made.draw(3, 4, query, product, 2)[0] == whole[:, :2]).all()  # fewer are the first of more
    for other in (made.draw(2, 4, query, product, 4), made.draw(3, 5, query, product, 4)):
        assert (np.sort(other[0], 1) == np.sort(whole, 1)).all(1).mean() < 0.05
    assert len({tuple(row) for row in whole[:10].tolist()}) == 10  # of one query's tuples


def test_what_comes_instead_is_allowed_and_another_each_time() -> None:
    positives = [(0, p) for p in range(0, 200, 2)]
    made = candidates(positives, [], products=200, queries=1)
    first = list(made.instead(0, 0, 0, 4, 1, [7, 9]))
    assert len(first) == TRIES
    assert all(id % 2 == 1 and id not in (7, 9) for id in first)
    assert first == list(made.instead(0, 0, 0, 4, 1, [7, 9]))
    for other in ((1, 0, 0, 4, 1), (0, 1, 0, 4, 1), (0, 0, 0, 6, 1), (0, 0, 0, 4, 2)):
        assert list(made.instead(*other, [7, 9])) != first


@settings(max_examples=100, deadline=None)
@given(pairs, st.data())
def test_instead_of_taken_ones_come_exactly_the_others(positives: Pairs, data: st.DataObject) -> None:
    made = candidates(positives, [])
    for query in range(4):
        free = sorted(set(range(PRODUCTS)) - {p for q, p in positives if q == query})
        taken = data.draw(st.lists(st.sampled_from(free), unique=True)) if free else []
        found = [list(made.instead(seed, 0, query, 0, 0, taken)) for seed in range(4)]
        assert {id for ids in found for id in ids} == set(free) - set(taken)  # of 256, one of 9 is missed in 10^13
        assert {len(ids) for ids in found} == {TRIES if set(free) - set(taken) else 0}


@pytest.mark.parametrize("queries", [0, 3])
def test_nothing_listed_and_nothing_asked(queries: int) -> None:
    made = candidates([], [], queries=queries)
    none = np.zeros(0, np.int64)
    for k in (0, 2):
        found, source = made.draw(0, 0, none, none, k)
        assert found.shape == source.shape == (0, k)


def test_ids_are_those_of_large_catalogues() -> None:
    """300 million products and the last of a million queries: nothing overflows."""
    products, queries = 300_000_000, 1_000_000
    made = candidates(
        [(queries - 1, 0), (queries - 1, products - 2)], [[(queries - 1, products - 1)]], products, queries
    )
    found, source = made.draw(0, 0, np.array([queries - 1]), np.array([0]), 2)
    assert found[0, 0] == products - 1
    assert source[0].tolist() == [1, RANDOM]
    assert 0 < found[0, 1] < products - 2
