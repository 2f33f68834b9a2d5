"""Ranks in a ring: every rank's rows pass all the others in turn, so that none holds more than two ranks' rows at once.

Like gather.py it knows of ranks: all call these functions in one order, with equal shapes. What travels next is on its
way while a block is worked on. In each step a rank both sends and receives, in one batch, so none waits for another's
order; with two ranks both go to the same peer.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from mmfusion.speed.timeline import communicating


def blocks(own: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(rank, its contiguous tensor) of every rank, this one first, then the previous ones. Take all of them."""
    rank, ranks = _place()
    block = own
    for step in range(ranks):
        following = pass_on(block) if step + 1 < ranks else None
        yield (rank - step) % ranks, block
        if following is not None:
            block = following()


def pass_on(tensor: Tensor) -> Callable[[], Tensor]:
    """Starts to send a contiguous tensor to the next rank; call the result for the previous rank's.

    `tensor` must not change before that call.
    """
    rank, ranks = _place()
    if ranks == 1:
        return lambda: tensor
    sent, coming = tensor, torch.empty_like(tensor)
    transfers = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, sent, (rank + 1) % ranks),
            dist.P2POp(dist.irecv, coming, (rank - 1) % ranks),
        ]
    )

    def wait() -> Tensor:
        nonlocal sent
        with communicating():
            for transfer in transfers:
                transfer.wait()
        sent = coming  # until here, what is sent was kept alive
        return coming

    return wait


def _place() -> tuple[int, int]:
    """This rank, and how many there are."""
    up = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if up else (0, 1)
