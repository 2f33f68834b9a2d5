"""From a batch to unit vectors: towers, memos of frozen encoders, micro-batches, modality dropout."""

from functools import partial
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import one_hot

from mmfusion.batch import ProductBatch, QueryBatch
from mmfusion.cached import in_micro_batches
from mmfusion.encoders import Encoded, ImageEncoder, TextEncoder
from mmfusion.encoders.augment import uniforms
from mmfusion.memo import FeatureMemo, in_parts, keeps, photo_keys, rows_of, token_keys
from mmfusion.towers import MODALITIES, ProductTower, QueryTower, View

GATE = "gates/"


class Features:
    """The towers with their memos: vectors of queries and products, frozen encoders run once per text or photo and run.

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

    def queries(self, batch: QueryBatch) -> Float[Tensor, "query dim"]:
        """Unit vectors of queries."""
        encoder = cast(TextEncoder, self.query.encoder)
        kept = self._texts(encoder, batch.text) if keeps(encoder) else None
        if not self.query.training:
            parts = in_parts({"query": kept or self._texts(encoder, batch.text)}, len(batch.text))
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
        kept = {name: self._encoded(name, batch) for name in modalities if keeps(self._encoder(name))}
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
        encoded = {name: self._encoded(name, batch) for name in MODALITIES if {name, "fused"} & names}
        parts = [
            {
                view: rows[:count]
                for view, rows in self.product.vectors(self.product.project(part), names, batch.present[index]).items()
            }
            for part, index, count in in_parts(encoded, len(batch.present))
        ]
        return {view: torch.cat([part[view] for part in parts]) for view in parts[0]}

    @torch.no_grad()
    def _gates(self, projected: dict[str, Encoded], visible: Bool[Tensor, "product 2"]) -> dict[str, Tensor]:
        assert self.product.fusion is not None
        gates = self.product.fusion.gates(projected["text"], projected["image"], visible)
        return {f"{GATE}{name}": weights for name, weights in gates.items()}

    def _encoder(self, name: str) -> TextEncoder | ImageEncoder:
        return cast(View, getattr(self.product, name)).encoder

    def _encoded(self, name: str, batch: ProductBatch) -> Encoded:
        """What the encoder of a modality gives, by way of its memo where it is frozen."""
        encoder = self._encoder(name)
        if isinstance(encoder, TextEncoder):
            return self._texts(encoder, batch.text)
        keys = photo_keys(batch.photo) if keeps(encoder) else range(len(batch.photo))
        return self.memos[encoder](encoder, keys, lambda rows: encoder(batch.photo[rows], batch.draw[rows]))

    def _texts(self, encoder: TextEncoder, texts: list[str]) -> Encoded:
        contents = partial(token_keys, encoder)
        return self.memos[encoder](encoder, texts, lambda rows: encoder([texts[i] for i in rows]), contents)

    def sync(self) -> None:
        """Forgets what other weights have made. Called wherever weights may have changed: stages, evaluations."""
        for encoder, memo in self.memos.items():
            memo.sync(encoder)

    def release(self) -> None:
        """Forgets, after an evaluation, what encoders gave that will be trained on."""
        for encoder, memo in self.memos.items():
            if any(p.requires_grad for p in encoder.parameters()):
                memo.clear()


def part_of(batch: ProductBatch, rows: slice) -> ProductBatch:
    return ProductBatch(
        batch.text[rows], batch.photo[rows], batch.present[rows], batch.id[rows], batch.draw[rows], batch.valid[rows]
    )


def after_dropout(batch: ProductBatch, probability: float) -> Bool[Tensor, "product 2"]:
    """What is present, less what modality dropout hides: of two modalities one, never the only one."""
    if probability == 0:
        return batch.present
    chance = uniforms(batch.draw, 2, salt=2)
    hides = (chance[:, 0] < probability) & batch.present.all(1)
    hidden = one_hot((chance[:, 1] < 0.5).long(), 2).bool()
    return batch.present & ~(hides[:, None] & hidden)
