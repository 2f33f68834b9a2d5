"""Slices of queries by their answers: how many relevant products there are, and how much their texts say of the query.

Where the texts state what is asked for, text alone can find it; where they do not, the photo has to.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from mmfusion.batch import Judgments
from mmfusion.retrieval.baselines import WORD
from mmfusion.retrieval.slices import binned

STATES = "states_"  # and the column's name: a slice of model.evaluation.stated
NONE, LITTLE, MUCH, EVERYTHING = "none (< 10 %)", "less than half", "half or more", "all (90 % or more)"
NO_PRODUCT, NO_VALUE = "no relevant product", "(none has a value)"


def answer_slices(
    queries: Sequence[str],
    products: Sequence[str],
    query_ids: Int[np.ndarray, "query"],
    judgments: Judgments,
    columns: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """The value of each of the queries in every slice; relevant by the first label column.

    queries: the texts of `query_ids`. products: the texts of the catalogue that the tower is given.
    columns: by the names of model.evaluation.stated, the value of each product, "" where there is none.
    query_in_text: the share of the query's words that the text of a relevant product has, on average over them.
    relevant_products: their number; few is a tail query.
    states_<column>: whether all, some or none of the relevant products that have a value state it in their texts.
    """
    column = next(iter(judgments.gain))
    relevant = judgments.gain[column] >= judgments.positive_from[column]
    rows, product = _of_queries(query_ids, judgments.query[relevant], judgments.product[relevant])
    shares = stated(queries, products, rows, product)
    counts = np.bincount(rows, minlength=len(query_ids))
    said = binned(np.nan_to_num(shares), {0.1: NONE, 0.5: LITTLE, 0.9: MUCH}, EVERYTHING)
    stating = {name: stating_labels(products, values, rows, product, counts) for name, values in columns.items()}
    return {
        "query_in_text": np.where(counts == 0, NO_PRODUCT, said),
        "relevant_products": binned(counts, {1: "0", 5: "1-4 (tail)", 20: "5-19", 100: "20-99"}, "100+ (head)"),
        **{f"{STATES}{name}": labels for name, labels in stating.items()},
    }


def stated(
    queries: Sequence[str],
    products: Sequence[str],
    rows: Int[np.ndarray, "pair"],
    product: Int[np.ndarray, "pair"],
) -> Float[np.ndarray, "query"]:
    """For each query the mean over its pairs of the share of its words in the product's text; NaN without a pair.

    rows: the position of each pair's query.
    """
    text_words = {each: words(products[each]) for each in np.unique(product).tolist()}
    asked = [words(text) for text in queries]
    pairs = zip(rows.tolist(), product.tolist(), strict=True)
    share = np.array([len(asked[row] & text_words[each]) / max(1, len(asked[row])) for row, each in pairs])
    with np.errstate(invalid="ignore"):
        return np.bincount(rows, share, len(queries)) / np.bincount(rows, minlength=len(queries))


def stating_labels(
    products: Sequence[str],
    values: np.ndarray,
    rows: Int[np.ndarray, "pair"],
    product: Int[np.ndarray, "pair"],
    counts: Int[np.ndarray, "query"],
) -> np.ndarray:
    """For each query whether all, some or none of its products have all words of their value in their text.

    values: of each product of the catalogue; products without a value are left out. rows: the position of each pair's
    query. counts: the number of each query's products.
    """
    asked = {each: words(str(values[each])) for each in np.unique(product).tolist()}
    states = {each: value <= words(products[each]) for each, value in asked.items() if value}
    valued = np.array([each in states for each in product.tolist()], bool)
    stating = np.array([states.get(each, False) for each in product.tolist()], bool)
    of, said = (np.bincount(rows[kept], minlength=len(counts)) for kept in (valued, stating))
    cases = [counts == 0, of == 0, said == of, said > 0]
    return np.select(cases, [NO_PRODUCT, NO_VALUE, "all", "some"], "none")


def _of_queries(
    query_ids: Int[np.ndarray, "query"], query: Int[np.ndarray, "pair"], product: Int[np.ndarray, "pair"]
) -> tuple[Int[np.ndarray, "own"], Int[np.ndarray, "own"]]:
    """Of pairs those of the queries, with the query's position in place of its id."""
    if not len(query_ids):
        return query[:0], product[:0]
    order = np.argsort(query_ids)
    at = np.searchsorted(query_ids[order], query).clip(max=len(query_ids) - 1)
    own = query_ids[order][at] == query
    return order[at[own]], product[own]


def words(text: str) -> set[str]:
    """In lower case; an s at the end of a longer word is taken off, so that shirts are in a text that says shirt."""
    return {word.removesuffix("s") if len(word) > 3 else word for word in re.findall(WORD, text.lower())}
