"""What is asked of a fused view beyond its vectors: the head's weights, and what it is with photos hidden."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from mmfusion.batch import ProductBatch
from mmfusion.retrieval.ranking import gathered

BYTES = 6  # of a product's hash: 48 bits are exact in fp64


class Examination:
    """Gathers, over one pass of the corpus, what the head weighs; says which products' photos are hidden.

    Which photos are hidden depends on the products' ids alone: the same in every run, and those that .25 hides .5
    hides too.

    Args:
        product_ids: the catalogue's own ids, by dense id
        fractions: of the products, whose photos are hidden in one more fused view each
    """

    def __init__(self, product_ids: Sequence[str], fractions: Sequence[float]) -> None:
        self._products = len(product_ids)
        self._fractions = {percent(fraction): fraction for fraction in sorted(set(fractions))}
        self._places = torch.from_numpy(places(product_ids)) if fractions else torch.zeros(0, dtype=torch.float64)
        self._ids: list[Tensor] = []
        self._weights: list[dict[str, Tensor]] = []

    @property
    def hidden(self) -> dict[str, float]:
        """The fractions of photos by the names of the views that lack them: "50 %"."""
        return dict(self._fractions)

    def visible(self, batch: ProductBatch) -> dict[str, Bool[Tensor, "product 2"]]:
        """What is left of `present`, by the names of `hidden`."""
        return {name: self._without(batch, fraction) for name, fraction in self._fractions.items()}

    def _without(self, batch: ProductBatch, fraction: float) -> Bool[Tensor, "product 2"]:
        kept = (self._places[batch.id.cpu()] >= fraction).to(batch.present.device)
        return torch.stack([batch.present[:, 0], batch.present[:, 1] & kept], 1)

    def add(self, weights: Mapping[str, Float[Tensor, "product"]], batch: ProductBatch) -> None:
        """The head's weights in a batch. Rows that pad it, and products that have nothing to weigh, are left out."""
        counted = batch.valid & batch.present.any(1)
        self._ids.append(batch.id[counted].cpu())
        self._weights.append({name: of_gate[counted].float().cpu() for name, of_gate in weights.items()})

    def weights(self) -> dict[str, Float[np.ndarray, "catalogue"]]:
        """By gate or expert, the weight in every product, from all ranks; NaN where it was left out.

        Empty for a head that weighs nothing.
        """
        names = list(self._weights[0]) if self._weights else []
        own = {name: torch.cat([part[name] for part in self._weights]).numpy() for name in names}
        ids = torch.cat(self._ids).numpy() if self._ids else np.zeros(0, np.int64)
        found = {name: np.full(self._products, np.nan, np.float32) for name in names}
        for of_rank, weights in gathered((ids, own)):
            for name, values in weights.items():
                found[name][of_rank] = values
        return found


def percent(fraction: float) -> str:
    """50 % of .5"""
    return f"{100 * fraction:g} %"


def places(product_ids: Sequence[str]) -> Float64[np.ndarray, "product"]:
    """A number from 0 to 1 for each product, drawn by its id alone."""
    drawn = b"".join(blake2b(name.encode(), digest_size=BYTES).digest() for name in product_ids)
    digits = np.frombuffer(drawn, np.uint8).reshape(-1, BYTES).astype(np.float64)
    return digits @ 256.0 ** -np.arange(1, BYTES + 1)
