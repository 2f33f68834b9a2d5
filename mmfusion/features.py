"""Outputs of frozen encoders, kept for the run: each product and query is encoded once, not once an epoch."""

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmfusion.batch import ProductBatch, QueryBatch
from mmfusion.encoders import Encoded
from mmfusion.ranks import checksum
from mmfusion.towers import MODALITIES, ProductTower, QueryTower, View


class FeatureMemo:
    """Encoder outputs by dense id, in memory, on the encoder's device.

    Used only while the encoder is frozen and in eval mode, where its output depends on the input alone; forgotten when
    its weights change. Rows beyond `limit_gib` are computed each time.

    Args:
        keep_tokens: keep the tokens too (for heads that attend); without them the token axis is 0 long
        limit_gib: GiB of features this memo may hold
    """

    def __init__(self, keep_tokens: bool, limit_gib: float) -> None:
        self.keep_tokens = keep_tokens
        self.limit_bytes = int(limit_gib * 2**30)
        self.clear()

    def clear(self) -> None:
        self.slot = torch.empty(0, dtype=torch.int64)
        self.count = 0
        self.kept: Encoded | None = None
        self.weights: Tensor | None = None

    def sync(self, encoder: nn.Module) -> None:
        """Forgets everything unless the encoder's weights and buffers are, bit for bit, those that were used."""
        now = checksum([*encoder.parameters(), *encoder.buffers()])
        if self.weights is None or not torch.equal(now, self.weights.to(now.device)):
            self.clear()
            self.weights = now

    def __call__(
        self, encoder: nn.Module, ids: Int[Tensor, "product"], encode: Callable[[list[int]], Encoded]
    ) -> Encoded:
        """The outputs for `ids`; `encode` computes those of the given rows of the batch that are not kept yet."""
        if encoder.training or any(p.requires_grad for p in encoder.parameters()):
            return encode(list(range(len(ids))))
        cpu_ids = ids.cpu()
        self._reserve(int(cpu_ids.max()) + 1)
        missing = (self.slot[cpu_ids] < 0).nonzero().flatten()
        if len(missing):
            with torch.no_grad():
                fresh = self._shorten(encode(missing.tolist()))
            if not self._keep(cpu_ids[missing], fresh):
                return self._joined(cpu_ids, missing, fresh)
        return self._of(self.slot[cpu_ids])

    def _of(self, slots: Int[Tensor, "product"]) -> Encoded:
        assert self.kept is not None
        rows = slots.to(self.kept.pooled.device)
        return Encoded(self.kept.pooled[rows], self.kept.tokens[rows], self.kept.mask[rows])

    def _joined(self, ids: Int[Tensor, "product"], missing: Int[Tensor, "missing"], fresh: Encoded) -> Encoded:
        """Rows that are kept, and fresh ones that could not be, in the batch's order."""
        if self.kept is None:
            return fresh
        length = max(self.kept.mask.shape[1], fresh.mask.shape[1])
        kept, fresh = _lengthen(self._of(self.slot[ids].clamp(min=0)), length), _lengthen(fresh, length)
        for part, new in ((kept.pooled, fresh.pooled), (kept.tokens, fresh.tokens), (kept.mask, fresh.mask)):
            part[missing.to(part.device)] = new
        return kept

    def _shorten(self, encoded: Encoded) -> Encoded:
        if self.keep_tokens:
            return encoded
        return Encoded(encoded.pooled, encoded.tokens[:, :0], encoded.mask[:, :0])

    def _reserve(self, size: int) -> None:
        if size > len(self.slot):
            grown = torch.full((max(size, 2 * len(self.slot)),), -1, dtype=torch.int64)
            grown[: len(self.slot)] = self.slot
            self.slot = grown

    def _keep(self, ids: Int[Tensor, "missing"], fresh: Encoded) -> bool:
        """Stores the rows, first come first kept; False when they would not fit under the limit."""
        ids, first = _first_of_each(ids)
        fresh = Encoded(fresh.pooled[first], fresh.tokens[first], fresh.mask[first])
        kept = self.kept if self.kept is not None else _rows(fresh, 0)
        kept = _lengthen(kept, max(kept.mask.shape[1], fresh.mask.shape[1]))
        fresh = _lengthen(fresh, kept.mask.shape[1])
        needed = self.count + len(ids)
        if needed > len(kept.pooled):
            capacity = max(needed, len(kept.pooled) * 3 // 2)
            if capacity * _bytes_per_row(fresh) > self.limit_bytes:
                capacity = needed
            if capacity * _bytes_per_row(fresh) > self.limit_bytes:
                return False
            kept = _concatenate(_rows(kept, self.count), _rows(fresh, 0), capacity)
        kept.pooled[self.count : needed] = fresh.pooled
        kept.tokens[self.count : needed] = fresh.tokens
        kept.mask[self.count : needed] = fresh.mask
        self.slot[ids] = torch.arange(self.count, needed)
        self.kept, self.count = kept, needed
        return True


def _first_of_each(ids: Int[Tensor, "missing"]) -> tuple[Int[Tensor, "unique"], Int[Tensor, "unique"]]:
    unique, inverse = ids.unique(return_inverse=True)
    first = torch.full((len(unique),), len(ids)).scatter_reduce(0, inverse, torch.arange(len(ids)), "amin")
    return unique, first


def _rows(encoded: Encoded, count: int) -> Encoded:
    return Encoded(encoded.pooled[:count], encoded.tokens[:count], encoded.mask[:count])


def _bytes_per_row(encoded: Encoded) -> int:
    return sum(part[0].numel() * part.element_size() for part in (encoded.pooled, encoded.tokens, encoded.mask))


def _lengthen(encoded: Encoded, tokens: int) -> Encoded:
    extra = tokens - encoded.mask.shape[1]
    if extra <= 0:
        return encoded
    pad = nn.functional.pad
    return Encoded(encoded.pooled, pad(encoded.tokens, (0, 0, 0, extra)), pad(encoded.mask, (0, extra)))


def _concatenate(head: Encoded, like: Encoded, capacity: int) -> Encoded:
    def grow(part: Tensor, template: Tensor) -> Tensor:
        grown = template.new_zeros((capacity, *template.shape[1:]))
        grown[: len(part)] = part
        return grown

    return Encoded(grow(head.pooled, like.pooled), grow(head.tokens, like.tokens), grow(head.mask, like.mask))


class Features:
    """The towers with their memos: vectors of queries and products, frozen encoders run once per product and run.

    Args:
        query, product: the towers
        limit_gib: GiB that each encoder's memo may take
    """

    def __init__(self, query: QueryTower, product: ProductTower, limit_gib: float) -> None:
        self.query, self.product = query, product
        keep_tokens = product.fusion is not None and product.fusion.needs_tokens
        self.memos = {"query": FeatureMemo(False, limit_gib)}
        self.memos |= {name: FeatureMemo(keep_tokens, limit_gib) for name in MODALITIES}
        self.inputs = ""

    def queries(self, batch: QueryBatch) -> Float[Tensor, "query dim"]:
        """Unit vectors of queries."""
        encoder = self.query.encoder
        encoded = self.memos["query"](encoder, batch.id, lambda rows: encoder([batch.text[i] for i in rows]))
        return self.query.project(encoded).pooled

    def products(self, batch: ProductBatch, names: set[str]) -> dict[str, Encoded]:
        """The modalities `names` in the shared space."""
        encoded = {}
        if "text" in names:
            text = cast(View, self.product.text).encoder
            encoded["text"] = self.memos["text"](text, batch.id, lambda rows: text([batch.text[i] for i in rows]))
        if "image" in names:
            image = cast(View, self.product.image).encoder
            encoded["image"] = self.memos["image"](
                image, batch.id, lambda rows: image(batch.photo[rows], batch.draw[rows])
            )
        return self.product.project(encoded)

    def sync(self, inputs: str) -> None:
        """Forgets what other weights, or other data, have made. Called where they may have changed: stages, loading.

        inputs: identifies what encoders see of the data (RetrievalData.inputs).
        """
        if inputs != self.inputs:
            for memo in self.memos.values():
                memo.clear()
            self.inputs = inputs
        self.memos["query"].sync(self.query.encoder)
        for name in MODALITIES:
            view = getattr(self.product, name)
            if view is not None:
                self.memos[name].sync(view.encoder)
