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
from datamodules.plan import Plan, Slots, draws, extra
from datamodules.stream.batches import Reader, Request, concatenated, joined
from datamodules.stream.blocks import BLOCKS, IntoBlocks, PhotoBlocks
from datamodules.stream.failures import SAMPLE_REASONS, Failed, Failures
from datamodules.stream.known import KnownReader, LeftOut
from datamodules.stream.lookahead import looking_ahead
from datamodules.stream.workers import FORKS, reading
from mmfusion.batch import ProductBatch, QueryBatch, TupleBatch

EVALUATION = -1  # the epoch of evaluation draws: fixed, and no training epoch


class _Asked(NamedTuple):
    """A batch of the reading that is under way, and the block of its photos; None where none was free."""

    step: int
    block: int | None


class _Shares:
    """The requests of an epoch from a step on: each batch of the rank in `shares` parts, cut in run order.

    They end with the epoch, or before the first step that has no content: below `shown_from()`, which may change.
    `asked` holds the batches that are asked for, in order; `next` is the step that would be asked for next, that of the
    epoch's end where the requests have ended.
    """

    def __init__(self, plan: Plan, slots: Slots, rank: int, ranks: int, shares: int, blocks: PhotoBlocks) -> None:
        self.plan, self.slots, self.rank, self.ranks, self.shares = plan, slots, rank, ranks, shares
        self.epoch, self.step, self.next = 0, 0, plan.steps
        self.shown_from: Callable[[], int] = lambda: 0
        self.blocks, self.asked = blocks, deque[_Asked]()

    def __iter__(self) -> Iterator[Request]:
        self.blocks.reset()  # the workers have answered all that an earlier iteration asked: nobody writes there
        for step in range(self.step, self.plan.steps):
            if step < self.shown_from():
                break
            whole, start = self.whole(step), 0
            block = self.blocks.take()
            self.next = step + 1
            self.asked.append(_Asked(step, block))
            for rows in np.array_split(np.arange(len(whole.product)), self.shares):
                yield whole.part(rows, block, start)
                start += len(rows)
        self.next = self.plan.steps

    def begin(self, step: int) -> None:
        """The next iteration is from this step on."""
        self.asked.clear()
        self.step = self.next = step

    def whole(self, step: int) -> Request:
        """All of the rank's batch."""
        return Request(self.plan.seed, self.epoch, *self.slots.at(self._positions(step)))

    def _positions(self, step: int) -> Int64[np.ndarray, "position"]:
        return self.plan.batch(self.epoch, step, self.rank, self.ranks)

    def shards_of(self, shard: np.ndarray) -> Callable[[int], list[int]]:
        """Which shards a step of this epoch needs, where product i lies in `shard[i]`. May be asked by a thread."""
        plan, slots, epoch, rank, ranks = copy.copy(self.plan), self.slots, self.epoch, self.rank, self.ranks
        shown_from = self.shown_from

        def needed(step: int) -> list[int]:
            shown = step >= shown_from()
            return shard[slots.at(plan.batch(epoch, step, rank, ranks))[0]].tolist() if shown else []

        return needed


class TupleLoader:
    """A rank's part of every training batch; as long as the plan.

    An iteration begins at `progress()` = (epoch, steps of it already done), asked when its first batch is. With a
    trainer that is the trainer's own count, which it restores by itself: steps done, not batches fetched ahead.
    There is one iteration at a time: another one ends it.
    Batches that `left_out` names are made here, at their turn, without content; meanwhile workers read the first ones
    that have it. `optimizer()` = (optimizer step with which the epoch began, batches per optimizer step) is asked
    together with the progress.
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
        left_out: LeftOut | None = None,
        optimizer: Callable[[], tuple[int, int]] = lambda: (0, 1),
    ) -> None:
        self.plan, self.progress, self.max_broken = plan, progress, max_broken
        self.left_out, self.optimizer = left_out or LeftOut(), optimizer
        rows = plan.size // ranks
        workers = min(workers, rows)
        shared = reader.look.image and (FORKS or not workers)
        self._of_tuple = 1 + reader.pairs.hard_negatives
        self._blocks = PhotoBlocks(BLOCKS if shared else 0, (rows * self._of_tuple, 3, *reader.look.image_size))
        self._shares = _Shares(plan, slots, rank, ranks, max(workers, 1), self._blocks)
        self._reader = reader
        self._reading = partial(reading, IntoBlocks(reader, self._blocks), self._shares, workers, persistent=True)
        self._open: DataLoader[Any] | None = None
        self._answers: Iterator[Any] = iter(())
        self.failures = self._counting(0, 0)

    def __len__(self) -> int:
        return self.plan.steps

    def _counting(self, epoch: int, step: int) -> Failures:
        what, products = f"epoch {epoch}", self.plan.steps * self.plan.size * self._of_tuple
        since = f" from step {step}" if step else ""
        return Failures(what + since, products, self.max_broken, instead="replaced by other products")

    def __iter__(self) -> Iterator[TupleBatch]:
        shares, data, (epoch, first) = self._shares, self._reader.shards, self.progress()
        self.failures = self._counting(epoch, first)  # of this rank, and of the whole epoch's products
        begun, each = self.optimizer()
        shares.epoch = epoch
        # Not a function that holds this loader: in a cycle its workers would be collected by force, 5 s each.
        shares.shown_from = partial(self.left_out.shown_from, begun, each)
        shares.begin(len(self))
        self._ask(first)  # forks the workers, before a thread runs
        with looking_ahead(data.tars, shares.shards_of(data.index.shard), first, len(self)) as at:
            for step in range(first, len(self)):
                at(step)
                self._ask(step)
                # Nothing here holds on to what is given out: its block would be free one batch later.
                read = self._is_read(step)
                yield self._with_extra_queries(self._read() if read else self._known(step), step)

    def _is_read(self, step: int) -> bool:
        asked = self._shares.asked
        return step >= self._shares.shown_from() or bool(asked and asked[0].step == step)

    def _ask(self, step: int) -> None:
        """At `step`, begins to read where that is not under way, from the first step on that is to have content.

        What was asked for is kept, also where its content is not needed any more, unless an earlier step needs some.
        """
        shares, ahead = self._shares, max(step, self._shares.shown_from())
        position = shares.asked[0].step if shares.asked else shares.next
        if ahead < len(self) and (position > ahead or (position < ahead and not shares.asked)):
            shares.begin(ahead)
            self._open = self._reading() if self._open is None else self._open
            self._answers = iter(self._open)

    def _read(self) -> TupleBatch:
        read = [result(next(self._answers)) for _ in range(self._shares.shares)]
        for _, failed in read:
            self.failures.add(failed)
        block = self._shares.asked.popleft().block
        return joined([batch for batch, _ in read], None if block is None else self._blocks.give(block))

    def _known(self, step: int) -> TupleBatch:
        assert self.left_out.known is not None, "else every step has content"
        batch, failed = self.left_out.known.tuples(self._shares.whole(step))
        self.failures.add(failed)
        return batch

    def _with_extra_queries(self, batch: TupleBatch, step: int) -> TupleBatch:
        """The rank's part of the step's extra queries, behind those of the tuples."""
        count = self._reader.pairs.extra_queries
        if not count:
            return batch
        drawn = extra(self.plan.seed, self._shares.epoch, step, count, len(self._reader.train_queries))
        own = count // self._shares.ranks
        ids = self._reader.train_queries[drawn[self._shares.rank * own :][:own]]
        return replace(batch, query=concatenated([batch.query, self._reader.queries(ids)]))

    def close(self) -> None:
        """Ends the workers, which otherwise wait for the next epoch."""
        self._open, self._answers = None, iter(())
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
    """Evaluation batches of a rank's products, with fixed draws; without content where `left_out` says so.

    `max_broken` is a fraction of `products`, those of all ranks; by default those of this one. `what` they are is for
    messages. `mark_unread`: `valid` is False too where a sample cannot be read.
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
        left_out: LeftOut | None = None,
        what: str = "corpus",
        mark_unread: bool = False,
    ) -> None:
        self.reader, self.seed, self.workers, self.max_broken = reader, seed, workers, max_broken
        self.left_out, self.what, self.mark_unread = left_out or LeftOut(), what, mark_unread
        self.products = int(share.valid.sum()) if products is None else products
        self.parts = share.parts(batch_size)
        self.failures = self._counting()

    def __len__(self) -> int:
        return len(self.parts)

    def _counting(self) -> Failures:
        return Failures(self.what, self.products, self.max_broken, instead="taken without text and photo")

    def __iter__(self) -> Iterator[ProductBatch]:
        self.failures = self._counting()
        known, failures = self.left_out.evaluation, self.failures  # asked with the first batch
        yield from self._read_all(failures) if known is None else self._known(known, failures)

    def _known(self, known: KnownReader, failures: Failures) -> Iterator[ProductBatch]:
        for part in self.parts:
            batch, failed = self._made(known, part)
            failures.add(failed)
            yield batch

    def _read_all(self, failures: Failures) -> Iterator[ProductBatch]:
        if not self.parts:  # workers would wait for what ends them
            return
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
        return self._made(self.reader, part)

    def _made(self, reader: Reader | KnownReader, part: Share) -> tuple[ProductBatch, list[Failed]]:
        batch, failed = reader.products(part.id, draws(self.seed, EVALUATION, part.id))
        if failed and not part.valid.all():  # a row that pads repeats another one, whose failure counts once
            own = set(self.reader.shards.index.product_id[part.id[part.valid]].tolist())
            failed = [one for one in dict.fromkeys(failed) if one.product_id in own]
        valid = torch.from_numpy(part.valid)
        if self.mark_unread and failed:
            lost = {one.product_id for one in failed if one.reason in SAMPLE_REASONS}
            read = [product_id not in lost for product_id in self.reader.shards.index.product_id[part.id].tolist()]
            valid = valid & torch.tensor(read)
        return replace(batch, valid=valid), failed

    def _shards_of(self, number: int) -> list[int]:
        return self.reader.shards.index.shard[self.parts[number].id].tolist()
