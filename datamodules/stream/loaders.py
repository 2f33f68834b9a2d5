"""Loaders of training and evaluation batches: worker processes, equal batches on all ranks, counts of what failed."""

import copy
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch.utils.data import DataLoader

from datamodules.outcomes import result
from datamodules.plan import Plan, Slots, draws
from datamodules.stream.batches import Reader, Request, joined
from datamodules.stream.blocks import BLOCKS, IntoBlocks, PhotoBlocks
from datamodules.stream.failures import Failed, Failures
from datamodules.stream.lookahead import looking_ahead
from datamodules.stream.workers import FORKS, reading
from mmfusion.batch import ProductBatch, QueryBatch, TupleBatch

EVALUATION = -1  # the epoch of evaluation draws: fixed, and no training epoch


class _Shares:
    """The requests of an epoch from a step on: each batch of the rank in `shares` parts, cut in run order.

    `asked` holds the blocks of the batches that are asked for, in order; None where none was free.
    """

    def __init__(self, plan: Plan, slots: Slots, rank: int, ranks: int, shares: int, blocks: PhotoBlocks) -> None:
        self.plan, self.slots, self.rank, self.ranks, self.shares = plan, slots, rank, ranks, shares
        self.epoch = self.step = 0
        self.blocks, self.asked = blocks, deque[int | None]()

    def __iter__(self) -> Iterator[Request]:
        epoch = self.epoch
        self.asked.clear()
        self.blocks.reset()  # the workers have answered all that an earlier iteration asked: nobody writes there
        for step in range(self.step, self.plan.steps):
            positions, start = self.plan.batch(epoch, step, self.rank, self.ranks), 0
            block = self.blocks.take()
            self.asked.append(block)
            for part in np.array_split(positions, self.shares):
                yield Request(self.plan.seed, epoch, *self.slots.at(part), block, start)
                start += len(part)

    def shards_of(self, shard: np.ndarray) -> Callable[[int], list[int]]:
        """Which shards a step of this epoch needs, where product i lies in `shard[i]`. May be asked by a thread."""
        plan, slots, epoch, rank, ranks = copy.copy(self.plan), self.slots, self.epoch, self.rank, self.ranks
        return lambda step: shard[slots.at(plan.batch(epoch, step, rank, ranks))[0]].tolist()


class TupleLoader:
    """A rank's part of every training batch; as long as the plan.

    An iteration begins at `progress()` = (epoch, steps of it already done), asked when its first batch is. With a
    trainer that is the trainer's own count, which it restores by itself: steps done, not batches fetched ahead.
    There is one iteration at a time: another one ends it.
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
        rows = plan.size // ranks
        workers = min(workers, rows)
        shared = reader.look.image and (FORKS or not workers)
        self._of_tuple = 1 + reader.pairs.hard_negatives
        self._blocks = PhotoBlocks(BLOCKS if shared else 0, (rows * self._of_tuple, 3, *reader.look.image_size))
        self._shares = _Shares(plan, slots, rank, ranks, max(workers, 1), self._blocks)
        self._reading = partial(reading, IntoBlocks(reader, self._blocks), self._shares, workers, persistent=True)
        self._open: DataLoader[Any] | None = None
        self._tars, self._shard = reader.shards.tars, reader.shards.index.shard
        self.failures = self._counting()

    def __len__(self) -> int:
        return self.plan.steps

    def _counting(self) -> Failures:
        since = f" from step {self._shares.step}" if self._shares.step else ""
        what, products = f"epoch {self._shares.epoch}{since}", self.plan.steps * self.plan.size * self._of_tuple
        return Failures(what, products, self.max_broken, instead="replaced by other products")

    def __iter__(self) -> Iterator[TupleBatch]:
        self._shares.epoch, self._shares.step = self.progress()
        self.failures = failures = self._counting()  # of this rank, and of the whole epoch's products
        self._open = self._reading() if self._open is None else self._open
        shares = iter(self._open)  # forks the workers, before a thread runs
        needed = self._shares.shards_of(self._shard)
        with looking_ahead(self._tars, needed, self._shares.step, len(self)) as at:
            for step in range(self._shares.step, len(self)):
                at(step)
                read = [result(next(shares)) for _ in range(self._shares.shares)]
                for _, failed in read:
                    failures.add(failed)
                block = self._shares.asked.popleft()
                # Nothing here holds on to what is given out: its block would be free one batch later.
                yield joined([batch for batch, _ in read], None if block is None else self._blocks.give(block))

    def close(self) -> None:
        """Ends the workers, which otherwise wait for the next epoch."""
        self._open = None
        self._blocks.leave()

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
    """Evaluation batches of a rank's products, with fixed draws.

    `max_broken` is a fraction of `products`, those of all ranks; by default those of this one.
    """

    def __init__(
        self,
        reader: Reader,
        share: Share,
        batch_size: int,
        seed: int,
        workers: int,
        *,
        products: int | None = None,
        max_broken: float = 0.01,
    ) -> None:
        self.reader, self.seed, self.workers, self.max_broken = reader, seed, workers, max_broken
        self.products = int(share.valid.sum()) if products is None else products
        self.parts = share.parts(batch_size)
        self.failures = self._counting()

    def __len__(self) -> int:
        return len(self.parts)

    def _counting(self) -> Failures:
        return Failures("corpus", self.products, self.max_broken, instead="taken without text and photo")

    def __iter__(self) -> Iterator[ProductBatch]:
        self.failures = failures = self._counting()
        read = iter(reading(self._read, self.parts, self.workers, persistent=False))
        with looking_ahead(self.reader.shards.tars, self._shards_of, 0, len(self)) as at:
            for number in range(len(self)):
                at(number)
                batch, failed = result(next(read))
                failures.add(failed)
                if number + 1 == len(self):
                    next(read, None)  # its end lets the workers go; Lightning does not ask for it
                yield batch

    def _read(self, part: Share) -> tuple[ProductBatch, list[Failed]]:
        batch, failed = self.reader.products(part.id, draws(self.seed, EVALUATION, part.id))
        if failed and not part.valid.all():  # a row that pads repeats another one, whose failure counts once
            own = set(self.reader.shards.index.product_id[part.id[part.valid]].tolist())
            failed = [one for one in dict.fromkeys(failed) if one.product_id in own]
        return replace(batch, valid=torch.from_numpy(part.valid)), failed

    def _shards_of(self, number: int) -> list[int]:
        return self.reader.shards.index.shard[self.parts[number].id].tolist()
