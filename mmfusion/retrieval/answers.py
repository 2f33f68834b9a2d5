"""Slices of queries by their answers: how many relevant products there are, and how much their texts say of the query.

Where the texts state what is asked for, text alone can find it; where they do not, the photo has to.
"""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from mmfusion.batch import Judgments
from mmfusion.retrieval.baselines import WORD
from mmfusion.retrieval.slices import binned

NONE, LITTLE, MUCH, EVERYTHING = "none (< 10 %)", "less than half", "half or more", "all (90 % or more)"


def answer_slices(
    queries: Sequence[str], products: Sequence[str], query_ids: Int[np.ndarray, "query"], judgments: Judgments
) -> dict[str, np.ndarray]:
    """The value of each of the queries in every slice; relevant by the first label column.

    queries: the texts of `query_ids`. products: the texts of the catalogue that the tower is given.
    query_in_text: the share of the query's words that the text of a relevant product has, on average over them.
    relevant_products: their number; few is a tail query.
    """
    column = next(iter(judgments.gain))
    relevant = judgments.gain[column] >= judgments.positive_from[column]
    query, product = judgments.query[relevant], judgments.product[relevant]
    shares = stated(queries, products, query_ids, query, product)
    counts = np.bincount(query, minlength=int(query_ids.max(initial=-1)) + 1)[query_ids]
    said = binned(np.nan_to_num(shares), {0.1: NONE, 0.5: LITTLE, 0.9: MUCH}, EVERYTHING)
    return {
        "query_in_text": np.where(counts == 0, "no relevant product", said),
        "relevant_products": binned(counts, {1: "0", 5: "1-4 (tail)", 20: "5-19", 100: "20-99"}, "100+ (head)"),
    }


def stated(
    queries: Sequence[str],
    products: Sequence[str],
    query_ids: Int[np.ndarray, "query"],
    query: Int[np.ndarray, "pair"],
    product: Int[np.ndarray, "pair"],
) -> Float[np.ndarray, "query"]:
    """For each query the mean over its pairs of the share of its words in the product's text; NaN without a pair."""
    order = np.argsort(query_ids)
    at = np.searchsorted(query_ids[order], query).clip(max=len(query_ids) - 1) if len(query_ids) else query[:0]
    own = query_ids[order][at] == query if len(query_ids) else np.zeros(len(query), bool)
    rows, product = order[at[own]], product[own]
    text_words = {each: words(products[each]) for each in np.unique(product).tolist()}
    asked = [words(text) for text in queries]
    pairs = zip(rows.tolist(), product.tolist(), strict=True)
    share = np.array([len(asked[row] & text_words[each]) / max(1, len(asked[row])) for row, each in pairs])
    with np.errstate(invalid="ignore"):
        return np.bincount(rows, share, len(query_ids)) / np.bincount(rows, minlength=len(query_ids))


def words(text: str) -> set[str]:
    """In lower case; an s at the end of a longer word is taken off, so that shirts are in a text that says shirt."""
    return {word.removesuffix("s") if len(word) > 3 else word for word in re.findall(WORD, text.lower())}
