import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from mmfusion.retrieval import topk
from mmfusion.retrieval.topk import TopK, exact_dot, merge, search, tie_ranks
from mmfusion.retrieval.vectors import VectorFile, write_vectors

Setting = tuple[Tensor, Tensor, Tensor, list[str]]


def catalogue(size: int) -> list[str]:
    """Id strings whose order is neither that of the numbers nor that of the dense ids."""
    return [str(number) for number in np.random.default_rng(1).permutation(size)]


def gaussian(queries: int = 7, products: int = 120, dim: int = 13) -> Setting:
    generator = torch.Generator().manual_seed(0)
    strings = catalogue(products + 30)  # the corpus is a part of the catalogue
    ids = torch.randperm(products + 30, generator=generator)[:products]
    draw = torch.randn(queries + products, dim, generator=generator)
    return draw[:queries], draw[queries:], ids, strings


def all_equal() -> Setting:
    queries, corpus, ids, strings = gaussian()
    return queries, corpus[:1].repeat(len(corpus), 1), ids, strings


def few_values() -> Setting:
    """Scores of a few small integers, both signs and zero: wide ties everywhere, and exact in any precision."""
    queries, corpus, ids, strings = gaussian(products=300, dim=3)
    return queries.round().clamp(-1, 1), corpus.round().clamp(-1, 1), ids, strings


def collapsed() -> Setting:
    """Vectors that differ by about one rounding error: fp32 products put them in another order."""
    queries, corpus, ids, strings = gaussian(products=200, dim=64)
    return queries, corpus[:1] + 1e-7 * corpus, ids, strings


def negative() -> Setting:
    queries, corpus, ids, strings = gaussian()
    return -queries.abs(), corpus.abs(), ids, strings


def ascending() -> Setting:
    """Scores rise from product to product, by 3e-5 of themselves at the end: every group beats all before it."""
    queries, corpus, ids, strings = gaussian(products=2500, dim=8)
    slope = torch.linspace(0.1, 1, len(corpus))[:, None]
    return queries[:1].sign() * queries.abs(), slope * queries[:1].sign(), ids, strings


def descending() -> Setting:
    """The best come first, so that nothing else is looked into."""
    queries, corpus, ids, strings = ascending()
    return queries, corpus.flip(0), ids, strings


def opposed() -> Setting:
    """To some queries each group is better than all before it, to the others worse."""
    queries, corpus, ids, strings = ascending()
    return queries * torch.tensor([1, -1, 1, 1, -1, 1, 1])[:, None], corpus, ids, strings


def clustered() -> Setting:
    """Like products lie side by side: the best of a query are in few groups, which other queries pass over."""
    queries, corpus, ids, strings = gaussian(products=2500, dim=16)
    centres = torch.randn(50, 16, generator=torch.Generator().manual_seed(4))
    return centres[:7] + 0.2 * queries, centres.repeat_interleave(50, 0) + 0.2 * corpus, ids, strings


def wide_ties() -> Setting:
    """About 100 copies of each of 27 vectors: many more equal scores than there are places."""
    queries, corpus, ids, strings = gaussian(products=2500, dim=3)
    return queries.round().clamp(-1, 1), corpus.round().clamp(-1, 1), ids, strings


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
SETTINGS = [gaussian, all_equal, few_values, collapsed, negative]
MANY_GROUPS = [ascending, descending, opposed, clustered, wide_ties]


def slow_search(queries: Tensor, corpus: Tensor, ids: Tensor, strings: list[str], k: int) -> tuple[list, list]:
    """Sorts every product by (score, id string), both descending; scores are fp64 sums rounded to fp32."""
    scores, found = [], []
    for query in queries.double():
        row = (query * corpus.double()).sum(1).float().tolist()
        ranked = sorted(zip(row, (strings[i] for i in ids.tolist()), ids.tolist(), strict=True), reverse=True)[:k]
        pad = k - len(ranked)
        scores.append([score for score, _, _ in ranked] + [-np.inf] * pad)
        found.append([i for _, _, i in ranked] + [-1] * pad)
    return scores, found


def assert_same(ours: TopK, theirs: TopK) -> None:
    assert torch.equal(ours.ids.cpu(), theirs.ids)
    assert torch.equal(ours.scores.cpu().view(torch.int32), theirs.scores.view(torch.int32))  # to the bit


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("k", [1, 10, 400])
def test_search_sorts_as_the_slow_reference(setting: Callable[[], Setting], k: int) -> None:
    queries, corpus, ids, strings = setting()
    found = search(queries, corpus, ids, tie_ranks(strings), k)
    scores, expected = slow_search(queries, corpus, ids, strings, k)
    assert found.ids.tolist() == expected
    assert found.scores.tolist() == scores


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("setting", MANY_GROUPS)
@pytest.mark.parametrize("k", [1, 10])
def test_groups_that_are_passed_over_hide_nothing(setting: Callable[[], Setting], k: int, device: str) -> None:
    queries, corpus, ids, strings = setting()
    tie, (scores, expected) = tie_ranks(strings), slow_search(queries, corpus, ids, strings, k)
    for chunk in (1, 7, 1000, 16_384):
        found = search(queries.to(device), corpus, ids, tie, k, chunk=chunk)
        assert found.ids.tolist() == expected
        assert found.scores.tolist() == scores


def test_a_million_products() -> None:
    """Vectors of small integers: scores are exact, and each is shared by thousands of products."""
    generator, size = torch.Generator().manual_seed(5), 10**6
    queries = torch.randint(-3, 4, (4, 6), generator=generator)
    corpus = torch.randint(-3, 4, (size, 6), generator=generator)
    tie = torch.randperm(size, generator=generator)
    found = search(queries.float(), corpus.float(), torch.arange(size), tie, 100)
    order = ((queries @ corpus.T) * size + tie).argsort(1, descending=True)[:, :100]
    assert torch.equal(found.ids, order)
    assert torch.equal(found.scores, (queries @ corpus.T).gather(1, order).float())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_chunk_size_and_device_gives_the_same_bits(setting: Callable[[], Setting], device: str) -> None:
    queries, corpus, ids, strings = setting()
    tie = tie_ranks(strings)
    whole = search(queries, corpus, ids, tie, 10)
    for chunk in [*range(1, 20), *range(20, len(corpus) + 2, 17)]:
        assert_same(search(queries.to(device), corpus, ids, tie, 10, chunk=chunk), whole)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("cuts", [[60, 60], [1, 100, 19], [0, 5, 115]])
def test_shards_of_the_corpus_give_the_same_bits(setting: Callable[[], Setting], cuts: list[int]) -> None:
    queries, corpus, ids, strings = setting()
    cuts, tie = [*cuts, len(corpus) - sum(cuts)], tie_ranks(strings)
    parts = zip(corpus.split(cuts), ids.split(cuts), strict=True)
    merged = merge([search(queries, part, part_ids, tie, 10) for part, part_ids in parts], tie, 10)
    assert_same(merged, search(queries, corpus, ids, tie, 10))


@pytest.mark.parametrize("setting", SETTINGS)
def test_blocks_of_queries_and_pairs_give_the_same_bits(
    setting: Callable[[], Setting], monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, corpus, ids, strings = setting()
    whole = search(queries, corpus, ids, tie_ranks(strings), 10)
    monkeypatch.setattr(topk, "QUERIES", 4)
    monkeypatch.setattr(topk, "PAIRS", 5)
    monkeypatch.setattr(topk, "GROUP", 3)
    assert_same(search(queries, corpus, ids, tie_ranks(strings), 10), whole)


def test_order_of_the_corpus_does_not_matter() -> None:
    queries, corpus, ids, strings = few_values()
    turned = torch.randperm(len(ids), generator=torch.Generator().manual_seed(3))
    tie = tie_ranks(strings)
    assert_same(search(queries, corpus[turned], ids[turned], tie, 50), search(queries, corpus, ids, tie, 50))


def test_equal_scores_go_by_id_string_descending() -> None:
    strings = ["9", "10", "b", "a", "é"]
    found = search(torch.ones(1, 2), torch.ones(5, 2), torch.arange(5), tie_ranks(strings), 5)
    assert [strings[i] for i in found.ids[0].tolist()] == ["é", "b", "a", "9", "10"]


def test_zero_of_either_sign_is_one_score() -> None:
    corpus = torch.tensor([[-0.0], [0.0], [-0.0]])
    found = search(torch.ones(1, 1), corpus, torch.arange(3), tie_ranks(["a", "b", "c"]), 3)
    assert found.ids.tolist() == [[2, 1, 0]]


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 64, 385])
def test_exact_dot_is_the_true_product_rounded(dim: int) -> None:
    left, right = torch.randn(2, 20, dim, generator=torch.Generator().manual_seed(dim))
    true = [
        math.fsum(x * y for x, y in zip(*row, strict=True)) for row in zip(left.tolist(), right.tolist(), strict=True)
    ]
    assert exact_dot(left, right).tolist() == torch.tensor(true, dtype=torch.float64).float().tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_corpus_is_widened(dtype: torch.dtype) -> None:
    queries, corpus, ids, strings = gaussian()
    tie = tie_ranks(strings)
    assert_same(
        search(queries, corpus.to(dtype), ids, tie, 10), search(queries, corpus.to(dtype).float(), ids, tie, 10)
    )


def test_corpus_may_be_a_memory_mapped_tensor(tmp_path: Path) -> None:
    queries, corpus, ids, strings = gaussian()
    np.save(tmp_path / "corpus.npy", corpus.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "corpus.npy", mmap_mode="r+"))
    tie = tie_ranks(strings)
    assert_same(search(queries, mapped, ids, tie, 10, chunk=16), search(queries, corpus, ids, tie, 10))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_corpus_may_be_a_file_of_vectors(
    setting: Callable[[], Setting], dtype: Literal["float16", "float32"], device: str, tmp_path: Path
) -> None:
    queries, corpus, ids, strings = setting()
    write_vectors(tmp_path / "corpus.npy", corpus.split(50), dtype)
    corpus, tie = corpus.to(getattr(torch, dtype)), tie_ranks(strings)
    found = search(queries.to(device), VectorFile(tmp_path / "corpus.npy"), ids, tie, 10, chunk=16)
    assert_same(found, search(queries, corpus, ids, tie, 10))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("autocast", [False, True])
def test_reduced_precision_changes_nothing_and_stays_as_it_was(device: str, precision: str, autocast: bool) -> None:
    """TF32 and bf16 are off by far more than the error bound of a product allows."""
    queries, corpus, ids, strings = gaussian(products=2000, dim=64)
    before, expected = torch.get_float32_matmul_precision(), search(queries, corpus, ids, tie_ranks(strings), 10)
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            assert_same(search(queries.to(device), corpus, ids, tie_ranks(strings), 10), expected)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_nothing_to_search_or_to_search_for() -> None:
    queries, corpus, ids, strings = gaussian()
    found = search(queries, corpus[:0], ids[:0], tie_ranks(strings), 3)
    assert found.ids.tolist() == [[-1] * 3] * len(queries)
    assert search(queries[:0], corpus, ids, tie_ranks(strings), 3).ids.shape == (0, 3)


def test_an_id_that_occurs_twice_is_an_error() -> None:
    queries, corpus, ids, strings = gaussian()
    with pytest.raises(ValueError, match=f"product id {int(ids[0])} more than once"):
        search(queries, corpus, torch.cat([ids[:1], ids[:1], ids[2:]]), tie_ranks(strings), 3)


@pytest.mark.parametrize("which", ["queries", "corpus"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_vectors_that_are_not_finite_are_an_error(which: str, bad: float) -> None:
    queries, corpus, ids, strings = gaussian()
    {"queries": queries, "corpus": corpus}[which][3, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        search(queries, corpus, ids, tie_ranks(strings), 3, chunk=50)
