"""Fills feature folders: each product and query once, in the memo's own batches, by all ranks and runs that need it.

So what is stored is what a memo would keep, bit for bit, and what one rank writes is what another one would.
"""

import itertools
import secrets
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int64
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from mmfusion.batch import ProductBatch, RetrievalData
from mmfusion.encoders import Encoded
from mmfusion.feature_cache.todo import Advance, Claimed, Encode, Job, Limit, Outputs, Table, Todo
from mmfusion.features import part_of
from mmfusion.guards.pulse import PULSE
from mmfusion.memo import joined
from mmfusion.retrieval.ranking import gathered, process

__all__ = ["Advance", "Counting", "Job", "Table", "build", "crew", "together"]

Counting = Callable[[str, int, str], AbstractContextManager[Advance]]
Ids = Int64[np.ndarray, "product"]
Result = TypeVar("Result")
QUERIES_AT_ONCE = 1024
ROUND = 60.0  # seconds


def build(jobs: Sequence[Job], data: RetrievalData, device: torch.device, counting: Counting) -> None:
    """Writes what is missing of the jobs' folders and finishes them; what an interrupted build left is gone on with.

    Products that could not be read when their part was written are read once more. Ranks and other runs that fill the
    same folders share the work, part by part.

    counting: of what is done, how much there is and its unit, a context that gives a function to advance by.
    All ranks call this at once; where one fails, all raise. Raises ValueError where more than data.max_broken of all
    products cannot be read.
    """
    for table in ("queries", "products"):
        some = [job for job in jobs if job.table == table]
        if not some:
            continue
        if table == "products":
            _read_again(some, data, device)
        todo = together(partial(Todo, some, Limit(data)))
        with counting(f"feature cache: {table}", sum(map(len, todo.left)), table.rstrip("s")) as advance:
            _in_rounds(todo.written(_products(data, device) if table == "products" else _queries(data), advance))
    together(lambda: [job.folder.finish() for job in jobs])


def crew(root: Path) -> tuple[int, int]:
    """This rank's number among those that see the same `root`, which exists, and how many these are."""
    rank, ranks = process()
    if ranks == 1:
        return 0, 1
    name = gathered(secrets.token_hex(8))[0]
    own = root / f".seen-{name}-{rank}"
    own.touch()
    gathered(None)
    seen = [other for other in range(ranks) if (root / f".seen-{name}-{other}").exists()]
    gathered(None)
    own.unlink()
    return seen.index(rank), len(seen)


def together(work: Callable[[], Result]) -> Result:
    """What `work` gives, once it is done on all ranks. Raises what it raises here, or RuntimeError for other ranks.

    All ranks call this at once: none is left to wait for one that has failed.
    """
    error: Exception | None = None
    try:
        result = work()
    except Exception as raised:  # raised again below, when the others know
        error = raised
    told = gathered(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if any(told):
        raise RuntimeError("; ".join(f"rank {rank} failed: {text}" for rank, text in enumerate(told) if text))
    return result


def _in_rounds(parts: Generator[None, None, None]) -> None:
    """Goes through `parts` on all ranks; where one fails, all raise within a minute.

    Ranks meet each minute, not at the end, so that nobody waits longer for another than a process group allows.
    """
    with closing(parts):
        while not all(gathered(together(partial(_round, parts)))):
            pass


def _round(parts: Iterator[None]) -> bool:
    """Whether it came to the end."""
    end = time.monotonic() + ROUND
    for _ in parts:
        PULSE.beat()
        if time.monotonic() >= end:
            return False
    return True


# ---- the encoders ----------------------------------------------------------------------------------------------------


def _queries(data: RetrievalData) -> Encode:
    def encode(claims: Sequence[Claimed]) -> Iterator[tuple[Claimed, int, Outputs | None]]:
        for claim in claims:
            found = list[list[Encoded]]()
            for start in range(claim.rows.start, claim.rows.stop, QUERIES_AT_ONCE):
                texts = data.query_texts(np.arange(start, min(start + QUERIES_AT_ONCE, claim.rows.stop)))
                found.append([job.of_texts(texts) for job in claim.jobs])
                yield claim, len(texts), None
            yield claim, 0, (_joined(found), None)

    return encode


def _products(data: RetrievalData, device: torch.device) -> Encode:
    def encode(claims: Sequence[Claimed]) -> Iterator[tuple[Claimed, int, Outputs | None]]:
        for _, pieces in groupby(_pieces(claims, data), lambda piece: id(piece[0])):
            found, flags = list[list[Encoded]](), list[Tensor]()
            for claim, piece in pieces:
                found.append([job.of_products(piece.to(device)) for job in claim.jobs])
                flags.append(_flags(piece))
                yield claim, len(piece.id), None
            yield claim, 0, (_joined(found), torch.cat(flags))

    return encode


def _pieces(claims: Sequence[Claimed], data: RetrievalData) -> Iterator[tuple[Claimed, ProductBatch]]:
    """Batches cut where a part ends, in order."""
    left, done = list(claims), 0
    for batch in data.product_batches(np.concatenate([np.array(claim.rows) for claim in claims])):
        start = 0
        while start < len(batch.id):
            take = min(len(left[0].rows) - done, len(batch.id) - start)
            yield left[0], part_of(batch, slice(start, start + take))
            start, done = start + take, done + take
            if done == len(left[0].rows):
                left, done = left[1:], 0


def _flags(batch: ProductBatch) -> Bool[Tensor, "product 3"]:
    return torch.cat([batch.present, batch.valid[:, None]], 1)


def _joined(found: Sequence[Sequence[Encoded]]) -> list[Encoded]:
    """By job, what it gave for one piece after the other."""
    return [joined(pieces) for pieces in zip(*found, strict=True)]


# ---- products that could not be read ---------------------------------------------------------------------------------


def _read_again(jobs: Sequence[Job], data: RetrievalData, device: torch.device) -> None:
    """Those of parts that are there: the shard may be back, the network be up. What is read now is encoded.

    Nothing is encoded where nothing has changed, as of a sample that is broken for good.
    """
    every = together(lambda: _unread(jobs))
    if not any(gathered(len(every))):
        return
    rank, ranks = crew(jobs[0].folder.folder.parent)
    own = {rows: every[rows] for rows in list(every)[rank::ranks]}
    folders = " and ".join(str(job.folder.folder) for job in jobs)
    count = sum(map(len, every.values()))
    rank_zero_info(f"feature cache: {count:,} products could not be read when {folders} was made: reads them again")
    read: list[int] = []
    _in_rounds(_put_right(own, jobs, data, device, read))
    now = len(set(itertools.chain(*gathered(read))))
    rank_zero_info(f"feature cache: {now:,} of {count:,} products could be read this time, and are in {folders} now")


def _unread(jobs: Sequence[Job]) -> dict[range, Ids]:
    """Dense ids of products, by the part where they are marked as not read, in any of the folders."""
    found: dict[range, set[int]] = {}
    for job in jobs:
        for rows in job.folder.there():
            flags = job.folder.flags(rows)
            assert flags is not None, "of products"
            found.setdefault(rows, set()).update((rows.start + (~flags[:, 2]).nonzero()[:, 0]).tolist())
    return {rows: np.array(sorted(found[rows])) for rows in sorted(found, key=attrgetter("start")) if found[rows]}


def _put_right(
    unread: Mapping[range, Ids], jobs: Sequence[Job], data: RetrievalData, device: torch.device, read: list[int]
) -> Generator[None, None, None]:
    """Adds to `read` what can be read."""
    if not unread:
        return
    readable = list[int]()
    for batch in data.product_batches(np.concatenate(list(unread.values()))):
        readable += batch.id[batch.valid].tolist()
        yield
    for rows, ids in unread.items():
        now = ids[np.isin(ids, readable)]
        batches = list(data.product_batches(now)) if len(now) else []
        if batches and all(bool(batch.valid.all()) for batch in batches):
            places, flags = torch.from_numpy(now - rows.start), torch.cat([_flags(batch) for batch in batches])
            for job in jobs:
                if job.folder.has(rows):
                    encoded = joined([job.of_products(batch.to(device)) for batch in batches])
                    job.folder.replace(rows, places, encoded, flags)
            read += now.tolist()
        yield
