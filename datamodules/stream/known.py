"""Batches without content: all that a step needs but texts and photos, made from tables, without reading a shard."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64

from datamodules.negatives import RANDOM
from datamodules.plan import draws, points
from datamodules.stream.batches import Reader, Request
from datamodules.stream.failures import BLIND, UNREAD, Failed
from datamodules.stream.substitutes import no_substitute, substitutes
from mmfusion.batch import Known, ProductBatch, TupleBatch


class KnownReader:
    """Makes the batches that a Reader makes, equal in all but texts, photos and `shown`.

    What could not be read when `known` was made counts as what cannot be read now, and is returned beside a batch.
    """

    def __init__(self, reader: Reader, known: Known) -> None:
        """Raises ValueError when `known` is not of as many products."""
        found, expected = (len(known.present), len(known.readable)), len(reader.shards)
        if found != (expected, expected):
            raise ValueError(
                f"what is known of products has {found[0]:,} and {found[1]:,} rows, {reader.shards.store.address} has "
                f"{expected:,} products: it was made from other data; make it anew"
            )
        self.reader, self.known = reader, known
        self._readable = known.readable.numpy()
        self._present = known.present & known.readable[:, None]
        shows_photo = self._readable & reader.look.image & reader.shards.index.photo
        self._blind = shows_photo & ~self._present[:, 1].numpy()

    def products(
        self, ids: Int64[np.ndarray, "product"], draw: Int64[np.ndarray, "product"]
    ) -> tuple[ProductBatch, list[Failed]]:
        return self._products(ids, draw), self._lost(ids) + self._without_photo(ids)

    def _lost(self, ids: Int64[np.ndarray, "product"]) -> list[Failed]:
        return [self.reader.shards.failed(id, UNREAD) for id in ids[~self._readable[ids]].tolist()]

    def _without_photo(self, ids: Int64[np.ndarray, "product"]) -> list[Failed]:
        return [self.reader.shards.failed(id, BLIND) for id in ids[self._blind[ids]].tolist()]

    def _products(self, ids: Int64[np.ndarray, "product"], draw: Int64[np.ndarray, "product"]) -> ProductBatch:
        id = torch.from_numpy(ids)
        return ProductBatch(
            text=[""] * len(ids),
            photo=torch.zeros((len(ids), 3, 0, 0), dtype=torch.uint8),
            present=self._present[id],
            id=id,
            draw=torch.from_numpy(draw),
            valid=torch.ones(len(ids), dtype=torch.bool),
            shown=False,
        )

    def tuples(self, request: Request) -> tuple[TupleBatch, list[Failed]]:
        """Raises ValueError when no substitute of a product could be read."""
        failed = self._lost(request.product)
        request = self._with_substitutes(request)
        positives, judged = self.reader.judgments.positives, self.reader.judgments.judged
        query = positives.drawn(request.product, points(request.draw, request.number, request.slots))
        negatives, source = self._negatives(request, query, failed)
        product = np.concatenate([request.product, negatives])
        failed += self._without_photo(product)
        return TupleBatch(
            query=self.reader.queries(query),
            product=self._products(product, draws(request.seed, request.epoch, product)),
            judged={column: gains.listed(product) for column, gains in judged.items()},
            scores={name: scored.listed(product) for name, scored in self.reader.scored.items()},
            hard=torch.from_numpy(source),
        ), failed

    def _with_substitutes(self, request: Request) -> Request:
        product = request.product.copy()
        for row in np.flatnonzero(~self._readable[product]).tolist():
            lost = int(product[row]), int(request.number[row])
            others = substitutes(self.reader.trainable, request.seed, request.epoch, *lost)
            product[row] = self._first(others, lost[0])
        return request.instead(product)

    def _negatives(
        self, request: Request, query: Int64[np.ndarray, "tuple"], failed: list[Failed]
    ) -> tuple[Int64[np.ndarray, "hard"], Int64[np.ndarray, "hard"]]:
        """Dense ids and sources, as Reader has them: what is replaced, one after the other, is not drawn again."""
        k = self.reader.pairs.hard_negatives
        if not k:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        found, source = self.reader.candidates.draw(request.seed, request.epoch, query, request.product, k)
        failed += self._lost(found.reshape(-1))
        for i, j in np.argwhere(~self._readable[found]).tolist():
            place = (request.seed, request.epoch, int(query[i]), int(request.product[i]), j)
            others = self.reader.candidates.instead(*place, found[i].tolist())
            found[i, j], source[i, j] = self._first(others, int(found[i, j])), RANDOM
        return found.reshape(-1), source.reshape(-1)

    def _first(self, ids: Iterator[int], product: int) -> int:
        last = None
        for id in ids:
            if self._readable[id]:
                return id
            last = f"product {id} could not be read before"
        raise no_substitute(product, last)


@dataclass
class LeftOut:
    """Which batches have no content: one for all loaders of a datamodule, that look here whenever they make one.

    `known` makes those of training's optimizer steps below `until`, `evaluation` those of evaluation; None: all have
    content.
    """

    known: KnownReader | None = None
    until: int = 0
    evaluation: KnownReader | None = None

    def shown_from(self, begun: int, each: int) -> int:
        """The first batch with content, of an epoch that begins at optimizer step `begun`, of `each` batches a step."""
        return 0 if self.known is None else max(0, (self.until - begun) * each)
