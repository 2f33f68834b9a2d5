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

Duplicates: the view that ranks cannot tell the product from the positive, as their vectors differ by at most SAME in
length. Equal inputs have equal vectors up to rounding. Equal texts alone are not enough: where titles are sparse,
"cotton shirt" names red and blue ones, and a red one is the best negative of "blue shirt".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int8, Int64

from mmfusion.batch import Judgments

SAME = 1e-5  # greatest distance between vectors of equal inputs, and so between their scores
PAIRS = 1 << 15  # of vectors that are compared at a time
MOST = 2**31 - 1
UNKNOWN, IGNORED, POSITIVE = 0, 1, 2
REMOVED = ("positive", "ignored", "margin", "duplicate")

Vectors = Callable[[np.ndarray], np.ndarray]  # products' vectors in the view that ranks, by dense id


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
        if not 1 <= self.k <= MOST:
            raise ValueError(f"K={self.k}; expected at least 1 negative per query, at most {MOST}")
        if not 1 <= self.first <= self.last <= MOST:
            raise ValueError(f"RANKS={self.first}:{self.last}; expected first:last such as 10:100, from 1 to {MOST}")
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
        start, end = self._bounds(query_ids)
        return end - start

    def positives(
        self, query_ids: Int[np.ndarray, "query"]
    ) -> tuple[Int64[np.ndarray, "found"], Int64[np.ndarray, "found"]]:
        """The positives of each query: its position in `query_ids`, ascending, and the product."""
        row, at = _expanded(*self._bounds(query_ids))
        row, at = row[self.positive[at]], at[self.positive[at]]
        return row, self.pair[at] % max(self.products, 1)

    def _bounds(self, query_ids: Int[np.ndarray, "query"]) -> tuple[np.ndarray, np.ndarray]:
        start = query_ids.astype(np.int64) * self.products
        return np.searchsorted(self.pair, start), np.searchsorted(self.pair, start + self.products)

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
    vectors: Vectors,
    rules: Rules,
) -> Mined:
    """The negatives of queries, given their ranked lists, best first (id -1 where a list ends).

    Lists of `rules.last + known.counts` products are long enough: longer ones give the same. `vectors` is asked for
    those of products that score like a positive of the same query, in the same order whenever the lists are the same.
    """
    kind, score = known.kinds(query_ids, ids), scores.astype(np.float64)
    free = (ids >= 0) & (kind == UNKNOWN)
    better = free.cumsum(1) - free  # free products above each place
    within = better < rules.last
    window = free & within & (better >= rules.first - 1)
    positive = kind == POSITIVE
    close = np.zeros_like(window)
    if rules.margin is not None:
        best = np.where(positive, score, -np.inf).max(1, keepdims=True, initial=-np.inf)
        close = window & ~(score < best - rules.margin)
    same = window & ~close
    near, past = _near(same, positive, score, ids), _past(same, positive, score, query_ids, ids, known)
    candidate, twin = np.hstack([near, past])
    same[same] = _equal(ids[same], candidate, twin, vectors)
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


def _near(
    asked: Bool[np.ndarray, "query k"],
    positive: Bool[np.ndarray, "query k"],
    score: Float[np.ndarray, "query k"],
    ids: Int[np.ndarray, "query k"],
) -> Int64[np.ndarray, "2 pair"]:
    """Pairs of the n-th asked place and a positive in the same list that scores like it: n, and the positive.

    Positives are laid on one line, by query and then by falling score, as they come: the near ones are neighbours.
    """
    if not positive.any() or not asked.any():
        return np.zeros((2, 0), np.int64)
    step = 2 * np.abs(score[asked | positive]).max() + 1
    line = positive.nonzero()[0] * step - score[positive]
    place = asked.nonzero()[0] * step - score[asked]
    which, at = _expanded(np.searchsorted(line, place - 2 * SAME), np.searchsorted(line, place + 2 * SAME))
    return np.stack([which, ids[positive][at].astype(np.int64)])


def _past(
    asked: Bool[np.ndarray, "query k"],
    positive: Bool[np.ndarray, "query k"],
    score: Float[np.ndarray, "query k"],
    query_ids: Int[np.ndarray, "query"],
    ids: Int[np.ndarray, "query k"],
    known: Known,
) -> Int64[np.ndarray, "2 pair"]:
    """The same of positives past the end of a list: they score at most like its last product."""
    last = (asked & (score <= score[:, -1:] + 2 * SAME))[asked]
    number, row = last.nonzero()[0], asked.nonzero()[0][last]
    rows, place = np.unique(row, return_inverse=True)
    of, product = known.positives(query_ids[rows])
    listed = positive[rows].nonzero()[0] * known.products + ids[rows][positive[rows]]
    unseen = ~np.isin(of * known.products + product, listed)
    of, product = of[unseen], product[unseen]
    which, at = _expanded(np.searchsorted(of, place), np.searchsorted(of, place, side="right"))
    return np.stack([number[which], product[at]])


def _equal(
    products: Int[np.ndarray, "candidate"],
    candidate: Int64[np.ndarray, "pair"],
    positive: Int64[np.ndarray, "pair"],
    vectors: Vectors,
) -> Bool[np.ndarray, "candidate"]:
    """Whether the vector of each product equals that of a positive that it is paired with."""
    found = np.zeros(len(products), bool)
    for start in range(0, len(candidate), PAIRS):
        one, other = candidate[start : start + PAIRS], positive[start : start + PAIRS]
        ids, place = np.unique(np.concatenate([products[one], other]), return_inverse=True)
        rows = vectors(ids)
        apart = np.linalg.norm(rows[place[: len(one)]] - rows[place[len(one) :]], axis=1)
        found[one[apart <= SAME]] = True
    return found


def _expanded(
    start: Int[np.ndarray, "range"], end: Int[np.ndarray, "range"]
) -> tuple[Int64[np.ndarray, "number"], Int64[np.ndarray, "number"]]:
    """All numbers from each start to before its end, in order, after the range that each comes from."""
    count = end - start
    which = np.repeat(np.arange(len(start)), count)
    return which, np.arange(len(which)) - np.repeat(count.cumsum() - count, count) + start[which]
