"""What the weights of a fusion head tell: by kind of product, and whether experts have collapsed into few."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

ALL = "all"
Weights = Mapping[str, Float[np.ndarray, "catalogue"]]


def gate_summary(weights: Weights, of_products: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """{"slices": [slice][value] = {"products", "mean": {gate}, "std": {gate}}, "entropy": of `entropies`}.

    Empty for a head that weighs nothing. weights: by gate or expert, per product; they sum to 1, NaN is left out.
    of_products: `product_slices`.
    """
    if not weights or np.isnan(next(iter(weights.values()))).all():
        return {}
    rows = np.stack(list(weights.values()), 1).astype(np.float64)
    counted = ~np.isnan(rows).any(1)
    rows = rows[counted]
    names = list(weights)
    found: dict[str, dict[str, Any]] = {ALL: {ALL: _cell(names, rows)}}
    for name, of_product in of_products.items():
        values, place = np.unique(of_product[counted], return_inverse=True)
        found[name] = {str(value): _cell(names, rows[place == at]) for at, value in enumerate(values)}
    return {"slices": found, "entropy": entropies(rows)}


def _cell(names: list[str], rows: Float[np.ndarray, "product gate"]) -> dict[str, Any]:
    mean, std = rows.mean(0).tolist(), rows.std(0).tolist()
    return {
        "products": len(rows),
        "mean": dict(zip(names, mean, strict=True)),
        "std": dict(zip(names, std, strict=True)),
    }


def entropies(rows: Float[np.ndarray, "product gate"]) -> dict[str, float]:
    """How evenly weights are spread, as shares of the most there could be, which is log of the number of gates.

    of_mean: of the mean weights: 1 when all experts are used alike, 0 when all products use the same one (collapse).
    mean: of each product's weights, on average: 1 when every product mixes all alike, 0 when each goes to one expert.
    Their difference is what the weights tell of the product: 0 when all products are weighed alike.
    in_use: the number of gates that, used alike, would have the entropy of the mean. of: the number of gates.
    """
    gates = rows.shape[1]
    most = np.log(gates) if gates > 1 else 1.0
    of_mean, each = float(_entropy(rows.mean(0, keepdims=True))[0]), float(_entropy(rows).mean())
    return {"of_mean": of_mean / most, "mean": each / most, "in_use": float(np.exp(of_mean)), "of": gates}


def _entropy(weights: Float[np.ndarray, "product gate"]) -> Float[np.ndarray, "product"]:
    """Of each row, in nats; 0 log 0 is 0."""
    return -(weights * np.log(np.where(weights > 0, weights, 1))).sum(1)
