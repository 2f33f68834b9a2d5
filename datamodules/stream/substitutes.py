"""Who takes the place of a training sample that cannot be read."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Integer

from datamodules.plan import SUBSTITUTE, hashed

TRIES = 64  # a substitute may fail as well: even where half of the shards are lost, 64 in a row do not


def substitutes(
    trainable: Integer[np.ndarray, "trainable"], seed: int, epoch: int, product: int, number: int
) -> Iterator[int]:
    """Up to TRIES other trainable products for slot `number` of `product`, in the order in which they are tried.

    A pure function of its arguments: the same on all ranks and workers, and in a resumed run.
    """
    rows = hashed(seed, epoch, SUBSTITUTE, product, number, np.arange(TRIES)) % np.uint64(len(trainable))
    return (id for id in trainable[rows.astype(np.int64)].tolist() if id != product)


def no_substitute(product: int, why: object | None) -> ValueError:
    """Where none of those that were tried can be read, the last because of `why`; None where there was none to try."""
    if why is None:
        return ValueError(f"product {product} cannot be read, and there is no other that could take its place")
    return ValueError(f"none of {TRIES} products that could take the place of product {product} can be read: {why}")
