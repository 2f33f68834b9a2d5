"""Samples of shards -> the batches of mmfusion.batch. Reads what it is asked for; the order is plan.py's."""

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from datamodules.photos import PhotoError, decode_photo
from datamodules.plan import chosen, points
from datamodules.shards import Sample, Shards
from mmfusion.batch import Judged, ProductBatch, QueryBatch, TupleBatch

B = TypeVar("B", QueryBatch, ProductBatch, Judged)


class Broken(NamedTuple):
    """A photo that could not be decoded, to be counted."""

    reason: str
    shard: str
    product_id: str


@dataclass(frozen=True)
class Request:
    """What to read for a share of a step: products, which of their slots (`number` of `slots`), and their draws."""

    product: Int64[np.ndarray, "tuple"]
    number: Int64[np.ndarray, "tuple"]
    slots: Int64[np.ndarray, "tuple"]
    draw: Int64[np.ndarray, "tuple"]


@dataclass(frozen=True)
class Look:
    """What a batch shows of a product: text fields, photo size (height, width), and whether text and photo at all."""

    text_fields: tuple[str, ...]
    image_size: tuple[int, int]
    text: bool = True
    image: bool = True


class PhotoCache:
    """Decoded photos of the lowest dense ids, as many as fit into `mib`.

    The memory is shared with forked workers: what one has decoded, all have. Unpickled elsewhere it starts empty.
    """

    def __init__(self, products: int, size: tuple[int, int], mib: int) -> None:
        self._arguments = (products, size, mib)
        bytes_each = 3 * size[0] * size[1]
        self.rows = min(products, mib * 2**20 // bytes_each)
        pixels = np.frombuffer(mmap.mmap(-1, max(self.rows * bytes_each, 1)), np.uint8)  # takes memory when written
        self._pixels = pixels[: self.rows * bytes_each].reshape(self.rows, 3, *size)
        self._filled = np.frombuffer(mmap.mmap(-1, max(self.rows, 1)), np.uint8)

    def __reduce__(self) -> tuple[type["PhotoCache"], tuple[int, tuple[int, int], int]]:
        return PhotoCache, self._arguments

    def get(self, id: int) -> UInt8[np.ndarray, "3 height width"] | None:
        return self._pixels[id] if id < self.rows and self._filled[id] else None

    def put(self, id: int, pixels: UInt8[np.ndarray, "3 height width"]) -> None:
        if id < self.rows:
            self._pixels[id] = pixels
            self._filled[id] = 1  # after the pixels: two workers may write the same photo, none reads half of it


class Reader:
    """Makes batches of products, of queries and of tuples; safe to fork and to pickle."""

    def __init__(self, shards: Shards, look: Look, damping: float, cache_mib: int) -> None:
        self.shards, self.look = shards, look
        self.cache = PhotoCache(len(shards) if look.image else 0, look.image_size, cache_mib)
        # A query with many positives would otherwise be drawn in proportion to them.
        self._rarity = np.maximum(shards.queries.positives, 1).astype(np.float64) ** -damping

    def queries(self, ids: Int64[np.ndarray, "query"]) -> QueryBatch:
        texts = [str(text) for text in self.shards.queries.query[ids]]
        return QueryBatch(texts, torch.from_numpy(ids), torch.ones(len(ids), dtype=torch.bool))

    def products(
        self, ids: Int64[np.ndarray, "product"], draw: Int64[np.ndarray, "product"]
    ) -> tuple[ProductBatch, list[Broken]]:
        return self._products(ids, draw, [self.shards.read(int(id)) for id in ids])

    def tuples(self, request: Request) -> tuple[TupleBatch, list[Broken]]:
        """One tuple for each slot: the product with one query of its train positives."""
        samples = [self.shards.read(int(id)) for id in request.product]
        where = points(request.draw, request.number, request.slots).tolist()
        query = np.array([self._query(*row) for row in zip(samples, where, strict=True)], dtype=np.int64)
        products, broken = self._products(request.product, request.draw, samples)
        return TupleBatch(self.queries(query), products, self._judged(samples)), broken

    def text(self, texts: Mapping[str, str]) -> str:
        """Of a product's fields the chosen ones that say something, joined by a space."""
        return " ".join(texts[name] for name in self.look.text_fields if texts.get(name))

    def _products(
        self, ids: Int64[np.ndarray, "product"], draw: Int64[np.ndarray, "product"], samples: Sequence[Sample]
    ) -> tuple[ProductBatch, list[Broken]]:
        texts = [self.text(sample.texts) if self.look.text else "" for sample in samples]
        photo = np.zeros((len(ids), 3, *self.look.image_size), np.uint8)
        present = np.zeros((len(ids), 2), np.bool_)
        present[:, 0] = [text != "" for text in texts]
        broken: list[Broken] = []
        for row, sample in enumerate(samples):
            if sample.photo is not None and self.look.image:
                present[row, 1] = self._photo_into(photo[row], sample, broken)
        batch = ProductBatch(
            text=texts,
            photo=torch.from_numpy(photo),
            present=torch.from_numpy(present),
            id=torch.from_numpy(ids),
            draw=torch.from_numpy(draw),
            valid=torch.ones(len(ids), dtype=torch.bool),
        )
        return batch, broken

    def _photo_into(self, row: UInt8[np.ndarray, "3 height width"], sample: Sample, broken: list[Broken]) -> bool:
        """Fills the row; a photo that cannot be decoded is noted, and absent."""
        pixels = self.cache.get(sample.id)
        if pixels is None:
            try:
                pixels = decode_photo(sample.photo or b"", self.look.image_size, sample.product_id).numpy()
            except PhotoError as error:
                shard = self.shards.manifest.shards[int(self.shards.index.shard[sample.id])].name
                broken.append(Broken(error.reason, shard, sample.product_id))
                return False
            self.cache.put(sample.id, pixels)
        row[:] = pixels
        return True

    def _query(self, sample: Sample, point: float) -> int:
        """One of the product's train positives: weight gain x frequency of the query ^ -damping (see plan.chosen)."""
        primary = self.shards.manifest.primary
        gain = sample.judgments[primary]
        positive = np.flatnonzero(gain >= self.shards.manifest.labels[primary].positive_from)
        if not len(positive):
            raise ValueError(
                f"product {sample.product_id!r} has no train positive, though index.parquet counts "
                f"{self.shards.index.pairs[sample.id]}: the shards are damaged, import again"
            )
        query = sample.judgments["query"][positive]
        return int(query[chosen(gain[positive] * self._rarity[query], point)])

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


def joined(parts: Sequence[TupleBatch]) -> TupleBatch:
    """One batch of the parts' tuples, in their order."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(part) for part in parts)])
    judged = {
        column: _concatenated(
            [
                replace(part.judged[column], product=part.judged[column].product + int(start))
                for part, start in zip(parts, starts, strict=False)
            ]
        )
        for column in parts[0].judged
    }
    queries = _concatenated([part.query for part in parts])
    return TupleBatch(queries, _concatenated([part.product for part in parts]), judged)


def _concatenated(parts: Sequence[B]) -> B:
    columns: dict[str, Any] = {f.name: _cat([getattr(part, f.name) for part in parts]) for f in fields(parts[0])}
    return type(parts[0])(**columns)


def _cat(values: list[Any]) -> Tensor | list[str]:
    return torch.cat(values) if isinstance(values[0], Tensor) else [text for value in values for text in value]
