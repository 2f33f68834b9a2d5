"""The order of training: a pure function of (seed, epoch, counts per shard), known without reading any shard.

An epoch shuffles the shards, lays them end to end and cuts the line into `streams` runs that differ by at most one
sample. Within a run samples are shuffled by a window. Batch k, the *global* contrastive batch, takes the same share of
each run; a rank owns consecutive runs. So the samples of a step do not depend on the number of ranks or workers, and
to resume at (epoch, step) costs nothing. The idea is that of MosaicML Streaming's canonical nodes, over plain tars.

All randomness is a hash (splitmix64) of (seed, epoch, what is drawn): the same on every machine and version of numpy.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from jaxtyping import Float, Int64, Integer, UInt64

# what a hash is for, so that no two draws are related
ORDER_OF_SHARDS, ORDER_OF_SAMPLES, DRAW, CHOICE, SUBSTITUTE, HARD, EXTRA = range(7)


def splitmix64(state: UInt64[np.ndarray, "key"]) -> UInt64[np.ndarray, "key"]:
    """One output of Vigna's splitmix64 for each state: a bijection whose outputs pass as independent random numbers."""
    mixed = state + np.uint64(0x9E3779B97F4A7C15)  # arithmetic is modulo 2^64
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def hashed(*keys: int | Integer[np.ndarray, "key"]) -> UInt64[np.ndarray, "..."]:
    """A random 64-bit number for each combination of keys (integers, also negative; an array broadcasts)."""
    value = np.zeros(1, np.uint64)
    for key in keys:
        value = splitmix64(value ^ np.asarray(key).astype(np.int64).view(np.uint64))
    return value


def uniform(hashes: UInt64[np.ndarray, "key"]) -> Float[np.ndarray, "key"]:
    """The upper 53 bits as numbers in [0, 1)."""
    return (hashes >> np.uint64(11)) * 2.0**-53


def draws(seed: int, epoch: int, product: Int64[np.ndarray, "product"]) -> Int64[np.ndarray, "product"]:
    """The 63-bit number of a product in an epoch, from which its query and its augmentation derive."""
    return (hashed(seed, epoch, DRAW, product) >> np.uint64(1)).astype(np.int64)


def points(
    draw: Int64[np.ndarray, "slot"], number: Int64[np.ndarray, "slot"], count: Int64[np.ndarray, "slot"]
) -> Float[np.ndarray, "slot"]:
    """Where slot `number` of a product's `count` falls in [0, 1): 1 / count apart, from one random offset per draw."""
    return (number + uniform(hashed(draw, CHOICE))) / count


def chosen(weight: Float[np.ndarray, "pair"], point: float) -> int:
    """Which of a product's pairs is shown at a point of [0, 1), each pair taking a stretch in proportion to its weight.

    With `points` this is systematic resampling: over the product's slots a pair is shown count x its share of the
    weight times, rounded up or down, and on average exactly that. With one slot it is a weighted draw.
    """
    cumulative = weight.cumsum()
    return min(int(cumulative.searchsorted(point * cumulative[-1], side="right")), len(weight) - 1)


def extra(seed: int, epoch: int, step: int, count: int, among: int) -> Int64[np.ndarray, "count"]:
    """Numbers below `among` for a step, with replacement: which queries come beside those of its tuples."""
    return (hashed(seed, epoch, EXTRA, step, np.arange(count)) % np.uint64(among)).astype(np.int64)


@dataclass(frozen=True)
class Slots:
    """What a plan counts: a position is one slot of a trainable product; products in the order of the shards.

    `end[i]` is the number of slots of products 0..i of this list: one each, or as many as they have pairs.
    """

    product: Int64[np.ndarray, "trainable"]
    shard: Integer[np.ndarray, "trainable"]
    end: Int64[np.ndarray, "trainable"]

    @classmethod
    def of(
        cls,
        shard: Integer[np.ndarray, "product"],
        pairs: Integer[np.ndarray, "product"],
        epoch: Literal["products", "pairs"],
    ) -> "Slots":
        """From the index: each product's shard (ascending) and number of train positives; 0 is not trainable."""
        trainable = pairs > 0
        product = np.flatnonzero(trainable).astype(np.int64)
        count = np.ones(len(product), np.int64) if epoch == "products" else pairs[trainable].astype(np.int64)
        return cls(product, shard[trainable], np.cumsum(count))

    def per_shard(self, shards: int) -> Int64[np.ndarray, "shard"]:
        """Number of slots in each of the shards."""
        ends = np.concatenate([[0], self.end])[np.searchsorted(self.shard, np.arange(shards), side="right")]
        return np.diff(ends, prepend=0).astype(np.int64)

    def at(self, position: Int64[np.ndarray, "position"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each position: dense product id, number of the slot within its product, slots of the product."""
        row = np.searchsorted(self.end, position, side="right")
        first = np.where(row > 0, self.end[row - 1], 0)
        return self.product[row], position - first, self.end[row] - first


class Plan:
    """Which positions make up batch `step` of `epoch`, for each rank.

    Args:
        slots: number of slots of each shard; positions count through them in the order of the shards.
        seed: of the order; another seed, another order.
        batch: size of the global batch, a multiple of `streams`.
        streams: number of runs; a multiple of every number of ranks to be used.
        window: samples among which a run is shuffled: a sample moves by less than this from its place in the run.
    """

    def __init__(
        self, slots: Integer[np.ndarray, "shard"], seed: int, batch: int, streams: int = 8, window: int = 16384
    ) -> None:
        total = int(slots.sum())
        for name, value in (("streams", streams), ("batch", batch), ("window", window)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if batch % streams:
            near = max(batch // streams, 1) * streams
            raise ValueError(
                f"a global batch of {batch} cannot take the same share of {streams} streams: "
                f"make data.batch_size a multiple of them (such as {near}) or change data.streams"
            )
        if total < batch:
            raise ValueError(
                f"{total} training samples are fewer than one global batch of {batch}: "
                f"make data.batch_size at most {total} or bring more data"
            )
        self.slots, self.seed, self.window = slots, seed, window
        self.size, self.streams = batch, streams
        self.steps = total // streams // (batch // streams)
        self._epoch: tuple[int, Int64[np.ndarray, "run step share"]] | None = None

    def check(self, ranks: int) -> None:
        """Raises ValueError when the streams cannot be shared by so many ranks."""
        if self.streams % ranks:
            raise ValueError(
                f"{self.streams} streams cannot be shared by {ranks} ranks: "
                f"use a number of ranks that divides {self.streams}, or set data.streams to a multiple of {ranks}"
            )

    def batch(self, epoch: int, step: int, rank: int = 0, ranks: int = 1) -> Int64[np.ndarray, "position"]:
        """Positions of one rank's part, in run order: size / ranks of them, whatever the rank."""
        self.check(ranks)
        if not (0 <= step < self.steps and 0 <= rank < ranks):
            raise IndexError(f"step {step} of {self.steps}, rank {rank} of {ranks}")
        own = self.streams // ranks
        return self._order(epoch)[rank * own : (rank + 1) * own, step].reshape(-1)

    def _order(self, epoch: int) -> Int64[np.ndarray, "run step share"]:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffled(epoch))
        return self._epoch[1]

    def _shuffled(self, epoch: int) -> Int64[np.ndarray, "run step share"]:
        line = self._line(epoch)
        cuts = np.arange(self.streams + 1) * len(line) // self.streams
        used = self.steps * (self.size // self.streams)
        runs = [self._windowed(epoch, line[start:end])[:used] for start, end in pairwise(cuts)]
        return np.stack(runs).reshape(self.streams, self.steps, -1)

    def _line(self, epoch: int) -> Int64[np.ndarray, "position"]:
        """All positions, shard after shard, the shards in this epoch's order."""
        ends = np.cumsum(self.slots)
        order = np.argsort(hashed(self.seed, epoch, ORDER_OF_SHARDS, np.arange(len(ends))), kind="stable")
        counts = self.slots[order]
        shift = (ends - self.slots)[order] - (np.cumsum(counts) - counts)
        return np.arange(counts.sum()) + np.repeat(shift, counts)

    def _windowed(self, epoch: int, run: Int64[np.ndarray, "position"]) -> Int64[np.ndarray, "position"]:
        """Sorted by place + uniform(0, window): a shuffle buffer's local mixing without its endless tail."""
        noise = uniform(hashed(self.seed, epoch, ORDER_OF_SAMPLES, run)) * self.window
        return run[np.argsort(np.arange(len(run)) + noise, kind="stable")]
