"""Keeping ranks alike: proof that their weights agree, equal buffers, and DDP over what is trainable now."""

from collections.abc import Iterable

import torch
from jaxtyping import Int
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from mmfusion.guards.error import GuardError

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensors: Iterable[Tensor]) -> Int[Tensor, "tensor"]:
    """One integer per tensor from the bits of its values and their places; equal tensors give equal sums anywhere."""
    sums = []
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(BITS[tensor.element_size()]).flatten().long()
        sums.append((bits * (2 * torch.arange(len(bits), device=bits.device) + 1)).sum())
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64)


def has_ranks() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def check_ranks_agree(module: nn.Module, where: str, trained_only: bool = False) -> None:
    """Raises GuardError naming the first parameters whose bits differ between ranks. Called on every rank at once."""
    if not has_ranks():
        return
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad or not trained_only]
    names, parameters = zip(*named, strict=True)
    own = checksum(parameters)
    every = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(every, own)
    differs = torch.stack(every) != every[0]
    if bool(differs.any()):
        drifted = [name for name, bad in zip(names, differs.any(0).tolist(), strict=True) if bad]
        ranks = differs.any(1).nonzero()[:, 0].tolist()
        raise GuardError(
            f"ranks hold different weights {where}: {len(drifted)} parameters, first {drifted[:3]}; ranks {ranks[:8]} "
            f"of {len(every)} differ from rank 0\n"
            "A checkpoint from after they last agreed (see --guards.ranks_every) cannot be trusted: go on from an "
            "earlier one, or start afresh. Do all ranks run the same code and libraries on the same kind of device? "
            "Does code of your own change weights on some ranks alone? Else a device may be faulty: try without it"
        )


def sync_buffers(module: nn.Module) -> None:
    """Rank 0's buffers (BatchNorm statistics) on every rank, so that all evaluate and save the same model."""
    if has_ranks():
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)


def wrap_again(trainer: Trainer) -> None:
    """A new DDP wrapper over what is trainable now; the old one's reducer is dropped first.

    Private calls of Lightning 2.6 (pinned in pyproject.toml, covered by tests/mmfusion/test_stages_ddp.py).
    """
    strategy = trainer.strategy
    module = strategy.lightning_module
    if isinstance(strategy, DDPStrategy) and module is not None and strategy.model not in (None, module):
        strategy.model = None
        strategy.model = strategy._setup_model(module)
        strategy._register_ddp_hooks()
