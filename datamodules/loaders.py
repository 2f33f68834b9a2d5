"""Loaders of training and evaluation batches: worker processes, equal batches on all ranks, counts of what failed."""

import multiprocessing
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch.utils.data import DataLoader, Dataset

from datamodules.batches import Broken, Reader, Request, joined
from datamodules.plan import Plan, Slots, draws
from mmfusion.batch import ProductBatch, QueryBatch, TupleBatch

# Forked workers start at once and share the cache of photos; elsewhere (macOS, Windows) torch's default.
CONTEXT = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
EVALUATION = -1  # the epoch of evaluation draws: fixed, and no training epoch


class _Reading(Dataset[Any]):
    """A request -> what `read` makes of it; runs in the workers."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self.read = read

    def __getitem__(self, request: Any) -> Any:
        return self.read(request)


def _as_read(batch: Any) -> Any:
    return batch


def reading(read: Callable[[Any], Any], requests: Iterable[Any], workers: int, persistent: bool) -> DataLoader[Any]:
    """`read` applied to the requests in order; request i by worker i % workers, or in this process without workers."""
    options: dict[str, Any] = {"multiprocessing_context": CONTEXT, "persistent_workers": persistent} if workers else {}
    return DataLoader(
        _Reading(read),
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        collate_fn=_as_read,
        generator=torch.Generator(),  # DataLoader draws a number per epoch: not from the model's random state
        **options,
    )


class BrokenPhotos:
    """Counts photos that could not be decoded in one pass over some products.

    Raises ValueError as soon as there are more than `limit` x products; warns at the end of the pass about any.
    """

    def __init__(self, what: str, products: int, limit: float) -> None:
        self.what, self.products, self.limit = what, products, limit
        self.reasons: Counter[str] = Counter()
        self.shards: Counter[str] = Counter()
        self.example = ""

    def add(self, broken: list[Broken]) -> None:
        for photo in broken:
            self.reasons[photo.reason] += 1
            self.shards[photo.shard] += 1
            self.example = self.example or photo.product_id
        if self.reasons.total() > self.limit * self.products:
            raise ValueError(
                f"{self}. That is over the limit data.max_broken={self.limit}: import these products again, "
                "or raise the limit to go on without their photos"
            )

    def warn(self) -> None:
        if self.reasons:
            warnings.warn(f"{self}; those products were taken without photo", stacklevel=3)

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        shards = ", ".join(f"{shard} ({count})" for shard, count in self.shards.most_common(5))
        return (
            f"{self.what}: {self.reasons.total()} photos of {self.products} products cannot be decoded ({reasons}), "
            f"most in shards {shards}, such as that of product {self.example!r}"
        )


class _Shares:
    """The requests of an epoch from a step on: each batch of the rank in `shares` parts, cut in run order."""

    def __init__(self, plan: Plan, slots: Slots, rank: int, ranks: int, shares: int) -> None:
        self.plan, self.slots, self.rank, self.ranks, self.shares = plan, slots, rank, ranks, shares
        self.epoch = self.step = 0

    def __iter__(self) -> Iterator[Request]:
        epoch = self.epoch
        for step in range(self.step, self.plan.steps):
            positions = self.plan.batch(epoch, step, self.rank, self.ranks)
            for part in np.array_split(positions, self.shares):
                product, number, slots = self.slots.at(part)
                yield Request(product, number, slots, draws(self.plan.seed, epoch, product))


class TupleLoader:
    """A rank's part of every training batch; as long as the plan.

    An iteration begins at `progress()` = (epoch, steps of it already done), asked when its first batch is. With a
    trainer that is the trainer's own count, which it restores by itself: steps done, not batches fetched ahead.
    """

    def __init__(
        self,
        plan: Plan,
        slots: Slots,
        reader: Reader,
        progress: Callable[[], tuple[int, int]],
        *,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
        max_broken: float = 0.01,
    ) -> None:
        self.plan, self.progress, self.max_broken = plan, progress, max_broken
        self.samples = len(plan.batch(0, 0, rank, ranks))
        workers = min(workers, self.samples)
        self._shares = _Shares(plan, slots, rank, ranks, max(workers, 1))
        self._reading = partial(reading, reader.tuples, self._shares, workers, persistent=True)
        self._open: DataLoader[Any] | None = None

    def __len__(self) -> int:
        return self.plan.steps

    def __iter__(self) -> Iterator[TupleBatch]:
        self._shares.epoch, self._shares.step = self.progress()
        broken = BrokenPhotos(f"epoch {self._shares.epoch}", self.samples * len(self), self.max_broken)
        self._open = self._reading() if self._open is None else self._open
        shares = iter(self._open)
        for step in range(self._shares.step, len(self)):
            read = [next(shares) for _ in range(self._shares.shares)]
            for _, failed in read:
                broken.add(failed)
            if step + 1 == len(self):  # now: Lightning does not ask for more than len(self) batches
                broken.warn()
            yield joined([batch for batch, _ in read])

    def close(self) -> None:
        """Ends the workers, which otherwise wait for the next epoch."""
        self._open = None

    def state_dict(self) -> dict[str, int]:
        """The same on every rank, as Lightning saves only rank 0's."""
        epoch, step = self.progress()
        return {"seed": self.plan.seed, "epoch": epoch, "step": step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Checks the seed; the position is the trainer's. Raises ValueError when the order would be another one."""
        if state["seed"] != self.plan.seed:
            raise ValueError(f"the checkpoint's data order has seed {state['seed']}, this run {self.plan.seed}")


class Share(NamedTuple):
    """Rows of evaluation batches; not valid are those that only make a rank's batches as long as the others'.

    Those repeat a real row, so that whatever is kept by id stays right.
    """

    id: Int64[np.ndarray, "own"]
    valid: Bool[np.ndarray, "own"]

    @classmethod
    def of(cls, ids: Int64[np.ndarray, "all"], rank: int, ranks: int) -> "Share":
        """A rank's consecutive part; together each id once."""
        length = -(-len(ids) // ranks)
        place = np.arange(rank * length, (rank + 1) * length)
        return cls(ids[np.minimum(place, len(ids) - 1)], place < len(ids))

    def parts(self, batch_size: int) -> "list[Share]":
        cuts = range(0, len(self.id), batch_size)
        return [Share(self.id[start : start + batch_size], self.valid[start : start + batch_size]) for start in cuts]


class QueryLoader:
    """Evaluation batches of a rank's queries."""

    def __init__(self, reader: Reader, share: Share, batch_size: int) -> None:
        self.reader, self.parts = reader, share.parts(batch_size)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[QueryBatch]:
        for part in self.parts:
            yield replace(self.reader.queries(part.id), valid=torch.from_numpy(part.valid))


class CorpusLoader:
    """Evaluation batches of a rank's products, with fixed draws."""

    def __init__(self, reader: Reader, share: Share, batch_size: int, seed: int, workers: int) -> None:
        self.reader, self.seed, self.workers = reader, seed, workers
        self.products, self.parts = int(share.valid.sum()), share.parts(batch_size)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[ProductBatch]:
        broken = BrokenPhotos("corpus", self.products, limit=1.0)
        read = iter(reading(self._read, self.parts, self.workers, persistent=False))
        for number in range(len(self)):
            batch, failed = next(read)
            broken.add(failed)
            if number + 1 == len(self):
                next(read, None)  # its end lets the workers go; Lightning does not ask for it
                broken.warn()
            yield batch

    def _read(self, part: Share) -> tuple[ProductBatch, list[Broken]]:
        batch, broken = self.reader.products(part.id, draws(self.seed, EVALUATION, part.id))
        return replace(batch, valid=torch.from_numpy(part.valid)), broken
