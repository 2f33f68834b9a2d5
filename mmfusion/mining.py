"""Hard negatives from a run's own ranking: high-ranked products that are wrong for the query, and likely truly so.

A ranked list holds positives that nobody judged as well. What is taken for a negative is therefore

- not judged in train as worth something: neither positive nor ignored (judged 0 may stay);
- in a range of ranks, counted without those;
- below the query's positive by more than a margin: positive-aware mining, TopK-MarginPos of NV-Retriever (Moreira 2024,
  arXiv 2407.15831): the greatest score of a negative is the positive's less a margin. A share of the positive's score,
  their TopK-PercPos, would move the wrong way where cosines are negative;
- no duplicate of a positive under another id.

The paper has one positive per query, a catalogue many. The anchor here is the query's **highest-scoring** one: then a
product is kept that the paper's rule accepts for at least one pair (query, positive). With the lowest, one positive
that the run has not learned yet, or a wrong label, would remove every hard negative of just those queries that need
them. Where the best positive ranks below the whole range, nothing is left, which is what the rule is for: such a
ranking does not tell right from wrong.

Duplicates: the text that the tower is given is equal, and the score differs by at most SAME. Text alone is not enough:
where titles are sparse, "cotton shirt" names red and blue ones, and a red one is the best negative of "blue shirt".
Equal inputs have equal vectors up to rounding, and so equal scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int8, Int64

from mmfusion.batch import Judgments

SAME = 1e-5  # greatest difference between scores of equal inputs
UNKNOWN, IGNORED, POSITIVE = 0, 1, 2
REMOVED = ("positive", "ignored", "margin", "duplicate")


@dataclass(frozen=True)
class Rules:
    """Which products of a query's list become its negatives.

    Args:
        k: most negatives of a query; its hardest ones
        first: rank from which on they are taken; 1 is the best product that is neither positive nor ignored
        last: rank up to which they are taken
        margin: how far they must score below the query's best positive, in cosine; None: anywhere
    """

    k: int = 20
    first: int = 10
    last: int = 100
    margin: float | None = 0.05

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"K={self.k}; expected at least 1 negative per query")
        if not 1 <= self.first <= self.last:
            raise ValueError(f"RANKS={self.first}:{self.last}; expected first:last such as 10:100, from 1 upwards")
        if self.margin is not None and not 0 <= self.margin < 2:
            raise ValueError(f"MARGIN={self.margin:g}; expected a difference of cosines from 0 to below 2, or none")

    @classmethod
    def of(cls, k: str | None = None, ranks: str | None = None, margin: str | None = None) -> "Rules":
        """From what a user typed; None: the default. Raises ValueError for what makes no sense."""
        given: dict[str, int | float | None] = {}
        if k is not None:
            given["k"] = _whole("K", k, k, "a number such as 20")
        if ranks is not None:
            first, _, last = ranks.partition(":")
            given["first"], given["last"] = (
                _whole("RANKS", ranks, part, "first:last, as 10:100") for part in (first, last)
            )
        if margin is not None:
            given["margin"] = None if margin == "none" else _margin(margin)
        return cls(**given)  # type: ignore[arg-type]


def _whole(name: str, given: str, part: str, expected: str) -> int:
    if not (part.removeprefix("-").isascii() and part.removeprefix("-").isdigit()):
        raise ValueError(f"{name}={given}; expected {expected}")
    return int(part)


def _margin(given: str) -> float:
    try:
        return float(given)
    except ValueError as error:
        raise ValueError(f"MARGIN={given}; expected a number such as 0.05, or none") from error


@dataclass(frozen=True)
class Known:
    """The train judgments that are worth something, looked up by pairs. `pair` = query * products + product, ascending.

    The primary label column decides; where it does not judge a pair, any other that finds it worth something does.
    """

    products: int
    pair: Int64[np.ndarray, "listed"]
    positive: Bool[np.ndarray, "listed"]

    @classmethod
    def of(cls, train: Judgments, products: int) -> "Known":
        primary, *others = train.gain
        gain = train.gain[primary]
        worth = gain > 0
        for column in others:
            worth = worth | (np.isnan(gain) & (train.gain[column] > 0))
        pair = train.query.astype(np.int64) * products + train.product
        return cls(products, pair[worth], (gain >= train.positive_from[primary])[worth])

    def counts(self, query_ids: Int[np.ndarray, "query"]) -> Int[np.ndarray, "query"]:
        """How many products of each query are worth something."""
        start = query_ids.astype(np.int64) * self.products
        return np.searchsorted(self.pair, start + self.products) - np.searchsorted(self.pair, start)

    def with_positive(self, query_ids: Int[np.ndarray, "query"]) -> Int[np.ndarray, "trained"]:
        """The queries that have a positive: training draws no other."""
        return query_ids[np.isin(query_ids, self.pair[self.positive] // max(self.products, 1))]

    def kinds(
        self, query_ids: Int[np.ndarray, "query"], ids: Int[np.ndarray, "query k"]
    ) -> Int8[np.ndarray, "query k"]:
        """UNKNOWN, IGNORED or POSITIVE; ids may be -1."""
        if not len(self.pair):
            return np.zeros(ids.shape, np.int8)
        wanted = query_ids.astype(np.int64)[:, None] * self.products + ids
        at = np.searchsorted(self.pair, wanted).clip(max=len(self.pair) - 1)
        listed = (self.pair[at] == wanted) & (ids >= 0)
        return np.where(listed, np.where(self.positive[at], POSITIVE, IGNORED), UNKNOWN).astype(np.int8)


@dataclass(frozen=True)
class Mined:
    """Negatives of some queries, and what was left out on the way to them, by REMOVED."""

    query: Int64[np.ndarray, "negative"]
    product: Int64[np.ndarray, "negative"]
    score: Float32[np.ndarray, "negative"]
    per_query: Int[np.ndarray, "query"]
    removed: dict[str, int]

    @classmethod
    def joined(cls, parts: Sequence["Mined"]) -> "Mined":
        """Parts of disjoint queries as one, sorted by (query, product)."""
        query, product, score, per_query = (
            np.concatenate([np.empty(0, kind), *(getattr(part, name) for part in parts)])
            for name, kind in (
                ("query", np.int64),
                ("product", np.int64),
                ("score", np.float32),
                ("per_query", np.int64),
            )
        )
        order = np.lexsort((product, query))
        removed = {name: sum(part.removed[name] for part in parts) for name in REMOVED}
        return cls(query[order], product[order], score[order], per_query, removed)

    def told(self, without_positive: int) -> str:
        """For the terminal. `without_positive`: train queries that were left out because they have none."""
        lines = [
            f"{len(self.query):,} negatives of {len(self.per_query):,} train queries: "
            f"{self.per_query.min():,} to {self.per_query.max():,} each, {self.per_query.mean():.1f} on average, "
            f"none for {(self.per_query == 0).sum():,}",
            "removed: {positive:,} as positives, {ignored:,} as ignored, {margin:,} by the margin, "
            "{duplicate:,} as duplicates of positives".format(**self.removed),
        ]
        if without_positive:
            lines.append(f"left out: {without_positive:,} train queries without a positive, which training never draws")
        return "\n".join(lines)


def mined(
    query_ids: Int[np.ndarray, "query"],
    ids: Int[np.ndarray, "query k"],
    scores: Float32[np.ndarray, "query k"],
    known: Known,
    text: Int[np.ndarray, "catalogue"],
    rules: Rules,
) -> Mined:
    """The negatives of queries, given their ranked lists, best first (id -1 where a list ends).

    The result depends on a query's first `rules.last + known.counts` products alone, so a longer list gives the same.
    text: a number per product, the same for equal texts.
    """
    kind, score = known.kinds(query_ids, ids), scores.astype(np.float64)
    free = (ids >= 0) & (kind == UNKNOWN)
    better = free.cumsum(1) - free  # free products above each place
    within = better < rules.last
    window = free & within & (better >= rules.first - 1)
    needed = np.arange(ids.shape[1]) < (rules.last + known.counts(query_ids))[:, None]
    positive = (kind == POSITIVE) & needed
    close = np.zeros_like(window)
    if rules.margin is not None:
        best = np.where(positive, score, -np.inf).max(1, keepdims=True, initial=-np.inf)
        close = window & ~(score < best - rules.margin)
    same = window & ~close
    same[same] = _among(same, positive, text[ids], score)
    kept = window & ~close & ~same
    kept &= kept.cumsum(1) <= rules.k
    row, _ = kept.nonzero()
    counts = [(within & (kind == POSITIVE)).sum(), (within & (kind == IGNORED)).sum(), close.sum(), same.sum()]
    return Mined(
        query_ids[row].astype(np.int64),
        ids[kept].astype(np.int64),
        scores[kept],
        kept.sum(1),
        dict(zip(REMOVED, map(int, counts), strict=True)),
    )


def _among(
    asked: Bool[np.ndarray, "query k"],
    positive: Bool[np.ndarray, "query k"],
    text: Int[np.ndarray, "query k"],
    score: Float[np.ndarray, "query k"],
) -> Bool[np.ndarray, "candidate"]:
    """Whether each of the places `asked` has the text, and within SAME the score, of a positive of its own query.

    Positives are laid on one line, by query and text and then by score: only neighbours on it can be that close.
    """
    if not positive.any() or not asked.any():
        return np.zeros(asked.sum(), bool)
    group = np.arange(len(text))[:, None] * (int(text.max()) + 1) + text
    groups, number = np.unique(group[positive], return_inverse=True)
    step = 2 * np.abs(score[asked | positive]).max() + 1
    line = np.sort(number * step + score[positive])
    at = np.searchsorted(groups, group[asked]).clip(max=len(groups) - 1)
    place = at * step + score[asked]
    after = np.searchsorted(line, place).clip(max=len(line) - 1)
    apart = np.minimum(np.abs(line[after] - place), np.abs(line[np.maximum(after - 1, 0)] - place))
    return (groups[at] == group[asked]) & (apart <= SAME)


def numbered(texts: Sequence[str]) -> Int64[np.ndarray, "catalogue"]:
    """A number per text, the same for equal ones."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(text, len(numbers)) for text in texts], np.int64)
