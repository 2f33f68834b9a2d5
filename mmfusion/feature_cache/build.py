"""Fills feature folders: each product and query once, in the memo's own batches, the parts dealt out to ranks.

So what is stored is what a memo would keep, bit for bit, and what one rank writes is what another one would.
"""

import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from mmfusion.batch import ProductBatch, RetrievalData
from mmfusion.encoders import Encoded, ImageEncoder, TextEncoder
from mmfusion.feature_cache.store import FeatureFolder
from mmfusion.features import part_of
from mmfusion.memo import FeatureMemo, encode_photos, encode_texts, joined
from mmfusion.retrieval.ranking import gathered, process

Table = Literal["products", "queries"]
Advance = Callable[[int], object]
Counting = Callable[[str, int, str], AbstractContextManager[Advance]]
Outputs = list[tuple[FeatureFolder, Encoded]]
Result = TypeVar("Result")
QUERIES_AT_ONCE = 1024


@dataclass(frozen=True)
class Job:
    """An encoder, in eval mode, whose outputs over a table are to lie in `folder`; `memo` is what it goes through."""

    encoder: TextEncoder | ImageEncoder
    table: Table
    folder: FeatureFolder
    memo: FeatureMemo

    def of_texts(self, texts: list[str]) -> Encoded:
        assert isinstance(self.encoder, TextEncoder)
        return _on_cpu(encode_texts(self.memo, self.encoder, texts))

    def of_products(self, batch: ProductBatch) -> Encoded:
        if isinstance(self.encoder, TextEncoder):
            return self.of_texts(batch.text)
        return _on_cpu(encode_photos(self.memo, self.encoder, batch.photo, batch.draw))


Parts = Mapping[range, Sequence[Job]]  # the rows of a part, and which jobs lack it


class UnreadableError(ValueError):
    """More products failed than the data's options allow."""


def build(jobs: Sequence[Job], data: RetrievalData, device: torch.device, counting: Counting) -> None:
    """Writes what is missing of the jobs' folders and finishes them; what an interrupted build left is gone on with.

    counting: of what is done, how much there is and its unit, a context that gives a function to advance by.
    All ranks call this at once; where one fails, all raise. Raises UnreadableError where too many products cannot be
    read; nothing is left of their outputs then, or the next build would not hear of it.
    """
    rank, ranks = crew(jobs[0].folder.folder.parent)
    for table in ("queries", "products"):
        some = [job for job in jobs if job.table == table]
        missing = _missing(some)
        own = {rows: missing[rows] for rows in list(missing)[rank::ranks]}
        with counting(f"feature cache: {table}", sum(map(len, own)), table.rstrip("s")) as advance:
            parts = _products(own, data, device, advance) if table == "products" else _queries(own, data, advance)
            try:
                for _ in range(max(gathered(len(own))) + 1):  # one more: its end says how much could not be read
                    together(partial(_write_next, parts))
            except UnreadableError:
                for job in some:
                    shutil.rmtree(job.folder.folder, ignore_errors=True)
                raise
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


def _missing(jobs: Sequence[Job]) -> dict[range, list[Job]]:
    """In the order of rows, the same on every rank: nobody writes before all have looked."""
    every = gathered([[(rows.start, rows.stop) for rows in job.folder.missing()] for job in jobs])
    lacking: dict[tuple[int, int], list[Job]] = {}
    for place, job in enumerate(jobs):
        for part in {part for of_rank in every for part in of_rank[place]}:
            lacking.setdefault(part, []).append(job)
    return {range(*part): lacking[part] for part in sorted(lacking)}


def _write_next(parts: Iterator[tuple[range, Outputs, Bool[Tensor, "row 3"] | None]]) -> None:
    for rows, outputs, flags in parts:
        for folder, encoded in outputs:
            folder.write(rows, encoded, flags)
        return


def _lacking(rows: range, jobs: Sequence[Job]) -> list[Job]:
    """Those whose part no other process has written by now."""
    return [job for job in jobs if not job.folder.has(rows)]


def _queries(parts: Parts, data: RetrievalData, advance: Advance) -> Iterator[tuple[range, Outputs, None]]:
    for rows, jobs in parts.items():
        lacking, found = _lacking(rows, jobs), list[list[Encoded]]()
        for start in range(rows.start, rows.stop, QUERIES_AT_ONCE):
            texts = data.query_texts(np.arange(start, min(start + QUERIES_AT_ONCE, rows.stop)))
            found.append([job.of_texts(texts) for job in lacking])
            advance(len(texts))
        yield rows, _outputs(lacking, found), None


def _products(
    parts: Parts, data: RetrievalData, device: torch.device, advance: Advance
) -> Iterator[tuple[range, Outputs, Bool[Tensor, "row 3"]]]:
    for rows, pieces in groupby(_pieces(parts, data), itemgetter(0)):
        lacking, found, flags = _lacking(rows, parts[rows]), list[list[Encoded]](), list[Tensor]()
        for _, piece in pieces:
            found.append([job.of_products(piece.to(device)) for job in lacking])
            flags.append(torch.cat([piece.present, piece.valid[:, None]], 1))
            advance(len(piece.id))
        yield rows, _outputs(lacking, found), torch.cat(flags)


def _pieces(parts: Parts, data: RetrievalData) -> Iterator[tuple[range, ProductBatch]]:
    """Batches cut where a part ends, in order."""
    left, done = list(parts), 0
    if not left:
        return
    try:
        for batch in data.product_batches(np.concatenate([np.arange(rows.start, rows.stop) for rows in left])):
            start = 0
            while start < len(batch.id):
                take = min(len(left[0]) - done, len(batch.id) - start)
                yield left[0], part_of(batch, slice(start, start + take))
                start, done = start + take, done + take
                if done == len(left[0]):
                    left, done = left[1:], 0
    except ValueError as error:
        raise UnreadableError(str(error)) from error


def _outputs(jobs: Sequence[Job], found: Sequence[Sequence[Encoded]]) -> Outputs:
    return [(job.folder, joined([some[place] for some in found])) for place, job in enumerate(jobs)]


def _on_cpu(encoded: Encoded) -> Encoded:
    return Encoded(*(getattr(encoded, part.name).cpu() for part in fields(Encoded)))
