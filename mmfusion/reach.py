"""Which parameters the active losses of a stage depend on, asked of autograd rather than guessed."""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmfusion.batch import TupleBatch
from mmfusion.features import part_of
from mmfusion.stages import evaluating
from mmfusion.terms import sides, views_of
from mmfusion.towers import ProductTower, QueryTower


@contextlib.contextmanager
def everything_trainable(module: nn.Module) -> Iterator[None]:
    """All parameters trainable and all modules in eval mode; afterwards everything is as it was."""
    trainable = {parameter: parameter.requires_grad for parameter in module.parameters()}
    module.requires_grad_(True)
    try:
        with evaluating(module), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for parameter, before in trainable.items():
            parameter.requires_grad_(before)


def reached(
    module: nn.Module,
    query: QueryTower,
    product: ProductTower,
    losses: nn.ModuleDict,
    terms: set[str],
    batch: TupleBatch,
) -> set[str]:
    """Names of `module`'s parameters that the loss terms depend on, found by a backward pass over two products.

    `module` holds the towers and the losses; weights, buffers, modes and gradients stay as they are.
    """
    names, parameters = zip(*module.named_parameters(), strict=True)
    with everything_trainable(module):
        gradients = torch.autograd.grad(_surface(query, product, losses, terms, batch), parameters, allow_unused=True)
    return {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}


def _surface(
    query: QueryTower, product: ProductTower, losses: nn.ModuleDict, terms: set[str], batch: TupleBatch
) -> Float[Tensor, ""]:
    """A scalar that depends on just what the terms depend on."""
    few = slice(0, min(2, len(batch)))  # the tuples' own rows come first
    some = part_of(batch.product, few)
    complete = dataclasses.replace(some, present=torch.ones_like(some.present))
    needed = sides(terms)
    projected = product.project(product.encode(complete, needed))
    vectors = product.vectors(projected, needed, complete.present)
    if "query" in needed:
        vectors["query"] = query(batch.query.text[few])
    products = [(vectors[left] * vectors[right]).sum() for left, right in map(views_of, sorted(terms))]
    scalars = [p.sum() for term in sorted(terms) for p in losses[term].parameters()]
    return torch.stack([*products, *scalars]).sum()
