"""What is asked of a fused view beyond its vectors: the head's weights, and what it is with photos hidden."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from mmfusion.batch import ProductBatch
from mmfusion.retrieval.ranking import gathered

WITHOUT = "fused without photos"  # the view of products by their texts alone, where these are fused
BYTES = 6  # of a product's hash: 48 bits are exact in fp64


class Examination:
    """Gathers, over one pass of the corpus, what the head weighs; says which products' photos are hidden.

    Which photos are hidden depends on the products' ids alone: the same in every run, and those that .25 hides .5
    hides too.

    Args:
        product_ids: the catalogue's own ids, by dense id
        fractions: of the products, whose photos are hidden
    """

    def __init__(self, product_ids: Sequence[str], fractions: Sequence[float]) -> None:
        self._products = len(product_ids)
        self._fractions = {percent(fraction): fraction for fraction in sorted(set(fractions))}
        self._places = torch.from_numpy(places(product_ids)) if fractions else torch.zeros(0, dtype=torch.float64)
        self._ids: list[Tensor] = []
        self._weights: list[dict[str, Tensor]] = []

    @property
    def hidden(self) -> list[str]:
        """Names of the fractions, the lowest first: "50 %"."""
        return list(self._fractions)

    def visible(self, batch: ProductBatch) -> dict[str, Bool[Tensor, "product 2"]]:
        """What the view WITHOUT sees of `present`: no photo. Empty where no photos are hidden.

        Without its photo a product is the same in every fraction, so that this one view is enough for all of them.
        """
        return (
            {WITHOUT: batch.present & torch.tensor([True, False]).to(batch.present.device)} if self._fractions else {}
        )

    def hides(self, name: str, ids: Int[Tensor, "product"]) -> Bool[Tensor, "product"]:
        """Which of the products lose their photos in a fraction, by its name."""
        return (self._places[ids.cpu()] < self._fractions[name]).to(ids.device)

    def add(self, weights: Mapping[str, Float[Tensor, "product"]], batch: ProductBatch) -> None:
        """The head's weights in a batch. Rows that pad it, and products that have nothing to weigh, are left out."""
        counted = batch.valid & batch.present.any(1)
        self._ids.append(batch.id[counted].cpu())
        self._weights.append({name: of_gate[counted].float().cpu() for name, of_gate in weights.items()})

    def weights(self) -> dict[str, Float[np.ndarray, "catalogue"]]:
        """By gate or expert, the weight in every product, from all ranks; NaN where it was left out.

        Empty for a head that weighs nothing.
        """
        own_names = list(self._weights[0]) if self._weights else []
        own = {name: torch.cat([part[name] for part in self._weights]).numpy() for name in own_names}
        parts = gathered((torch.cat(self._ids).numpy() if self._ids else np.zeros(0, np.int64), own))
        names = dict.fromkeys(name for _, weights in parts for name in weights)  # a rank may have had no batch
        found = {name: np.full(self._products, np.nan, np.float32) for name in names}
        for of_rank, weights in parts:
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
