"""Samples of shards -> the batches of mmfusion.batch. Reads what it is asked for; the order is plan.py's."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from datamodules.negatives import RANDOM, Candidates
from datamodules.photos.decode import PhotoError, decode_photo
from datamodules.plan import chosen, draws, points
from datamodules.shards import Sample, ShardError, Shards
from datamodules.stream.failures import Failed
from datamodules.stream.judgments import TrainJudgments
from datamodules.stream.listed import ListedByProduct
from datamodules.stream.pairs import PairOptions
from datamodules.stream.photo_cache import PhotoCache
from datamodules.stream.substitutes import no_substitute, substitutes
from mmfusion.batch import Judged, ProductBatch, QueryBatch, TupleBatch

GROUP = 32  # samples that are read before their photos are decoded: each kind of work finds the caches as it left them
NO_PAIRS = PairOptions()
Photos = tuple[UInt8[np.ndarray, "tuple 3 height width"], UInt8[np.ndarray, "hard 3 height width"]]
B = TypeVar("B", QueryBatch, ProductBatch, Judged)


@dataclass(frozen=True)
class Request:
    """What to read for a share of a step of an epoch: products, and which of their slots (`number` of `slots`).

    `block` is that of the batch's photos, if there is one (see blocks.py), and `start` the share's first row in it.
    """

    seed: int
    epoch: int
    product: Int64[np.ndarray, "tuple"]
    number: Int64[np.ndarray, "tuple"]
    slots: Int64[np.ndarray, "tuple"]
    block: int | None = None
    start: int = 0

    @property
    def draw(self) -> Int64[np.ndarray, "tuple"]:
        return draws(self.seed, self.epoch, self.product)

    def part(self, rows: Int64[np.ndarray, "row"], block: int | None, start: int) -> "Request":
        """The share of these rows, that begins at row `start` of the batch's block."""
        return Request(
            self.seed, self.epoch, self.product[rows], self.number[rows], self.slots[rows], block=block, start=start
        )

    def instead(self, product: Int64[np.ndarray, "tuple"]) -> "Request":
        """The request that asks for these products: the slot of a substitute is the only one of one."""
        own = product == self.product
        return replace(self, product=product, number=self.number * own, slots=np.where(own, self.slots, 1))


@dataclass(frozen=True)
class Look:
    """What a batch shows of a product: text fields, photo size (height, width), and whether text and photo at all."""

    text_fields: tuple[str, ...]
    image_size: tuple[int, int]
    text: bool = True
    image: bool = True


class Shown(NamedTuple):
    """A sample without its photo's bytes; `photo`: whether its row shows one."""

    sample: Sample
    photo: bool


class Reader:
    """Makes batches of products, of queries and of tuples; safe to fork and to pickle.

    Beside a batch it returns what failed. A photo that cannot be decoded is absent. A sample that cannot be read is
    replaced in a batch of tuples by another product (see substitutes.py), with the only slot of one and its own draw,
    and as a hard negative by one at random; in a batch of products it stays, with neither text nor photo.
    """

    def __init__(
        self, shards: Shards, look: Look, damping: float, cache_mib: int, pairs: PairOptions = NO_PAIRS
    ) -> None:
        self._arguments = (shards, look, damping, cache_mib, pairs)
        self.shards, self.look, self.damping, self.pairs = shards, look, damping, pairs
        self.cache = PhotoCache(len(shards) if look.image else 0, look.image_size, cache_mib)

    def __reduce__(self) -> tuple[type["Reader"], tuple[Shards, Look, float, int, PairOptions]]:
        return Reader, self._arguments

    def prepare(self) -> None:
        """Reads what tuples need besides samples, so that forked workers share it. Raises ValueError (see pairs.py)."""
        if self.pairs.hard_negatives:
            _ = self.candidates
        _ = self.scored

    # ---- what is drawn from, read when it is first needed ------------------------------------------------------------

    @cached_property
    def rarity(self) -> np.ndarray:
        """Weight of each query: one with many positives would otherwise be drawn in proportion to them."""
        return np.maximum(self.shards.queries.positives, 1).astype(np.float64) ** -self.damping

    @cached_property
    def trainable(self) -> np.ndarray:
        return np.flatnonzero(self.shards.index.trainable)

    @cached_property
    def train_queries(self) -> Int64[np.ndarray, "query"]:
        return self.shards.queries.of("train").astype(np.int64)

    @cached_property
    def candidates(self) -> Candidates:
        return self.pairs.candidates(self.shards)

    @cached_property
    def scored(self) -> dict[str, ListedByProduct]:
        return self.pairs.scored(self.shards)

    @cached_property
    def judgments(self) -> TrainJudgments:
        """What the samples say of queries, for those who do not read them."""
        return TrainJudgments.of(self.shards, self.rarity)

    # ---- batches -----------------------------------------------------------------------------------------------------

    def queries(self, ids: Int64[np.ndarray, "query"]) -> QueryBatch:
        texts = self.shards.queries.query[ids].tolist()
        return QueryBatch(texts, torch.from_numpy(ids), torch.ones(len(ids), dtype=torch.bool))

    def products(
        self, ids: Int64[np.ndarray, "product"], draw: Int64[np.ndarray, "product"]
    ) -> tuple[ProductBatch, list[Failed]]:
        failed: list[Failed] = []
        photo = self._room(len(ids))
        return self._products(ids, draw, self._read(ids, photo, failed), photo), failed

    def tuples(self, request: Request, photos: Photos | None = None) -> tuple[TupleBatch, list[Failed]]:
        """One tuple for each slot, the product with one query of its train positives, and their hard negatives.

        `photos`: memory for the photos of the tuples and for those of their negatives, if the batch is not to hold
        them. Raises ValueError when no substitute of a product can be read.
        """
        if photos is None:
            count = len(request.product)
            whole = self._room(count * (1 + self.pairs.hard_negatives))
            batch, failed = self.tuples(request, (whole[:count], whole[count:]))
            return replace(batch, product=replace(batch.product, photo=torch.from_numpy(whole))), failed
        own, beside = photos
        failed = []
        read = self._read(request.product, own, failed)
        shown = [one or self._substitute(request, row, own[row], failed) for row, one in enumerate(read)]
        samples = [one.sample for one in shown]
        request = request.instead(np.array([sample.id for sample in samples], dtype=np.int64))
        where = points(request.draw, request.number, request.slots).tolist()
        query = np.array([self._query(*row) for row in zip(samples, where, strict=True)], dtype=np.int64)
        product, source, others = self._negatives(request, query, beside, failed)
        product, shown = np.concatenate([request.product, product]), [*shown, *others]
        return TupleBatch(
            query=self.queries(query),
            product=self._products(product, draws(request.seed, request.epoch, product), shown, None),
            judged=self._judged([one.sample for one in shown]),
            scores={name: scored.listed(product) for name, scored in self.scored.items()},
            hard=torch.from_numpy(source),
        ), failed

    def text(self, texts: Mapping[str, str]) -> str:
        """Of a product's fields the chosen ones that say something, joined by a space."""
        return " ".join(texts[name] for name in self.look.text_fields if texts.get(name))

    def _room(self, count: int) -> UInt8[np.ndarray, "product 3 height width"]:
        shape = (count, 3, *self.look.image_size)
        return np.empty(shape, np.uint8) if self.look.image else np.zeros(shape, np.uint8)  # takes no memory unwritten

    def _read(
        self,
        ids: Int64[np.ndarray, "product"],
        photo: UInt8[np.ndarray, "product 3 height width"],
        failed: list[Failed],
    ) -> Sequence[Shown | None]:
        """The products, their photos in `photo`; None, noted and without photo, where one cannot be read."""
        self.shards.tars.fetch(self.shards.index.shard[ids].tolist())
        self.shards.expect(ids, ~self.cache.holds(ids) & self.look.image)  # a disk works while photos are decoded
        read: list[Shown | None] = []
        for start in range(0, len(ids), GROUP):
            part = slice(start, start + GROUP)
            samples = [self._sample_or_none(id, failed) for id in ids[part].tolist()]
            read += [self._shown(sample, pixels, failed) for sample, pixels in zip(samples, photo[part], strict=True)]
        return read

    def _sample_or_none(self, id: int, failed: list[Failed]) -> Sample | None:
        try:
            return self._sample(id)
        except ShardError as error:
            failed.append(self.shards.failed(id, error.reason))
            return None

    def _sample(self, id: int) -> Sample:
        """Photos that are not shown, or are decoded already, are passed over."""
        return self.shards.read(id, photo=self.look.image and self.cache.get(id) is None)

    def _shown(
        self, sample: Sample | None, pixels: UInt8[np.ndarray, "3 height width"], failed: list[Failed]
    ) -> Shown | None:
        """Fills `pixels`."""
        cached = self.cache.get(sample.id) if sample and self.look.image else None
        if cached is not None:
            pixels[:] = cached
        present = cached is not None or (
            sample is not None and sample.photo is not None and self._decoded(sample, pixels, failed)
        )
        if self.look.image and not present:
            pixels[:] = 0
        return Shown(sample._replace(photo=None), present) if sample else None

    def _decoded(self, sample: Sample, pixels: UInt8[np.ndarray, "3 height width"], failed: list[Failed]) -> bool:
        """False, and noted, where the photo cannot be."""
        try:
            decode_photo(sample.photo or b"", self.look.image_size, sample.product_id, torch.from_numpy(pixels))
        except PhotoError as error:
            failed.append(self.shards.failed(sample.id, error.reason))
            return False
        self.cache.put(sample.id, pixels)
        return True

    def _negatives(
        self,
        request: Request,
        query: Int64[np.ndarray, "tuple"],
        photo: UInt8[np.ndarray, "hard 3 height width"],
        failed: list[Failed],
    ) -> tuple[Int64[np.ndarray, "hard"], Int64[np.ndarray, "hard"], list[Shown]]:
        """Dense ids and sources of the tuples' hard negatives, and what is shown of them."""
        k = self.pairs.hard_negatives
        if not k:
            return np.zeros(0, np.int64), np.zeros(0, np.int64), []
        found, source = self.candidates.draw(request.seed, request.epoch, query, request.product, k)
        shown = []
        for row, one in enumerate(self._read(found.reshape(-1), photo, failed)):
            i, j = divmod(row, k)
            shown.append(one or self._instead(request, int(query[i]), i, j, found[i], photo[row], failed))
            if one is None:
                found[i, j], source[i, j] = shown[row].sample.id, RANDOM
        return found.reshape(-1), source.reshape(-1), shown

    def _instead(
        self,
        request: Request,
        query: int,
        row: int,
        j: int,
        taken: Int64[np.ndarray, "k"],
        pixels: UInt8[np.ndarray, "3 height width"],
        failed: list[Failed],
    ) -> Shown:
        """Of the tuple in `row`, whose negatives are `taken`, another one for the j-th."""
        place = (request.seed, request.epoch, query, int(request.product[row]), j)
        return self._first(self.candidates.instead(*place, taken.tolist()), int(taken[j]), pixels, failed)

    def _substitute(
        self, request: Request, row: int, pixels: UInt8[np.ndarray, "3 height width"], failed: list[Failed]
    ) -> Shown:
        product, number = int(request.product[row]), int(request.number[row])
        others = substitutes(self.trainable, request.seed, request.epoch, product, number)
        return self._first(others, product, pixels, failed)

    def _first(
        self, ids: Iterator[int], product: int, pixels: UInt8[np.ndarray, "3 height width"], failed: list[Failed]
    ) -> Shown:
        """The first that can be read, in place of `product`.

        One that cannot is not noted here, but in its own turn; one shown without its photo is.
        """
        last = None
        for id in ids:
            try:
                shown = self._shown(self._sample(id), pixels, failed)
            except ShardError as error:
                last = error
            else:
                assert shown is not None, "of a sample that was read"
                return shown
        raise no_substitute(product, last)

    def _products(
        self,
        ids: Int64[np.ndarray, "product"],
        draw: Int64[np.ndarray, "product"],
        shown: Sequence[Shown | None],
        photo: UInt8[np.ndarray, "product 3 height width"] | None,
    ) -> ProductBatch:
        """Without `photo`, of one byte: it is shown elsewhere."""
        texts = [self.text(one.sample.texts) if one and self.look.text else "" for one in shown]
        present = [[text != "", one is not None and one.photo] for text, one in zip(texts, shown, strict=True)]
        shape = (len(ids), 3, *self.look.image_size)
        return ProductBatch(
            text=texts,
            photo=torch.zeros(1, dtype=torch.uint8).expand(shape) if photo is None else torch.from_numpy(photo),
            present=torch.tensor(present, dtype=torch.bool).reshape(-1, 2),
            id=torch.from_numpy(ids),
            draw=torch.from_numpy(draw),
            valid=torch.ones(len(ids), dtype=torch.bool),
        )

    def _query(self, sample: Sample, point: float) -> int:
        """One of the product's train positives: weight gain x frequency of the query ^ -damping (see plan.chosen)."""
        manifest = self.shards.manifest
        gain = sample.judgments[manifest.primary]
        positive = gain >= manifest.positive_from
        query = sample.judgments["query"][positive]
        return int(query[chosen(gain[positive] * self.rarity[query], point)])

    def _judged(self, samples: Sequence[Sample]) -> dict[str, Judged]:
        row = np.repeat(np.arange(len(samples)), [len(sample.judgments["query"]) for sample in samples])
        query = np.concatenate([sample.judgments["query"] for sample in samples])
        judged = {}
        for column, label in self.shards.manifest.labels.items():
            gain = np.concatenate([sample.judgments[column] for sample in samples])
            listed = gain > 0  # not where NaN: not judged in this column
            judged[column] = Judged(
                product=torch.from_numpy(row[listed]),
                query_id=torch.from_numpy(query[listed]),
                gain=torch.from_numpy(gain[listed].astype(np.float32)),
                positive=torch.from_numpy(gain[listed] >= label.positive_from),
            )
        return judged


def joined(parts: Sequence[TupleBatch], photo: UInt8[Tensor, "product 3 height width"] | None = None) -> TupleBatch:
    """One batch of the parts' tuples, in their order, and then of their hard negatives; with `photo` instead of their
    own, where that is given."""
    if len(parts) == 1:
        product = parts[0].product if photo is None else replace(parts[0].product, photo=photo)
        return replace(parts[0], product=product)
    blocks = [(part.product, slice(len(part))) for part in parts]
    blocks += [(part.product, slice(len(part), None)) for part in parts if len(part.hard)]
    return TupleBatch(
        query=concatenated([part.query for part in parts]),
        product=concatenated([_rows(*block) for block in blocks], **({} if photo is None else {"photo": photo})),
        judged={column: _joined_lists(parts, [part.judged[column] for part in parts]) for column in parts[0].judged},
        scores={table: _joined_lists(parts, [part.scores[table] for part in parts]) for table in parts[0].scores},
        hard=torch.cat([part.hard for part in parts]),
    )


def _rows(batch: ProductBatch, rows: slice) -> ProductBatch:
    """Of a batch with content."""
    return ProductBatch(**{f.name: getattr(batch, f.name)[rows] for f in fields(batch) if f.name != "shown"})


def _joined_lists(parts: Sequence[TupleBatch], lists: Sequence[Judged]) -> Judged:
    """The entries of the parts' tuples, then those of their hard negatives, with the rows that these have together."""
    counts, hard = [len(part) for part in parts], [len(part.hard) for part in parts]
    starts = np.cumsum([0, *counts, *hard]).tolist()
    ends = [int(torch.searchsorted(one.product, count)) for one, count in zip(lists, counts, strict=True)]
    moved = [_entries(one, slice(end), start) for one, end, start in zip(lists, ends, starts, strict=False)]
    if any(hard):
        rest = zip(lists, ends, starts[len(parts) :], counts, strict=False)
        moved += [_entries(one, slice(end, None), start - count) for one, end, start, count in rest]
    return concatenated(moved)


def _entries(judged: Judged, entries: slice, shift: int) -> Judged:
    part = Judged(**{f.name: getattr(judged, f.name)[entries] for f in fields(judged)})
    return replace(part, product=part.product + shift)


def concatenated(parts: Sequence[B], **given: Any) -> B:
    names = [f.name for f in fields(parts[0]) if f.name not in {*given, "shown"}]
    columns: dict[str, Any] = {name: _cat([getattr(part, name) for part in parts]) for name in names}
    return type(parts[0])(**columns, **given)


def _cat(values: list[Any]) -> Tensor | list[str]:
    return torch.cat(values) if isinstance(values[0], Tensor) else [text for value in values for text in value]
