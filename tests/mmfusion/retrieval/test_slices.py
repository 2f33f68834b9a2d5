from pathlib import Path

import numpy as np
import pytest

from datamodules.catalogue import read_catalogue
from datamodules.importing.writer import write_shards
from datamodules.tuples import TupleDataModule
from mmfusion.batch import Judgments
from mmfusion.retrieval import slices
from mmfusion.retrieval.significance import bootstrap_interval
from mmfusion.retrieval.slices import (
    find_columns,
    product_slices,
    query_slices,
    slice_by_product,
    slice_by_query,
    stated_columns,
)
from tests.datamodules.small import write_rows

# text, split, class: "hat" is in 12 train queries, "red" in 4, "cup" in 1
QUERIES = {
    "t0": ("Red  Hat", "train", "hats"),
    **{f"t{i}": ("hat", "train", "") for i in range(1, 10)},
    "t10": ("red HAT for a dog", "train", "hats"),
    "t11": ("red red hat", "train", "hats"),
    "t12": ("red cup", "train", "cups"),
    "v0": ("red hat", "val", "hats"),
    "v1": ("HAT", "val", ""),
    "v2": ("hat cup", "val", "hats"),
    "v3": ("hat never heard", "val", "rest"),
    "v4": ("red hat for a big dog", "test", "rest"),
    "v5": ("red hat red hat", "test", "hats"),
}
# title, train positives, brand, category: the column `class` is one of products as well
PRODUCTS = {
    "p0": ("", 0, "", "a"),
    "p1": ("one", 4, "acme", "a"),
    "p2": ("one two three", 5, "bolt", "b"),
    "p3": ("one  two three four", 1, "acme", "b"),
    "p4": ("1 2 3 4 5 6 7", 12, "acme", ""),
    "p5": ("1 2 3 4 5 6", 0, "", "a"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TupleDataModule:
    path = tmp_path_factory.mktemp("catalogue")
    rows = [[p, title, brand, of, "a", ""] for p, (title, _, brand, of) in PRODUCTS.items()]
    write_rows(path / "products.csv", ["product_id", "title", "brand", "class", "photo", "image"], rows)
    write_rows(path / "queries.csv", ["query_id", "query", "split", "class"], [[q, *row] for q, row in QUERIES.items()])
    judged = [[f"t{i}", p, "E"] for p, (_, positives, _, _) in PRODUCTS.items() for i in range(positives)]
    write_rows(path / "judgments.csv", ["query_id", "product_id", "label"], [*judged, ["t12", "p0", "S"]])
    write_shards(read_catalogue(path, max_shared_queries=1.0), path / "shards")
    module = TupleDataModule(str(path / "shards"))
    module.setup("test")
    return module


def by_query(data: TupleDataModule, values: np.ndarray, ids: np.ndarray) -> dict[str, str]:
    return dict(zip(data.query_ids(ids), values.tolist(), strict=True))


def by_product(data: TupleDataModule, values: np.ndarray) -> list[str]:
    found = dict(zip(data.product_ids(), values.tolist(), strict=True))
    return [found[p] for p in PRODUCTS]


def test_slices_of_queries(data: TupleDataModule) -> None:
    ids = np.array([15, 13, 14, 16, 17, 18])  # the last six, in dense order of their own
    assert sorted(data.query_ids(ids)) == ["v0", "v1", "v2", "v3", "v4", "v5"]
    found = {name: by_query(data, values, ids) for name, values in query_slices(data, ids, ["class"]).items()}
    assert found == {
        "query_words": {"v0": "2", "v1": "1", "v2": "2", "v3": "3", "v4": "5+", "v5": "4"},
        "query_seen": {
            "v0": "seen in train", "v1": "seen in train", "v2": "unseen", "v3": "unseen", "v4": "unseen",
            "v5": "unseen",
        },
        "rarest_word": {
            "v0": "1-9", "v1": "10-99", "v2": "1-9", "v3": "0 (new word)", "v4": "0 (new word)", "v5": "1-9"
        },
        "class": {"v0": "hats", "v1": "(none)", "v2": "hats", "v3": "rest", "v4": "rest", "v5": "hats"},
    }  # fmt: skip


def test_slices_of_products(data: TupleDataModule) -> None:
    slices_of = product_slices(data, data.product_texts(), ["brand", "products.class"])
    found = {name: by_product(data, of) for name, of in slices_of.items()}
    assert found == {
        "train_positives": ["0 (cold start)", "1-4", "5+", "1-4", "5+", "0 (cold start)"],
        "text_words": ["0", "1-3", "1-3", "4-6", "7+", "4-6"],
        "photo": ["missing"] * 6,
        "brand": ["(none)", "acme", "bolt", "acme", "acme", "(none)"],
        "products.class": ["a", "a", "b", "b", "(none)", "a"],
    }


def test_stated_columns_are_those_of_products(data: TupleDataModule) -> None:
    assert stated_columns(data, ["brand", "products.class"]) == {"brand": "brand", "products.class": "class"}
    with pytest.raises(ValueError, match=r"no column 'brnd' for model.evaluation.stated; did you mean 'brand'\?"):
        stated_columns(data, ["brnd"])
    with pytest.raises(ValueError, match=r"no column 'queries.class' for model.evaluation.stated"):
        stated_columns(data, ["queries.class"])


@pytest.mark.parametrize(
    ("number", "name"), [(0, "0 (new word)"), (1, "1-9"), (9, "1-9"), (10, "10-99"), (99, "10-99"), (100, "100+")]
)
def test_bounds_of_bins(number: int, name: str) -> None:
    bounds = {1: "0 (new word)", 10: "1-9", 100: "10-99"}
    assert slices.binned(np.array([number]), bounds, "100+").tolist() == [name]


def test_a_column_of_many_values_keeps_the_frequent_ones() -> None:
    """21 values, of which c00 and "" are once, c01 to c18 twice, c19 three times: two of those that tie go as well."""
    values = ["c00", "", *(f"c{i:02}" for i in range(1, 19) for _ in range(2)), *["c19"] * 3]
    column = np.array(values, dtype=np.dtypes.StringDType())
    kept = {"c19", *(f"c{i:02}" for i in range(1, 19))}
    assert slices._merged(column).tolist() == [value if value in kept else "other" for value in values]
    twenty = column[column != "c05"]
    assert slices._merged(twenty).tolist() == [value or "(none)" for value in twenty]
    one_more = np.append(column, np.array(["c20"] * 2, dtype=column.dtype))  # c01 to c18 and c20 tie: the last goes
    assert set(slices._merged(one_more).tolist()) == kept | {"other"}


def test_columns_are_found_where_they_are(data: TupleDataModule) -> None:
    assert find_columns(data, ["brand", "queries.class", "products.brand", "title"]) == (
        ["queries.class"],
        ["brand", "products.brand", "title"],
    )
    assert find_columns(data, ["products.photo"]) == ([], ["products.photo"])
    assert find_columns(data, []) == ([], [])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("brnad", "no column 'brnad' to slice by; did you mean 'brand'. There are: queries.class, products.title, "),
        ("zzzz", "no column 'zzzz' to slice by; there are: queries.class, products.title, products.brand, "),
        ("class", "both queries and products have a column 'class'; expected queries.class or products.class"),
        ("photo", "slice 'photo' is always there; a column of that name is queries.photo or products.photo"),
    ],
)
def test_a_name_that_says_nothing_or_two_things(data: TupleDataModule, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_columns(data, [name])


def test_means_over_parts_of_the_queries() -> None:
    draw = np.random.default_rng(0)
    labels = draw.choice(np.array(["a", "b", "c"]), 60)
    per_query = {"ndcg@10": draw.random(60), "mrr": np.where(draw.random(60) < 0.3, np.nan, draw.random(60))}
    per_query["ndcg@10"][labels == "c"] = np.nan
    per_query["nothing"] = np.full(60, np.nan)
    found = slice_by_query(per_query, labels, seed=3, resamples=50)
    assert list(found) == ["a", "b", "c"]
    assert [list(metrics) for metrics in found.values()] == [["ndcg@10", "mrr"], ["ndcg@10", "mrr"], ["mrr"]]
    for value, metrics in found.items():
        for name, cell in metrics.items():
            chosen = [x for x, label in zip(per_query[name], labels, strict=True) if label == value and not np.isnan(x)]
            low, high = bootstrap_interval(np.array(chosen), 50, 3)
            assert cell == {"value": pytest.approx(np.mean(chosen)), "low": low, "high": high, "queries": len(chosen)}


def test_a_value_without_counted_queries_is_left_out() -> None:
    assert list(slice_by_query({"mrr": np.array([np.nan, 1.0])}, np.array(["a", "b"]))) == ["b"]


PRODUCT_COUNT, KS = 40, (1, 5)


def drawn_judgments(seed: int) -> tuple[np.ndarray, np.ndarray, Judgments]:
    """Ranked lists of 12 of 40 products, some of them shorter, for 15 of 20 judged queries."""
    draw = np.random.default_rng(seed)
    query_ids = np.sort(draw.permutation(20)[:15])
    ids = np.stack([draw.permutation(PRODUCT_COUNT)[:12] for _ in query_ids])
    ids[np.arange(12) >= draw.integers(4, 13, len(query_ids))[:, None]] = -1
    query, product = np.divmod(np.sort(draw.permutation(20 * PRODUCT_COUNT)[:300]), PRODUCT_COUNT)
    gain = {"relevance": draw.choice([0.0, 0.1, 1.0], 300), "stars": draw.choice([np.nan, 1.0, 3.0], 300)}
    return ids, query_ids, Judgments(query, product, gain, {"relevance": 1.0, "stars": 2.0}, "irrelevant")


def slow_values(ids: list[int], relevant: set[int]) -> dict[str, float]:
    """The metrics of one list against the relevant products of a slice."""
    found: dict[str, float] = {}
    for k in KS:
        hits = len([id for id in ids[:k] if id in relevant])
        found |= {f"recall@{k}": hits / len(relevant), f"recall_capped@{k}": hits / min(k, len(relevant))}
        found[f"hit_rate@{k}"] = float(hits > 0)
    return found | {"mrr": next((1 / rank for rank, id in enumerate(ids, 1) if id in relevant), 0.0)}


@pytest.mark.parametrize("column", ["relevance", "stars"])
@pytest.mark.parametrize("seed", [0, 1])
def test_parts_of_the_products_against_the_slow_loop(column: str, seed: int) -> None:
    ids, query_ids, judgments = drawn_judgments(seed)
    labels = np.array(["x", "y", "y", "z"])[np.arange(PRODUCT_COUNT) % 4]
    labels[7] = "lonely"
    positive = judgments.gain[column] >= judgments.positive_from[column]
    pairs = list(zip(judgments.query[positive].tolist(), judgments.product[positive].tolist(), strict=True))
    found = slice_by_product(ids, query_ids, judgments, column, labels, KS, resamples=20)
    for value in ("x", "y", "z", "lonely"):
        per_query = []
        for query, row in zip(query_ids.tolist(), ids.tolist(), strict=True):
            relevant = {p for q, p in pairs if q == query and labels[p] == value}
            if relevant:
                per_query.append(slow_values(row, relevant))
        assert bool(per_query) == (value in found)
        for name, cell in found.get(value, {}).items():
            values = np.array([of_query[name] for of_query in per_query])
            low, high = bootstrap_interval(values, 20, 0)
            assert cell == pytest.approx({"value": values.mean(), "low": low, "high": high, "queries": len(values)})
            assert list(found[value]) == ["recall@1", "recall@5", "recall_capped@1", "recall_capped@5", "hit_rate@1",
                                          "hit_rate@5", "mrr"]  # fmt: skip


def test_products_of_other_values_keep_their_ranks() -> None:
    """Ranks 1 and 2 hold products of another slice, relevant or not: the third place counts as the third."""
    judgments = Judgments(
        np.zeros(3, np.int64), np.array([0, 2, 3]), {"relevance": np.ones(3)}, {"relevance": 1.0}, "irrelevant"
    )
    labels = np.array(["old", "old", "new", "new"])
    found = slice_by_product(np.array([[0, 1, 2]]), np.array([0]), judgments, "relevance", labels, [3])
    assert {name: cell["value"] for name, cell in found["new"].items()} == pytest.approx(
        {"recall@3": 0.5, "recall_capped@3": 0.5, "hit_rate@3": 1.0, "mrr": 1 / 3}
    )
    assert {name: cell["value"] for name, cell in found["old"].items()} == {
        "recall@3": 1.0, "recall_capped@3": 1.0, "hit_rate@3": 1.0, "mrr": 1.0
    }  # fmt: skip


def test_one_slice_of_all_products_is_no_slice() -> None:
    """Recall over everything, from the slices of a column that says the same of all."""
    from mmfusion.retrieval.metrics import parse_metric, ranked_gains

    ids, query_ids, judgments = drawn_judgments(2)
    found = slice_by_product(ids, query_ids, judgments, "relevance", np.full(PRODUCT_COUNT, "all"), KS)
    ranked = ranked_gains(ids, query_ids, judgments, "relevance")
    for name, cell in found["all"].items():
        assert cell["value"] == pytest.approx(np.nanmean(parse_metric(name, 12)(ranked)))


def test_a_catalogue_without_further_columns(tmp_path: Path) -> None:
    write_rows(tmp_path / "products.csv", ["product_id", "title", "image"], [["p", "t", ""]])
    write_rows(tmp_path / "queries.csv", ["query_id", "query", "split"], [["q", "t", "train"]])
    write_rows(tmp_path / "judgments.csv", ["query_id", "product_id", "label"], [["q", "p", "E"]])
    write_shards(read_catalogue(tmp_path), tmp_path / "shards")
    module = TupleDataModule(str(tmp_path / "shards"))
    module.setup("test")
    with pytest.raises(ValueError, match=r"no column 'class' to slice by; there are: products\.title"):
        find_columns(module, ["class"])
