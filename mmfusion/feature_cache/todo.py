"""What is still to be encoded, dealt out by locks to all that fill the same folders: ranks, and other runs."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from mmfusion.batch import ProductBatch, RetrievalData
from mmfusion.encoders import Encoded, ImageEncoder, TextEncoder
from mmfusion.feature_cache.store import PART, FeatureFolder
from mmfusion.memo import FeatureMemo, encode_photos, encode_texts

Table = Literal["products", "queries"]
Advance = Callable[[int], object]
PAUSE = 0.2  # seconds until it is asked again whether another one has written a part
SHARES = 8  # into which what is left is divided: who has taken a share begins to read its products at once
LEAST, MOST = PART // 8, 16 * PART  # rows of a share: what another one can no longer take


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


@dataclass(frozen=True)
class Claimed:
    """The rows of a part, and the jobs that lack it and whose part is nobody else's; all parts if these are all."""

    rows: range
    jobs: Sequence[Job]
    locks: ExitStack
    whole: bool


Outputs = tuple[list[Encoded], Tensor | None]  # by job; flags of products
# Of parts, one after the other: how many rows are done, and at a part's end what is to be written.
Encode = Callable[[Sequence[Claimed]], Iterator[tuple[Claimed, int, Outputs | None]]]


class Limit:
    """Counts products that cannot be read, or not their photo, in all parts of a folder, whoever wrote them."""

    def __init__(self, data: RetrievalData) -> None:
        self.most, self._count = data.max_broken, dict[FeatureFolder, int]()
        self._photo = torch.from_numpy(data.has_photo()) & ("image" in data.shows["modalities"])

    def add(self, job: Job, rows: range) -> None:
        """Raises ValueError where these are more than data.max_broken of the whole table."""
        flags = job.folder.flags(rows)
        if flags is None:
            return
        lost = ~flags[:, 2]
        if isinstance(job.encoder, ImageEncoder):
            lost |= self._photo[rows.start : rows.stop] & ~flags[:, 1]
        count = self._count[job.folder] = self._count.get(job.folder, 0) + int(lost.sum())
        if count > self.most * job.folder.rows:
            raise ValueError(
                f"{job.folder.folder}: {count:,} of {job.folder.rows:,} products cannot be read, or not their photos. "
                f"That is over the limit data.max_broken={self.most}: copy or import these shards again, or raise the "
                "limit to go on without"
            )


class Todo:
    """The parts that jobs over one table lack, in order."""

    def __init__(self, jobs: Sequence[Job], limit: Limit) -> None:
        self._limit, self.left = limit, dict[range, list[Job]]()
        for job in jobs:
            missing = job.folder.missing()
            for rows in missing:
                self.left.setdefault(rows, []).append(job)
            for rows in set(job.folder.parts()) - set(missing):
                limit.add(job, rows)
        self.left = {rows: self.left[rows] for rows in sorted(self.left, key=lambda rows: rows.start)}

    def written(self, encode: Encode, advance: Advance) -> Generator[None, None, None]:
        """Encodes and writes what nobody else is at, until all is there; yields now and then."""
        while self.left:
            with ExitStack() as locks:
                claims = self._claims(locks, advance)
                for claim, rows, outputs in encode(claims) if claims else ():
                    advance(rows * claim.whole)
                    if outputs is not None:
                        self._write(claim, *outputs, advance)
                    yield
            if self.left and not claims:
                time.sleep(PAUSE)
                yield

    def _write(self, claim: Claimed, encoded: list[Encoded], flags: Tensor | None, advance: Advance) -> None:
        for job, own in zip(claim.jobs, encoded, strict=True):
            job.folder.write(claim.rows, own, flags)
            self._done(job, claim.rows)
        claim.locks.close()
        if claim.rows not in self.left and not claim.whole:
            advance(len(claim.rows))

    def _claims(self, locks: ExitStack, advance: Advance) -> list[Claimed]:
        """Some of the parts, for as long as `locks` are open; forgets those that others have written."""
        most = min(max(LEAST, sum(map(len, self.left)) // SHARES), MOST)
        found, count = list[Claimed](), 0
        for rows, jobs in list(self.left.items()):
            if count >= most:
                break
            own = locks.enter_context(ExitStack())
            if mine := [job for job in jobs if self._claim(job, rows, own)]:
                found.append(Claimed(rows, mine, own, whole=mine == jobs))
                count += len(rows)
            elif rows not in self.left:
                advance(len(rows))
        return found

    def _claim(self, job: Job, rows: range, locks: ExitStack) -> bool:
        """Whether it is ours to write: not there, and nobody is at it."""
        if not job.folder.has(rows):
            claim = job.folder.claim(rows)
            if claim is None:
                return False
            locks.callback(claim.release)
            if not job.folder.has(rows):
                return True
        self._done(job, rows)
        return False

    def _done(self, job: Job, rows: range) -> None:
        self.left[rows] = [other for other in self.left[rows] if other is not job]
        if not self.left[rows]:
            del self.left[rows]
        self._limit.add(job, rows)


def _on_cpu(encoded: Encoded) -> Encoded:
    return Encoded(*(getattr(encoded, part.name).cpu() for part in fields(Encoded)))
