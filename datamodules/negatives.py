"""Which hard negatives a query may be given, and which of them a tuple is given in an epoch. Pure numpy.

A tuple's k are drawn without replacement from the query's candidates, which are never positives of it, by a hash of
(seed, epoch, query, product): they depend on no rank, worker or step. Where the candidates end, the rest are drawn from
all products that are not positives of the query.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, Integer, UInt8, UInt64

from datamodules.plan import HARD, hashed
from datamodules.stream.substitutes import TRIES

RANDOM = 0  # the source of a negative that no list names; a list's is 1 + its position


@dataclass(frozen=True)
class Candidates:
    """Every query's candidates, and its positives, as compressed rows: query q's are start[q] to start[q + 1].

    A candidate is its `number` among the products that are not positives of its query, ascending, so that all products
    that a query may be given are 0 to free[q] - 1; `ahead` takes numbers back to dense ids: entry i of a query's
    positives is q x products + how many products that are not positives come before its i-th.
    Memory: 5 bytes per candidate, 8 per positive, 16 per query; some 60 bytes per row while they are made.
    """

    products: int
    start: Int64[np.ndarray, "queries_and_end"]
    number: Integer[np.ndarray, "candidate"]
    source: UInt8[np.ndarray, "candidate"]
    positive_start: Int64[np.ndarray, "queries_and_end"]
    ahead: Int64[np.ndarray, "positive"]

    @classmethod
    def of(
        cls,
        queries: int,
        products: int,
        positives: tuple[Integer[np.ndarray, "positive"], Integer[np.ndarray, "positive"]],
        sources: Sequence[tuple[np.ndarray, np.ndarray]],
    ) -> "Candidates":
        """From (query, product) pairs. Positives are taken out; of a pair in several sources, the first one counts."""
        positive = np.unique(_keys(*positives, products))
        listed = [_keys(*pairs, products) for pairs in sources]
        key, first = np.unique(np.concatenate([np.zeros(0, np.int64), *listed]), return_index=True)
        source = np.repeat(np.arange(1, len(listed) + 1, dtype=np.uint8), [len(keys) for keys in listed])[first]
        before = np.searchsorted(positive, key)
        kept = np.append(positive, -1)[before] != key
        key, source, before = key[kept], source[kept], before[kept]
        bounds = np.arange(queries + 1, dtype=np.int64) * products
        start, positive_start = np.searchsorted(key, bounds), np.searchsorted(positive, bounds)
        query, product = key // products, key % products
        number = product - (before - positive_start[query])
        ahead = positive - (np.arange(len(positive)) - positive_start[positive // products])
        return cls(products, start, number.astype(np.int32), source, positive_start, ahead)

    def free(self, query: Int64[np.ndarray, "tuple"]) -> Int64[np.ndarray, "tuple"]:
        """How many products are not positives of a query."""
        return self.products - (self.positive_start[query + 1] - self.positive_start[query])

    def draw(
        self, seed: int, epoch: int, query: Int64[np.ndarray, "tuple"], product: Int64[np.ndarray, "tuple"], k: int
    ) -> tuple[Int64[np.ndarray, "tuple k"], Int64[np.ndarray, "tuple k"]]:
        """Dense ids and sources of k different negatives for each (query, product), of which `free` are at least k.

        Number j takes the (hash mod n)-th of the n candidates that are left; without any, of the n products.
        """
        keys = (np.repeat(query, k), np.repeat(product, k), np.tile(np.arange(k), len(query)))
        hashes = hashed(seed, epoch, HARD, *keys).reshape(len(query), k)
        count, free = self.start[query + 1] - self.start[query], self.free(query)
        place, number, source = (np.zeros((len(query), k), np.int64) for _ in range(3))
        for j in range(k):
            listed, others = np.flatnonzero(count > j), np.flatnonzero(count <= j)
            place[listed, j] = _left(_modulo(hashes[listed, j], count[listed] - j), place[listed, :j])
            at = self.start[query[listed]] + place[listed, j]
            number[listed, j], source[listed, j] = self.number[at], self.source[at]
            number[others, j] = _left(_modulo(hashes[others, j], free[others] - j), number[others, :j])
        return self._products(np.repeat(query, k), number.reshape(-1)).reshape(number.shape), source

    def instead(self, seed: int, epoch: int, query: int, product: int, j: int, taken: Sequence[int]) -> Iterator[int]:
        """Up to TRIES products, at random, for the tuple's negative j, in the order in which they are tried.

        Of those that the query may be given and that are not `taken`, which are such as well; none when all are.
        """
        queries = np.full(TRIES, query, np.int64)
        left = self.free(queries) - len(taken)
        if not left[0]:
            return iter(())
        hashes = hashed(seed, epoch, HARD, query, product, -1 - j, np.arange(TRIES))
        numbers = np.tile(self._numbers(query, np.array(taken, np.int64)), (TRIES, 1))
        return iter(self._products(queries, _left(_modulo(hashes, left), numbers)).tolist())

    def _numbers(self, query: int, product: Int64[np.ndarray, "product"]) -> Int64[np.ndarray, "product"]:
        """Of products that are not positives of the query, their numbers."""
        ahead = self.ahead[self.positive_start[query] : self.positive_start[query + 1]] - query * self.products
        return product - np.searchsorted(ahead + np.arange(len(ahead)), product)

    def _products(self, query: Int64[np.ndarray, "row"], number: Int64[np.ndarray, "row"]) -> Int64[np.ndarray, "row"]:
        ahead = np.searchsorted(self.ahead, query * self.products + number, side="right")
        return number + ahead - self.positive_start[query]


def _keys(query: np.ndarray, product: np.ndarray, products: int) -> Int64[np.ndarray, "pair"]:
    """Numbers that sort as (query, product)."""
    return query.astype(np.int64) * products + product


def _modulo(hashes: UInt64[np.ndarray, "row"], count: Int64[np.ndarray, "row"]) -> Int64[np.ndarray, "row"]:
    return (hashes % count.astype(np.uint64)).astype(np.int64)


def _left(nth: Int64[np.ndarray, "row"], taken: Int64[np.ndarray, "row taken"]) -> Int64[np.ndarray, "row"]:
    """The nth number, from 0, of those that are not taken in the row."""
    for one in np.sort(taken, axis=1).T:
        nth = nth + (nth >= one)
    return nth
