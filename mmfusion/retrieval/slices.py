"""Where a mean comes from: the same metrics over parts of the queries, and over parts of the products.

A slice gives every query, or every product, one value as a string. Built-in slices are always there; any column of the
queries' table or of the products' may be another one.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches

import numpy as np
from jaxtyping import Float, Int

from mmfusion.batch import Judgments, RetrievalData
from mmfusion.retrieval.metrics import parse_metric, ranked_gains
from mmfusion.retrieval.significance import bootstrap_interval

OF_QUERIES = ("query_words", "query_seen", "rarest_word", "query_in_text", "relevant_products", "photos_dropped")
OF_PRODUCTS = ("train_positives", "text_words", "photo")
MOST_VALUES = 20  # of a column; a column with more keeps all but one of these, and OTHER
OTHER, NONE = "other", "(none)"

Cells = dict[str, dict[str, float]]  # metric -> {"value", "low", "high", "queries"}


def find_columns(data: RetrievalData, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Which of the names are columns of queries, and which of products; `queries.<name>` and `products.<name>` are too.

    Raises ValueError, with the nearest name, for what neither has, both have, or is a built-in slice.
    """
    of_queries, of_products = _names("queries", data.query_columns()), _names("products", data.product_columns())
    for name in names:
        if name in OF_QUERIES + OF_PRODUCTS:
            raise ValueError(f"the slice {name!r} is always there; a column of that name is {_qualified(name)}")
        if name in of_queries and name in of_products:
            raise ValueError(f"both queries and products have a column {name!r}; expected {_qualified(name)}")
        if name not in of_queries | of_products:
            near = get_close_matches(name, of_queries | of_products, 1)
            hint = f"did you mean {near[0]!r}? There are" if near else "there are"
            there = [key for key, column in (of_queries | of_products).items() if key != column]
            raise ValueError(f"no column {name!r} to slice by; {hint}: {', '.join(there)}")
    return [name for name in names if name in of_queries], [name for name in names if name in of_products]


def stated_columns(data: RetrievalData, names: Sequence[str]) -> dict[str, str]:
    """The column of products that each name of model.evaluation.stated stands for; `products.<name>` is one too.

    Raises ValueError, with the nearest name, for what is no column of products.
    """
    of_products = _names("products", data.product_columns())
    for name in names:
        if name not in of_products:
            near = get_close_matches(name, of_products, 1)
            hint = f"did you mean {near[0]!r}? There are" if near else "there are"
            there = ", ".join(data.product_columns())
            raise ValueError(f"products have no column {name!r} for model.evaluation.stated; {hint}: {there}")
    return {name: of_products[name] for name in names}


def query_slices(
    data: RetrievalData, query_ids: Int[np.ndarray, "query"], columns: Sequence[str]
) -> dict[str, np.ndarray]:
    """The value of each of the queries in every slice. Words are what spaces part, in lower case.

    query_words: their number. query_seen: whether a train query has this text (up to case and spaces). rarest_word: how
    many train queries contain the rarest word of the query. columns: of `find_columns`.
    """
    texts = [_normalised(text) for text in data.query_texts(query_ids)]
    train = [_normalised(text) for text in data.train_queries()]
    seen, containing = set(train), Counter(word for text in train for word in set(text.split()))
    rarest = np.array([min((containing[word] for word in text.split()), default=0) for text in texts])
    found = {
        "query_words": binned(np.array([len(text.split()) for text in texts]), {2: "1", 3: "2", 4: "3", 5: "4"}, "5+"),
        "query_seen": np.where([text in seen for text in texts], "seen in train", "unseen"),
        "rarest_word": binned(rarest, {1: "0 (new word)", 10: "1-9", 100: "10-99"}, "100+"),
    }
    of_queries = _names("queries", data.query_columns())
    return found | {name: _merged(data.query_column(of_queries[name]))[query_ids] for name in columns}


def product_slices(data: RetrievalData, texts: Sequence[str], columns: Sequence[str]) -> dict[str, np.ndarray]:
    """The value of every product of the catalogue in every slice.

    train_positives: train queries that it is a positive of. text_words: of its text, the one that the tower is given.
    columns: of `find_columns`.
    """
    words = np.array([len(text.split()) for text in texts])
    found = {
        "train_positives": binned(data.train_positives(), {1: "0 (cold start)", 5: "1-4"}, "5+"),
        "text_words": binned(words, {1: "0", 4: "1-3", 7: "4-6"}, "7+"),
        "photo": np.where(data.has_photo(), "present", "missing"),
    }
    of_products = _names("products", data.product_columns())
    return found | {name: _merged(data.product_column(of_products[name])) for name in columns}


def slice_by_query(
    per_query: Mapping[str, Float[np.ndarray, "query"]], labels: np.ndarray, seed: int = 0, resamples: int = 1000
) -> dict[str, Cells]:
    """[value][metric]: means over the queries with this value, with 95 % intervals.

    NaN is left out; `queries` says how many were not, and a metric without any is not listed.
    """
    values = sorted(set(labels.tolist()))
    cells = {value: _cells(_rows(per_query, labels == value), seed, resamples) for value in values}
    return {value: metrics for value, metrics in cells.items() if metrics}


def slice_by_product(
    ids: Int[np.ndarray, "query k"],
    query_ids: Int[np.ndarray, "query"],
    judgments: Judgments,
    column: str,
    labels: np.ndarray,
    ks: Sequence[int],
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Cells]:
    """[value][metric]: how well the products with this value are found, in a label column; `labels` is per product.

    The lists stay those of the whole corpus, and products of other values keep their ranks in them; but only relevant
    products of the value count: in recall@k, recall_capped@k and hit_rate@k, for each k, and in mrr, which is how far
    down the first of them stands. Queries without one are left out. Numbers compare systems on the same value; between
    values they do not compare, as products of other values may rightly stand above.

    There is no nDCG: its ideal order would have products of this value alone at the top, ranks which other products
    deserve as much, so that a perfect list would be below 1, the further the fewer relevant products have the value.
    """
    names = [f"{family}@{k}" for family in ("recall", "recall_capped", "hit_rate") for k in ks] + ["mrr"]
    metrics = {name: parse_metric(name, ids.shape[1]) for name in names}
    found = {}
    relevant = judgments.gain[column] >= judgments.positive_from[column]
    value_of = labels[judgments.product]
    for value in sorted(set(value_of[relevant].tolist())):
        ranked = ranked_gains(ids, query_ids, _only(judgments, relevant & (value_of == value)), column)
        cells = _cells({name: metric(ranked) for name, metric in metrics.items()}, seed, resamples)
        if cells:
            found[value] = cells
    return found


def _names(table: str, columns: Sequence[str]) -> dict[str, str]:
    """The column that each name stands for: its own, and one that says which table it is of."""
    return {f"{table}.{column}": column for column in columns} | {column: column for column in columns}


def _qualified(name: str) -> str:
    return f"queries.{name} or products.{name}"


def _normalised(text: str) -> str:
    """As the import compares the queries of different splits."""
    return " ".join(text.lower().split())


def binned(numbers: np.ndarray, below: Mapping[int, str] | Mapping[float, str], beyond: str) -> np.ndarray:
    """The name of the lowest bound that each number is below."""
    names = np.array([*below.values(), beyond])
    return names[np.searchsorted(list(below), numbers, side="right")]


def _merged(column: np.ndarray) -> np.ndarray:
    """The column with names for what is blank and for what is rare; rarity is that in the whole table."""
    named = np.where(column == "", NONE, column)
    values, place, counts = np.unique(named, return_inverse=True, return_counts=True)
    if len(values) > MOST_VALUES:
        rare = np.argsort(-counts, kind="stable")[MOST_VALUES - 1 :]
        values[rare] = OTHER
    return values[place]


def _only(judgments: Judgments, kept: np.ndarray) -> Judgments:
    gain = {name: values[kept] for name, values in judgments.gain.items()}
    return replace(judgments, query=judgments.query[kept], product=judgments.product[kept], gain=gain)


def _rows(per_query: Mapping[str, np.ndarray], kept: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values[kept] for name, values in per_query.items()}


def _cells(per_query: Mapping[str, Float[np.ndarray, "_"]], seed: int, resamples: int) -> Cells:
    cells = {}
    for name, values in per_query.items():
        counted = values[~np.isnan(values)]
        if len(counted):
            low, high = bootstrap_interval(counted, resamples, seed)
            cells[name] = {"value": float(counted.mean()), "low": low, "high": high, "queries": len(counted)}
    return cells
