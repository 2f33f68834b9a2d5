"""Ranked lists against judgments: the gain of each retrieved product, and the best gains there were to retrieve."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int

from mmfusion.batch import Judgments

UNJUDGED = ("zero", "condensed")
PLACES = 2**18  # of the tables that are looked up in at a time; they fit into a processor's cache
FIBONACCI = 0x9E3779B97F4A7C15 >> 32  # 2^32 over the golden ratio (Knuth, volume 3, section 6.4)


@dataclass
class Ranked:
    """What the judgments say about ranked lists, in one label column.

    ids: the lists, -1 where padded. shown: the gains of their products, NaN where not judged and where padded.
    gains: those that count; they are `shown`, or what is left of it when unjudged products are taken off the lists.
    relevant: which of `gains` are relevant: at least `positive_from`.
    ideal: the largest gains of all judged products of the query, descending, 0 beyond the last; as many columns as the
      most that a query has, k at most.
    relevant_total: the number of relevant products of the query, retrieved or not.
    largest: the largest gain of the column: of its labels, or of all its judgments where labels are numbers.
    """

    ids: Int[np.ndarray, "query k"]
    shown: Float[np.ndarray, "query k"]
    gains: Float[np.ndarray, "query k"]
    relevant: Bool[np.ndarray, "query k"]
    ideal: Float[np.ndarray, "query best"]
    relevant_total: Int[np.ndarray, "query"]
    largest: float
    positive_from: float
    _hits: dict[int, Int[np.ndarray, "query"]] = field(default_factory=dict)

    def hits(self, k: int) -> Int[np.ndarray, "query"]:
        """The number of relevant products among the first k; counted once for all metrics."""
        if k not in self._hits:
            self._hits[k] = np.count_nonzero(self.relevant[:, :k], axis=1)
        return self._hits[k]


def ranked_gains(
    ids: Int[np.ndarray, "query k"],
    query_ids: Int[np.ndarray, "query"],
    judgments: Judgments,
    column: str,
    unjudged: str = "zero",
) -> Ranked:
    """Looks up ranked lists of product ids (best first, -1 pads), one per query id, in a label column's judgments.

    unjudged: "zero" leaves a product that nobody judged where it is, without a gain; "condensed" takes it off the list
    before ranks are counted (Sakai 2007).
    Where `judgments.unlisted` is "irrelevant", a pair that is not listed is judged: its gain is 0.
    Raises ValueError for a column that is not there, for a query that has two lists and for a list that holds a judged
    product twice.
    """
    if column not in judgments.gain:
        raise ValueError(f"no label column {column!r} in the judgments; there are: {', '.join(judgments.gain)}")
    if unjudged not in UNJUDGED:
        raise ValueError(f"unjudged is {unjudged!r}; expected one of: {', '.join(UNJUDGED)}")
    listed, row = _listed(query_ids, judgments.query)
    product, gain = judgments.product[listed], judgments.gain[column][listed]
    shown = np.full(ids.shape, np.nan)
    if judgments.unlisted == "irrelevant":
        shown[ids >= 0] = 0.0
    at, pair = _found(ids, row, product)
    _check_once(ids, query_ids, at, pair, len(gain))
    shown.reshape(-1)[at] = gain[pair]
    gains = _condensed(shown) if unjudged == "condensed" else shown
    positive_from, labels = judgments.positive_from[column], judgments.labels.get(column)
    known = judgments.gain[column]
    return Ranked(
        ids=ids,
        shown=shown,
        gains=gains,
        relevant=gains >= positive_from,
        ideal=_largest(row, np.fmax(gain, 0), *ids.shape),
        relevant_total=np.bincount(row, gain >= positive_from, len(ids)).astype(np.int64),
        largest=float(max(labels.values()) if labels else np.fmax.reduce(known, initial=0.0)),
        positive_from=positive_from,
    )


def places(row: Int[np.ndarray, "entry"], rows: int) -> Int[np.ndarray, "entry"]:
    """The position of each entry among those of its row; `row` ascends and is below `rows`."""
    counts = np.bincount(row, minlength=rows)
    return np.arange(len(row)) - (np.cumsum(counts) - counts)[row]


def _listed(
    query_ids: Int[np.ndarray, "query"], judged: Int[np.ndarray, "listed"]
) -> tuple[Int[np.ndarray, "evaluated"] | slice, Int[np.ndarray, "evaluated"]]:
    """The judgments of the queries that have a list, and the row of that list, ascending."""
    row_of = np.full(1 + max(judged.max(initial=-1), query_ids.max(initial=-1)), -1)
    row_of[query_ids] = np.arange(len(query_ids))
    again = np.flatnonzero(row_of[query_ids] != np.arange(len(query_ids)))
    if len(again):
        raise ValueError(f"query id {query_ids[again[0]]} has more than one list; expected each query once")
    row = row_of[judged]
    if np.all(row[:1] >= 0) and np.all(row[:-1] <= row[1:]):
        return slice(None), row
    listed = np.argsort(row, kind="stable")[np.count_nonzero(row < 0) :]
    return listed, row[listed]


def _found(
    ids: Int[np.ndarray, "query k"],
    row: Int[np.ndarray, "listed"],
    product: Int[np.ndarray, "listed"],
    turn: int = 0,
) -> tuple[Int[np.ndarray, "found"], Int[np.ndarray, "found"]]:
    """Where among the flattened ids there is a product that is listed for its row, and which listed pair that is.

    Each row has a small table of its listed pairs, in which every product of its list is looked up. Of pairs that fall
    into one place the last is kept; the others are few, and have another turn with another hash. `row` ascends.
    """
    k = ids.shape[1]
    bits = int(np.bincount(row, minlength=1).max()).bit_length() + 6
    rows = max(1, PLACES >> bits)
    taken, listed = np.zeros(rows << bits, np.bool_), np.zeros(rows << bits, np.int32)  # places, and the pairs in them
    found_at, found_pair, beaten = ([np.zeros(0, np.int64)] for _ in range(3))
    for start in range(0, len(ids), rows):
        first, last = np.searchsorted(row, (start, start + rows))
        own = (row[first:last] - start << bits) + _place(product[first:last], bits, turn)
        pairs = np.arange(last - first)
        taken[own], listed[own] = True, pairs
        beaten.append(first + np.flatnonzero(listed[own] != pairs))
        block = ids[start : start + rows]
        looked_up = _place(block, bits, turn)
        looked_up += (np.arange(len(block)) << bits)[:, None]
        at = np.flatnonzero(taken.take(looked_up))
        pair = listed.take(looked_up.reshape(-1)[at]) + first
        same = block.reshape(-1)[at] == product[pair]
        found_at.append(at[same] + start * k)
        found_pair.append(pair[same])
        taken[own] = False
    if len(again := np.concatenate(beaten)):
        left, place = np.unique(row[again], return_inverse=True)
        at, pair = _found(ids[left], place, product[again], turn + 1)
        found_at.append(left[at // k] * k + at % k)
        found_pair.append(again[pair])
    return np.concatenate(found_at), np.concatenate(found_pair)


def _place(product: Int[np.ndarray, "*shape"], bits: int, turn: int) -> Int[np.ndarray, "*shape"]:
    """A number below 2^bits: the low bits, which tell neighbours apart, then those of products with odd constants."""
    if turn == 0:
        return product & ((1 << bits) - 1)
    return ((product * (2 * turn + 1) * FIBONACCI) >> 20) & ((1 << bits) - 1)


def _check_once(
    ids: Int[np.ndarray, "query k"],
    query_ids: Int[np.ndarray, "query"],
    at: Int[np.ndarray, "found"],
    pair: Int[np.ndarray, "found"],
    listed: int,
) -> None:
    """Only judged products are looked at: of the others, a copy changes no gain."""
    twice = np.flatnonzero(np.bincount(pair, minlength=listed) > 1)
    if len(twice):
        where = at[pair == twice[0]][0]
        query = query_ids[where // ids.shape[1]]
        raise ValueError(f"the list of query id {query} holds product id {ids.flat[where]} twice; expected it once")


def _condensed(shown: Float[np.ndarray, "query k"]) -> Float[np.ndarray, "query k"]:
    row, column = np.nonzero(~np.isnan(shown))
    gains = np.full(shown.shape, np.nan)
    gains[row, places(row, len(shown))] = shown[row, column]
    return gains


def _largest(
    row: Int[np.ndarray, "listed"], gain: Float[np.ndarray, "listed"], rows: int, k: int
) -> Float[np.ndarray, "query best"]:
    """The k largest gains of each row, descending, or all where no row has that many; `row` ascends.

    Rows are padded to a power of two and sorted together with all those of that size.
    """
    counts = np.bincount(row, minlength=rows)
    start, bits = np.cumsum(counts) - counts, np.frexp(counts)[1]
    largest = np.zeros((rows, min(k, counts.max(initial=0))))
    for size in np.unique(bits[counts > 0]).tolist():
        same, place = np.flatnonzero(bits == size), np.arange(2**size)
        gains = gain.take(start[same, None] + place, mode="clip")
        np.copyto(gains, 0.0, where=place >= counts[same, None])
        gains.sort()
        width = min(2**size, largest.shape[1])
        largest[same, :width] = gains[:, : -width - 1 : -1]
    return largest
