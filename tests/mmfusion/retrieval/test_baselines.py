import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from mmfusion.retrieval import baselines
from mmfusion.retrieval.baselines import (
    BM25,
    GRID,
    choose_weight,
    random_ranking,
    reciprocal_rank_fusion,
    weighted_sum,
)
from mmfusion.retrieval.topk import TopK, tie_ranks

WORDS = ["red", "blue", "green", "hat", "cup", "lamp", "shoe", "of", "the", "5", "ünder", "naïve"]
Lists = list[list[tuple[float, int]]]  # per query, (score, id), best first


def drawn_texts(count: int, most: int, seed: int) -> list[str]:
    """Few different words, often repeated, so that many texts tie; some texts are empty."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(0, most + 1, count)
    return [" ".join(draw.choice(WORDS, size=length)) for length in lengths]


def catalogue(size: int) -> list[str]:
    """Id strings whose order is neither that of the numbers nor that of the dense ids."""
    return [str(number) for number in np.random.default_rng(1).permutation(size)]


def rows(top: TopK) -> Lists:
    """What a TopK holds, without its padding, which must come last."""
    found = []
    for scores, ids in zip(top.scores.tolist(), top.ids.tolist(), strict=True):
        count = sum(id >= 0 for id in ids)
        assert (ids[count:], scores[count:]) == ([-1] * (len(ids) - count), [-math.inf] * (len(ids) - count))
        found.append(list(zip(scores[:count], ids[:count], strict=True)))
    return found


def ranked(scores: dict[int, float], strings: Sequence[str], k: int) -> list[tuple[float, int]]:
    """Sorted by fp32 score, then id string, both descending."""
    order = sorted(scores, key=lambda id: (np.float32(scores[id]), strings[id]), reverse=True)
    return [(float(np.float32(scores[id])), id) for id in order[:k]]


def slow_bm25(texts: list[list[str]], query: list[str]) -> dict[int, float]:
    """Robertson's weights with Lucene's idf, written out per pair; k1 1.5, b .75."""
    mean = sum(map(len, texts)) / len(texts)
    scores: dict[int, float] = {}
    for id, text in enumerate(texts):
        for word in query:
            tf, df = text.count(word), sum(word in other for other in texts)
            if tf:
                idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
                scores[id] = scores.get(id, 0.0) + idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(text) / mean))
    return scores


@pytest.mark.parametrize("k", [1, 10, 400])
def test_bm25_is_the_slow_formula_with_our_ties(k: int) -> None:
    texts, strings = drawn_texts(120, 6, seed=0), catalogue(120)
    queries = [*drawn_texts(25, 4, seed=1), "hat hat cup", "unheard of"]
    found = BM25(texts).search(queries, tie_ranks(strings), k)
    assert found.ids.shape == (27, k)
    split = [text.split() for text in texts]
    assert rows(found) == [ranked(slow_bm25(split, query.split()), strings, k) for query in queries]
    assert any(len({score for score, _ in row}) < len(row) for row in rows(found)) or k == 1


def test_words_are_lower_case_letters_and_digits_of_any_script() -> None:
    texts = ["Größe-5 T-Shirt", "ПЛАТЬЕ, красное!", "the"]
    queries = ["GRÖSSE größe", "5", "платье", "t", "shirts", "The"]
    found = BM25(texts).search(queries, tie_ranks("abc"), 3)
    assert [[id for _, id in row] for row in rows(found)] == [[0], [0], [1], [0], [], [2]]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("queries", [["", "!?", "unknown words"], []])
@pytest.mark.parametrize("texts", [["a b", "c"], ["", "--"]])
def test_what_no_word_finds_is_padding(texts: list[str], queries: list[str], capfd: pytest.CaptureFixture) -> None:
    found = BM25(texts).search(queries, tie_ranks("xy"), 3)
    assert found.ids.tolist() == [[-1] * 3] * len(queries)
    assert found.scores.tolist() == [[-math.inf] * 3] * len(queries)
    assert capfd.readouterr() == ("", "")


def test_bm25_is_the_same_whatever_the_chunks_and_however_often(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, queries, tie = drawn_texts(150, 5, 2), drawn_texts(40, 3, 3), tie_ranks(catalogue(150))
    once = BM25(texts).search(queries, tie, 7)
    for cells in (1, 700, 3000):
        monkeypatch.setattr(baselines, "CELLS", cells)
        again = BM25(texts).search(queries, tie, 7)
        assert torch.equal(again.ids, once.ids)
        assert torch.equal(again.scores, once.scores)


def test_a_random_order_depends_on_seed_and_query_alone() -> None:
    whole = random_ranking(np.arange(30), 50, 50, seed=4)
    assert whole.ids.sort().values.tolist() == [list(range(50))] * 30
    assert len({tuple(row) for row in whole.ids.tolist()}) == 30
    assert whole.scores[0].tolist() == [-float(rank) for rank in range(1, 51)]
    part = random_ranking(np.array([17, 3]), 50, 8, seed=4)
    assert part.ids.tolist() == whole.ids[[17, 3], :8].tolist()
    assert not torch.equal(random_ranking(np.arange(30), 50, 50, seed=5).ids, whole.ids)


def test_a_random_order_favours_no_product() -> None:
    """Each of 9 products stands first, and third, in a ninth of 9000 orders; also of those that start with another."""
    ids = random_ranking(np.arange(9000), 9, 3, seed=0).ids.numpy()
    for rank in range(3):
        assert np.abs(np.bincount(ids[:, rank], minlength=9) - 1000).max() < 4 * math.sqrt(1000)
    after = np.bincount(ids[ids[:, 0] == 4, 1], minlength=9)
    assert after[4] == 0
    assert np.abs(np.delete(after, 4) - 125).max() < 4 * math.sqrt(125)


def test_a_random_order_of_few_products_is_padded() -> None:
    assert rows(random_ranking(np.arange(2), 3, 5, seed=0))[0][2][0] == -3
    assert [len(row) for row in rows(random_ranking(np.arange(2), 3, 5, seed=0))] == [3, 3]
    assert random_ranking(np.zeros(0, np.int64), 3, 5, seed=0).ids.shape == (0, 5)


def top_of(lists: Lists, k: int) -> TopK:
    scores = [[score for score, _ in row] + [-math.inf] * (k - len(row)) for row in lists]
    ids = [[id for _, id in row] + [-1] * (k - len(row)) for row in lists]
    return TopK(
        torch.tensor(scores, dtype=torch.float32).reshape(-1, k), torch.tensor(ids, dtype=torch.int64).reshape(-1, k)
    )


def drawn_lists(k: int, seed: int, queries: int = 40, products: int = 30) -> TopK:
    """Lists of any length from none to k; scores of both signs, of few values, all equal in some lists."""
    draw, strings = np.random.default_rng(seed), catalogue(products)
    lists = []
    for _ in range(queries):
        ids = draw.permutation(products)[: draw.integers(0, k + 1)].tolist()
        lists.append(ranked({id: float(draw.integers(0, draw.integers(1, 9)) / 3 - 1) for id in ids}, strings, k))
    return top_of(lists, k)


def slow_rrf(lists: Sequence[list[tuple[float, int]]]) -> dict[int, float]:
    scores: dict[int, float] = {}
    for row in lists:
        for rank, (_, id) in enumerate(row, 1):
            scores[id] = scores.get(id, 0.0) + 1 / (60 + rank)
    return scores


def slow_sum(first: list[tuple[float, int]], second: list[tuple[float, int]], weight: float) -> dict[int, float]:
    scores: dict[int, float] = {}
    for row, share in ((first, weight), (second, 1 - weight)):
        values = [score for score, _ in row]
        for score, id in row:
            scaled = (score - min(values)) / (max(values) - min(values)) if max(values) > min(values) else 1.0
            scores[id] = scores.get(id, 0.0) + share * scaled
    return scores


@pytest.mark.parametrize("depths", [(10,), (10, 10), (12, 3), (5, 20, 10), (1, 1)])
@pytest.mark.parametrize("k", [1, 8, 50])
@pytest.mark.parametrize("cells", [1, 200, 2_000_000])
def test_rank_fusion_is_the_slow_loop(
    depths: tuple[int, ...], k: int, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "CELLS", cells)
    lists = [drawn_lists(depth, seed) for seed, depth in enumerate(depths)]
    found = reciprocal_rank_fusion(lists, tie_ranks(catalogue(30)), k)
    expected = [ranked(slow_rrf(row), catalogue(30), k) for row in zip(*map(rows, lists), strict=True)]
    assert rows(found) == expected


@pytest.mark.parametrize("depths", [(10, 10), (12, 3), (1, 1)])
@pytest.mark.parametrize("weight", [0.0, 0.35, 0.5, 1.0])
@pytest.mark.parametrize("cells", [1, 200, 2_000_000])
def test_weighted_sum_is_the_slow_loop(
    depths: tuple[int, int], weight: float, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "CELLS", cells)
    first, second = (drawn_lists(depth, seed) for seed, depth in enumerate(depths))
    found = weighted_sum(first, second, weight, tie_ranks(catalogue(30)), 8)
    lists = zip(rows(first), rows(second), strict=True)
    assert rows(found) == [ranked(slow_sum(one, other, weight), catalogue(30), 8) for one, other in lists]


def test_rank_fusion_by_hand() -> None:
    first, second = top_of([[(9.0, 0), (8.0, 1), (7.0, 2)]], 3), top_of([[(0.3, 2), (0.2, 3)]], 3)
    found = reciprocal_rank_fusion([first, second], torch.arange(4), 5)
    assert found.ids.tolist() == [[2, 0, 3, 1, -1]]  # 3 before 1: both are second somewhere, and 3 ties higher
    assert found.scores[0, :4].tolist() == pytest.approx([1 / 63 + 1 / 61, 1 / 61, 1 / 62, 1 / 62])
    assert reciprocal_rank_fusion([first, second], torch.arange(4), 5, constant=0).ids.tolist() == [[2, 0, 3, 1, -1]]


def test_weighted_sum_by_hand() -> None:
    first = top_of([[(4.0, 0), (3.0, 1), (2.0, 2)], [(-1.0, 3)], []], 3)
    second = top_of([[(0.2, 2), (-0.2, 1)], [(5.0, 1), (5.0, 0)], []], 3)
    found = weighted_sum(first, second, 0.25, torch.arange(4), 3)
    assert found.ids.tolist() == [[2, 0, 1], [1, 0, 3], [-1, -1, -1]]
    assert found.scores[:2].tolist() == [pytest.approx([0.75, 0.25, 0.125]), pytest.approx([0.75, 0.75, 0.25])]


def test_the_ends_of_the_weights_are_the_lists_themselves() -> None:
    first, second = drawn_lists(9, 0), drawn_lists(9, 1)
    tie = tie_ranks(catalogue(30))
    for weight, alone in ((1.0, first), (0.0, second)):
        for row, other in zip(rows(weighted_sum(first, second, weight, tie, 30)), rows(alone), strict=True):
            positive = [id for score, id in row if score > 0]
            assert positive == [id for _, id in other][: len(positive)]


@pytest.mark.parametrize(
    ("measure", "weight"),
    [
        (lambda score: score, 1.0),
        (lambda score: -score, 0.0),
        (lambda score: -abs(score - 0.7), 0.7),
        (lambda score: 0.0, 0.5),
        (lambda score: math.nan, 0.5),
        (lambda score: score if score < 0.22 else math.nan, 0.2),
        (lambda score: abs(score - 0.5) > 0.18, 0.3),  # .3 and .7 are as good and as near
        (lambda score: score > 0.58, 0.6),
    ],
)
def test_the_weight_that_measures_best(measure: Callable[[float], float], weight: float) -> None:
    """Product 0 is first in the first list alone, so its score is the weight."""
    first, second = top_of([[(2.0, 0), (1.0, 1)]], 2), top_of([[(2.0, 1), (1.0, 2)]], 2)

    def measured(top: TopK) -> float:
        assert top.ids.shape == (1, 2)
        score = dict(zip(top.ids[0].tolist(), top.scores[0].tolist(), strict=True)).get(0, 0.0)
        return float(measure(score))

    assert choose_weight(first, second, torch.arange(3), measured) == weight
    assert choose_weight(first, second, torch.arange(3), measured, grid=[0.5]) == 0.5


def test_the_grid() -> None:
    assert len(GRID) == 21
    assert GRID[0] == 0
    assert GRID[-1] == 1
    assert [round(weight * 100) for weight in GRID] == list(range(0, 101, 5))
