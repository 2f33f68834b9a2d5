"""Activation checkpointing: blocks of a network keep their inputs alone, and run again in the backward pass.

Memory of one block at a time instead of all, for a second forward pass (Chen 2016, arXiv 1604.06174). Gradients are the
same, also with dropout: torch keeps the random state. The networks' own switches decide what a block is.
"""

from typing import Any

from torch.nn.modules.batchnorm import _NormBase


def checkpoint_transformer(model: Any, name: str) -> None:
    """Of a model of transformers, in training mode. Raises ValueError where it cannot."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(f"checkpoint_activations: {name} has no blocks that can run again; set it to false")
    how = {"use_reentrant": False}  # the other way loses gradients under DDP and autograd.grad
    if hasattr(model, "activation_checkpointing_enable"):  # transformers' new name of the other
        model.activation_checkpointing_enable(how)
    else:
        model.gradient_checkpointing_enable(how)


def checkpoint_timm(model: Any, name: str) -> None:
    """Of a model of timm. Raises ValueError where it cannot, or where BatchNorm would count every batch twice."""
    if any(isinstance(part, _NormBase) and part.running_mean is not None for part in model.modules()):
        raise ValueError(
            f"checkpoint_activations: {name} has BatchNorm, whose running statistics would take every batch twice; "
            "set it to false. model.micro_batch saves memory too, and counts right"
        )
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):  # how timm's models say no
        raise ValueError(f"checkpoint_activations: {name} has no blocks that can run again; set it to false") from None
