"""From a batch to unit vectors: towers, memos of frozen encoders, micro-batches, modality dropout."""

from collections.abc import Mapping
from dataclasses import fields
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot

from mmfusion.batch import ProductBatch, QueryBatch
from mmfusion.cached import in_micro_batches
from mmfusion.encoders import Encoded, ImageEncoder, TextEncoder
from mmfusion.encoders.augment import uniforms
from mmfusion.feature_cache import Stored
from mmfusion.memo import FeatureMemo, encode_photos, encode_texts, in_parts, keeps, rows_of, weights_of
from mmfusion.towers import MODALITIES, ProductTower, QueryTower, View

GATE = "gates/"


class Features:
    """The towers with their memos: vectors of queries and products, frozen encoders run once per text or photo and run.

    What an encoder gives is read from its `stored` outputs where it has some (mmfusion/feature_cache) and is frozen,
    else from its memo; both hold the same, bit for bit.

    Args:
        query, product: the towers
        limit_gib: GiB that each encoder's memo may take
        micro_batch: rows that go through the towers at a time in training; None: all of the batch
    """

    def __init__(
        self, query: QueryTower, product: ProductTower, limit_gib: float, micro_batch: int | None = None
    ) -> None:
        self.query, self.product, self.micro_batch = query, product, micro_batch
        keep_tokens = product.fusion is not None and product.fusion.needs_tokens
        views = [view for view in (query, product.text, product.image) if view is not None]
        self.memos = {view.encoder: FeatureMemo(keep_tokens, limit_gib) for view in views}
        self.keep_tokens, self.limit_gib = keep_tokens, limit_gib
        self.weights: dict[nn.Module, Tensor] = {}  # of each encoder, the checksum, as `sync` has last found it
        self.stored: dict[str, Stored] = {}  # by side: query, text, image
        self._stored_of: dict[str, Tensor] = {}  # the checksum of the weights that made it

    @property
    def encoders(self) -> dict[str, TextEncoder | ImageEncoder]:
        """By side: query, and text and image of the product, those that there are. Sides may share one."""
        views = {"query": self.query, "text": self.product.text, "image": self.product.image}
        return {side: view.encoder for side, view in views.items() if view is not None}

    def use(self, side: str, stored: Stored | None) -> None:
        """From now on reads what the side's encoder gives, as `sync` found it, from `stored`; None: computes it."""
        self.stored.pop(side, None)
        if stored is not None:
            self.stored[side], self._stored_of[side] = stored, self.weights[self.encoders[side]]

    def queries(self, batch: QueryBatch) -> Float[Tensor, "query dim"]:
        """Unit vectors of queries."""
        encoder = cast(TextEncoder, self.query.encoder)
        kept = self._asked(batch) if self._reads("query") or keeps(encoder) else None
        if not self.query.training:
            parts = in_parts({"query": kept or self._asked(batch)}, len(batch.text))
            return torch.cat([self.query.project(part["query"]).pooled[:rows] for part, _, rows in parts])

        def vectors(rows: slice) -> Float[Tensor, "query dim"]:
            return self.query.project(rows_of(kept, rows) if kept else encoder(batch.text[rows])).pooled

        return in_micro_batches(vectors, len(batch.text), self.micro_batch, [self.query])

    def products(
        self, batch: ProductBatch, names: set[str], visible: Bool[Tensor, "product 2"], with_gates: bool = False
    ) -> tuple[dict[str, Float[Tensor, "product dim"]], dict[str, Float[Tensor, "product"]]]:
        """The views `names` in training, and the head's gates: none, unless asked for with the view `fused`.

        visible: what the fused view may see of what is present. What a frozen encoder gives is asked of its memo for
        the whole batch: a micro-batch that is computed again must not encode again what did not fit into the memo.
        """
        modalities = [name for name in MODALITIES if {name, "fused"} & names]
        frozen = [name for name in modalities if self._reads(name) or keeps(self._encoder(name))]
        kept = {name: self._encoded(name, batch) for name in frozen}
        with_gates = with_gates and "fused" in names

        def vectors(rows: slice) -> dict[str, Tensor]:
            some = part_of(batch, rows)
            encoded = {n: rows_of(kept[n], rows) if n in kept else self._encoded(n, some) for n in modalities}
            projected = self.product.project(encoded)
            gates = self._gates(projected, visible[rows]) if with_gates else {}
            return self.product.vectors(projected, names, some.present, visible[rows]) | gates

        parts: list[nn.Module] = [getattr(self.product, name) for name in modalities]
        if "fused" in names and self.product.fusion is not None:
            parts.append(self.product.fusion)
        found = in_micro_batches(vectors, len(batch.text), self.micro_batch, parts)
        gates = {name.removeprefix(GATE): found.pop(name) for name in list(found) if name.startswith(GATE)}
        return found, gates

    def evaluated(self, batch: ProductBatch, names: set[str]) -> dict[str, Float[Tensor, "product dim"]]:
        """The views `names` as an evaluation sees them: to the last bit the same in whatever batch."""
        return self._in_parts(batch, names, {}, with_gates=False)

    @torch.no_grad()
    def _gates(self, projected: dict[str, Encoded], visible: Bool[Tensor, "product 2"]) -> dict[str, Tensor]:
        assert self.product.fusion is not None
        gates = self.product.fusion.gates(projected["text"], projected["image"], visible)
        return {f"{GATE}{name}": weights for name, weights in gates.items()}

    def _encoder(self, name: str) -> TextEncoder | ImageEncoder:
        return cast(View, getattr(self.product, name)).encoder

    def _encoded(self, name: str, batch: ProductBatch) -> Encoded:
        """What the encoder of a modality gives, as it is stored, or by way of its memo where it is frozen."""
        encoder = self._encoder(name)
        if self._reads(name):
            return self._read(name, batch.id)
        assert batch.shown, f"a batch without content, and no stored outputs of product.{name}.encoder"
        if isinstance(encoder, TextEncoder):
            return encode_texts(self.memos[encoder], encoder, batch.text)
        return encode_photos(self.memos[encoder], encoder, batch.photo, batch.draw)

    def _asked(self, batch: QueryBatch) -> Encoded:
        """The same of queries."""
        encoder = cast(TextEncoder, self.query.encoder)
        if self._reads("query"):
            return self._read("query", batch.id)
        return encode_texts(self.memos[encoder], encoder, batch.text)

    def _reads(self, side: str) -> bool:
        """Whether its outputs are read; a stage that trains the encoder has taken them away (FeatureCache.enter).

        Without a look at all parameters, which takes as long as to read a small batch.
        """
        return side in self.stored and not self.encoders[side].training

    def _read(self, side: str, ids: Int[Tensor, "row"]) -> Encoded:
        encoded = self.stored[side](ids.cpu())
        return Encoded(*(getattr(encoded, part.name).to(ids.device, non_blocking=True) for part in fields(Encoded)))

    def sync(self) -> None:
        """Forgets what other weights have made. Called wherever weights may have changed: stages, evaluations."""
        for encoder, memo in self.memos.items():
            self.weights[encoder] = weights_of(encoder)
            memo.sync(self.weights[encoder])
        for side in list(self.stored):
            if not torch.equal(self._stored_of[side], self.weights[self.encoders[side]]):
                self.use(side, None)

    def release(self) -> None:
        """Forgets, after an evaluation, what encoders gave that will be trained on."""
        for encoder, memo in self.memos.items():
            if any(p.requires_grad for p in encoder.parameters()):
                memo.clear()

    def examined(
        self, batch: ProductBatch, names: set[str], visible: Mapping[str, Bool[Tensor, "product 2"]]
    ) -> tuple[dict[str, Float[Tensor, "product dim"]], dict[str, Float[Tensor, "product"]]]:
        """What `evaluated` gives, with the view fused once more by each name of `visible`, and the head's gates.

        visible: what that view may see of what is present. The encoders run once. `names` has the view `fused`.
        """
        found = self._in_parts(batch, names, visible, with_gates=True)
        gates = {name.removeprefix(GATE): found.pop(name) for name in list(found) if name.startswith(GATE)}
        return found, gates

    def _in_parts(
        self, batch: ProductBatch, names: set[str], visible: Mapping[str, Bool[Tensor, "product 2"]], with_gates: bool
    ) -> dict[str, Tensor]:
        """The views `names`, those of `visible`, and the gates."""
        encoded = {name: self._encoded(name, batch) for name in MODALITIES if {name, "fused"} & names}
        parts = []
        for part, index, count in in_parts(encoded, len(batch.present)):
            projected, present = self.product.project(part), batch.present[index]
            found = self.product.vectors(projected, names, present)
            found |= {name: self.product.fuse(projected, seen[index]) for name, seen in visible.items()}
            found |= self._gates(projected, present) if with_gates else {}
            parts.append({name: rows[:count] for name, rows in found.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def part_of(batch: ProductBatch, rows: slice) -> ProductBatch:
    text, photo, present = batch.text[rows], batch.photo[rows], batch.present[rows]
    return ProductBatch(text, photo, present, batch.id[rows], batch.draw[rows], batch.valid[rows], batch.shown)


def after_dropout(batch: ProductBatch, probability: float) -> Bool[Tensor, "product 2"]:
    """What is present, less what modality dropout hides: of two modalities one, never the only one."""
    if probability == 0:
        return batch.present
    chance = uniforms(batch.draw, 2, salt=2)
    hides = (chance[:, 0] < probability) & batch.present.all(1)
    hidden = one_hot((chance[:, 1] < 0.5).long(), 2).bool()
    return batch.present & ~(hides[:, None] & hidden)
