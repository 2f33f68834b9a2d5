"""A large contrastive batch in the activation memory of a small one (GradCache, Gao 2021, arXiv 2101.06983).

GradCache's two passes are autograd's own here: each micro-batch runs in a checkpoint, which keeps its vectors alone and
computes it again when its gradient is asked for. The losses see the whole batch and one graph, so that DDP reduces each
parameter once a step (the learnable scale too), and autocast and gradient accumulation need nothing special.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import islice
from types import TracebackType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

Rows = TypeVar("Rows", Tensor, dict[str, Tensor])


def in_micro_batches(
    function: Callable[[slice], Rows], rows: int, size: int | None, modules: Iterable[nn.Module]
) -> Rows:
    """`function` of all `rows` rows, `size` at a time, its results joined along their first axis.

    function: what it gives for some rows, as a tensor or as tensors by name, one row each. It is called twice for each
    micro-batch, the second time in the backward pass, with the random state of torch as it was the first time; it must
    not log, draw from other generators or change anything else.
    size: rows of a micro-batch, of which the last may have fewer; None, or at least `rows`: one call, no second one.
    modules: what `function` runs. Where nothing of them trains there is no second call either.

    BatchNorm normalises each micro-batch by its own statistics, so that results depend on `size`, and updates its
    running statistics once per micro-batch: not again when it is computed again.
    """
    if size is not None and size < 1:
        raise ValueError(f"micro-batches of {size} rows; expected at least 1, or None for the whole batch at once")
    if size is None or rows <= size:
        return function(slice(0, rows))
    modules = list(modules)
    parts = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    if not torch.is_grad_enabled() or not any(p.requires_grad for module in modules for p in module.parameters()):
        return _joined([function(part) for part in parts])
    # A checkpoint keeps the random state and the autocast of those accelerators alone that its arguments are on.
    places = [parameter for module in modules for parameter in islice(module.parameters(), 1)]
    again = StatisticsKept(modules)

    def run(part: slice, *_: Tensor) -> Rows:
        return function(part)

    def kept(part: slice) -> Rows:
        found = checkpoint(run, part, *places, use_reentrant=False, context_fn=lambda: (nullcontext(), again))
        return cast(Rows, found)

    return _joined([kept(part) for part in parts])


def _joined(parts: list[Rows]) -> Rows:
    first: Any = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(cast(list[Tensor], parts))  # type: ignore[return-value]
    named = cast(list[dict[str, Tensor]], parts)
    return {name: torch.cat([part[name] for part in named]) for name in first}  # type: ignore[return-value]


class StatisticsKept:
    """While it is entered, normalisation layers leave their running statistics as they are, to the bit.

    A momentum of 0 does it, and keeps the saved tensors as many as a checkpoint expects; it may be entered again.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        parts = dict.fromkeys(part for module in modules for part in module.modules())
        self.layers = [part for part in parts if isinstance(part, _NormBase)]  # SyncBatchNorm and timm's are such too

    def __enter__(self) -> None:
        self.before = [(layer.momentum, _copy(layer.num_batches_tracked)) for layer in self.layers]
        for layer in self.layers:
            layer.momentum = 0.0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer, (momentum, count) in zip(self.layers, self.before, strict=True):
            layer.momentum = momentum
            if count is not None and layer.num_batches_tracked is not None:
                layer.num_batches_tracked.copy_(count)


def _copy(count: Tensor | None) -> Tensor | None:
    return None if count is None else count.clone()
