"""Queries and graded labels from the attributes of products, by a rule that a seed decides.

- A query wants an article type together with a gender, a colour or both, and maybe a usage: six KINDS of combinations,
  of which at least 3 products must have each. It goes to train (85 %), val or test (7.5 % each) by a hash of it, so
  that no combination that is evaluated was trained on.
- Products go to parts train (80 %), val and test (10 % each) by a hash of their title, so equal titles stay together.
  Train queries are judged on the train part alone, and need 3 products there. Evaluation searches all products.
- E: all attributes are those wanted. S: the type and all but one are. Train lists every E and at most 10 S drawn per
  query, val and test list every E and S. A product whose attribute is blank does not have what is wanted.
- Train combinations are worded up to twice, others once, in the WORDINGS that the hash of the combination draws.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from datamodules.importing.splits import position

TYPE = "articleType"
ATTRIBUTES = (TYPE, "gender", "baseColour", "usage")
KINDS = (
    ("baseColour",),
    ("gender",),
    ("gender", "baseColour"),
    ("baseColour", "usage"),
    ("gender", "usage"),
    ("gender", "baseColour", "usage"),
)
WORDINGS = (
    "{gender} {baseColour} {usage} {articleType}",
    "{usage} {articleType} {baseColour} {gender}",
    "{baseColour} {usage} {articleType} for {gender}",
)
TRAIN_WORDINGS, TRAIN_SUBSTITUTES = 2, 10
LEAST_PRODUCTS = 3
HELD_OUT_QUERIES, HELD_OUT_PRODUCTS = 0.075, 0.1  # each of val and test
UNKNOWN = {"", "na"}
PLURAL_ONLY = ("jeans", "jeggings", "leggings", "trousers", "shorts", "tights", "pants", "capris", "briefs", "boxers",
    "sunglasses", "salwar", "stockings", "suspenders", "cufflinks", "necklace and chains")  # fmt: skip
Wanted = tuple[tuple[str, str], ...]  # (attribute, value), the type first


class Derived(NamedTuple):
    """queries: query_id, query, split, kind, wants. judgments: query_id, product_id, label. left_out: why, how many."""

    queries: pa.Table
    judgments: pa.Table
    left_out: dict[str, int]


@dataclass(frozen=True)
class Query:
    text: str
    split: str
    wants: Wanted


def derived(attributes: Mapping[str, Sequence[str]], ids: Sequence[str], titles: Sequence[str], seed: int) -> Derived:
    """The queries of products whose `attributes` are these, and their judgments."""
    values = {name: np.array(attributes[name], dtype=np.str_) for name in ATTRIBUTES}
    train = np.array([split_of(f"title {title}", seed, HELD_OUT_PRODUCTS) == "train" for title in titles])
    of_type = _rows_by_value(values[TYPE])
    left_out: Counter[str] = Counter()
    queries, found, labels = [], [], []
    for query in _queries(values, seed, left_out):
        rows = of_type[query.wants[0][1]]
        exact, substitute = judged(values, rows, query.wants)
        if query.split == "train":
            exact, substitute = exact[train[exact]], _drawn(substitute[train[substitute]], query.text, seed)
            if len(exact) < LEAST_PRODUCTS:
                left_out["train queries with few products in the train part"] += 1
                continue
        queries.append(query)
        found.append(np.concatenate([exact, substitute]))
        labels.append(np.repeat([0, 1], [len(exact), len(substitute)]))
    names = pa.array([f"q{number:05d}" for number in range(len(queries))])
    of_query = np.repeat(np.arange(len(queries)), [len(rows) for rows in found])
    judgments = {
        "query_id": names.take(pa.array(of_query)),
        "product_id": pa.array(ids, pa.string()).take(pa.array(np.concatenate(found or [of_query]))),
        "label": pa.array(["E", "S"]).take(pa.array(np.concatenate(labels or [of_query]))),
    }
    return Derived(_table(names, queries), pa.table(judgments), dict(left_out))


def split_of(text: str, seed: int, held_out: float) -> str:
    at = position(text, seed)
    return "test" if at < held_out else "val" if at < 2 * held_out else "train"


def judged(values: Mapping[str, np.ndarray], rows: np.ndarray, wants: Wanted) -> tuple[np.ndarray, np.ndarray]:
    """Which rows, all of the wanted type, have everything that is wanted (E), and all but one of it (S)."""
    misses = np.sum([values[name][rows] != value for name, value in wants[1:]], axis=0)
    return rows[misses == 0], rows[misses == 1]


def worded(wants: Wanted, wording: str) -> str:
    """In lower case; what is not wanted leaves no gap, nor a "for" behind which nothing stands."""
    words = {**dict.fromkeys(ATTRIBUTES, ""), **{name: value.lower() for name, value in wants}}
    text = wording.format(**{**words, TYPE: singular(words[TYPE])})
    return " ".join(text.removesuffix("for ").split())


def singular(type_: str) -> str:
    """Of an article type: "watches" -> "watch", "dresses" -> "dress", "dupatta" and "jeans" as they are."""
    if type_.endswith(PLURAL_ONLY) or not type_.endswith("s") or type_.endswith("ss"):
        return type_
    if type_.endswith(("ches", "shes", "sses", "xes")):
        return type_[:-2]
    if type_.endswith("rves"):
        return f"{type_[:-3]}f"
    return f"{type_[:-3]}y" if type_.endswith(("pies", "ries", "dies", "bies")) else type_[:-1]


def _rows_by_value(values: np.ndarray) -> dict[str, np.ndarray]:
    order = np.argsort(values, kind="stable")
    names, starts = np.unique(values[order], return_index=True)
    return dict(zip(names.tolist(), np.split(order, starts[1:]), strict=True))


def _queries(values: Mapping[str, np.ndarray], seed: int, left_out: Counter[str]) -> Iterator[Query]:
    """Each text once: of combinations worded alike, those held out come first."""
    split = {wants: split_of(_key(wants), seed, HELD_OUT_QUERIES) for wants in _combinations(values)}
    seen: set[str] = set()
    for wants in sorted(split, key=lambda wants: (split[wants] == "train", wants)):
        texts = sorted({worded(wants, form) for form in WORDINGS}, key=lambda text: position(f"wording {text}", seed))
        for text in texts[: TRAIN_WORDINGS if split[wants] == "train" else 1]:
            if text in seen:
                left_out["queries worded as another one"] += 1
            else:
                seen.add(text)
                yield Query(text, split[wants], wants)


def _combinations(values: Mapping[str, np.ndarray]) -> Iterator[Wanted]:
    """Those of enough products, without blank attributes."""
    for kind in KINDS:
        names = (TYPE, *kind)
        count = Counter(zip(*(values[name].tolist() for name in names), strict=True))
        for row in sorted(row for row, products in count.items() if products >= LEAST_PRODUCTS):
            if not any(value.lower() in UNKNOWN for value in row):
                yield tuple(zip(names, row, strict=True))


def _key(wants: Wanted) -> str:
    return "; ".join(f"{name} {value}" for name, value in wants)


def _drawn(rows: np.ndarray, text: str, seed: int) -> np.ndarray:
    """At most TRAIN_SUBSTITUTES of the rows, drawn by the query's text, in their order."""
    if len(rows) <= TRAIN_SUBSTITUTES:
        return rows
    drawn = np.frombuffer(blake2b(f"{seed}\0{text}".encode(), digest_size=16).digest(), np.uint32)
    return np.sort(np.random.default_rng(drawn).choice(rows, TRAIN_SUBSTITUTES, replace=False))


def _table(names: pa.Array, queries: Sequence[Query]) -> pa.Table:
    return pa.table(
        {
            "query_id": names,
            "query": pa.array([query.text for query in queries], pa.string()),
            "split": pa.array([query.split for query in queries], pa.string()),
            "kind": pa.array([" ".join(name for name, _ in query.wants) for query in queries], pa.string()),
            "wants": pa.array([json.dumps(dict(query.wants)) for query in queries], pa.string()),
        }
    )
