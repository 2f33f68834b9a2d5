"""What failed while products were read, by reason: counted, limited and told of, never skipped in silence."""

import warnings
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

UNREAD, BLIND = "unread before", "no photo before"
# What costs the whole sample, and what the photo alone: photos.PhotoError's. The last of each are of products that are
# not read now, in batches without content, but failed when they were.
SAMPLE_REASONS = ("missing shard", "unreachable", "checksum", "truncated", "wrong member", "invalid JSON", UNREAD)
PHOTO_REASONS = ("empty", "not a photo", "too large", "damaged", BLIND)
REASONS = (*SAMPLE_REASONS, *PHOTO_REASONS)
WORST = 5  # shards named in a message


class Failed(NamedTuple):
    """A sample that could not be read, or a photo that could not be decoded."""

    reason: str
    shard: str
    product_id: str


class TooManyFailuresError(ValueError):
    """More than the limit, on one rank: the others do not hear of it, so that it has to be told there."""

    one_rank = True


class Failures:
    """Counts what failed in one pass over some products.

    Raises ValueError as soon as that is more than `limit` x products: of all ranks' products, so that shards which are
    spread unevenly over ranks stop no run that the whole would not stop. `instead` says what became of those that
    could not be read.
    """

    def __init__(self, what: str, products: int, limit: float = 1.0, instead: str = "taken as empty") -> None:
        self.what, self.products, self.limit, self.instead = what, products, limit, instead
        self.reasons: Counter[str] = Counter()
        self.shards: Counter[str] = Counter()
        self.example = ""

    def add(self, failed: Iterable[Failed]) -> None:
        for one in failed:
            self.reasons[one.reason] += 1
            self.shards[one.shard] += 1
            self.example = self.example or one.product_id
        if self._over():
            raise TooManyFailuresError(self._too_many())

    def merge(self, others: "Iterable[Failures]") -> None:
        """Adds what other ranks counted in the same pass. Raises the same on every rank that merges the same."""
        for other in others:
            self.reasons += other.reasons
            self.shards += other.shards
            self.example = self.example or other.example
        if self._over():
            raise ValueError(self._too_many())

    def _over(self) -> bool:
        return self.reasons.total() > self.limit * self.products

    def _too_many(self) -> str:
        return (
            f"{self}. That is over the limit data.max_broken={self.limit}: copy or import these shards again, "
            "or raise the limit to go on without"
        )

    def counts(self) -> dict[str, int]:
        """For each of REASONS, in their order, how many."""
        return {reason: self.reasons[reason] for reason in REASONS}

    def warn(self) -> None:
        if self.reasons:
            unread = sum(self.reasons[reason] for reason in SAMPLE_REASONS)
            photos = self.reasons.total() - unread
            became = [f"the {photos} were taken without photo"] * bool(photos)
            became += [f"the {unread} that could not be read at all were {self.instead}"] * bool(unread)
            warnings.warn(f"{self}; {', '.join(became)}", stacklevel=3)

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        return (
            f"{self.what}: {self.reasons.total()} of {self.products} products failed ({reasons}), "
            f"most in shards {worst(self.shards)}, such as product {self.example!r}"
        )


def worst(shards: Counter[str]) -> str:
    """The shards where most failed, each with how many."""
    return ", ".join(f"{shard} ({count})" for shard, count in shards.most_common(WORST))
