"""Memory for the photos of batches on their way: a worker decodes to where the batch will be read."""

import mmap
import weakref

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from datamodules.stream.batches import Reader, Request
from datamodules.stream.failures import Failed
from mmfusion.batch import TupleBatch

BLOCKS = 4  # two batches asked for ahead (DataLoader's prefetch_factor), one that is given out, one that trains


class PhotoBlocks:
    """Photos of `count` batches, each of `batch` products. A block is free again when nobody holds the tensor that it
    was given out as.

    The memory is shared with forked workers: photos need neither pickling, nor /dev/shm, nor a copy of the whole batch.
    It is kept: `count` times a batch of uint8 pixels.
    A process that is not forked has no part in it: whoever unpickles the blocks has none.
    """

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self._shape, self.batch = shape, shape[0]
        pixels = np.frombuffer(
            mmap.mmap(-1, max(1, count * int(np.prod(shape)))), np.uint8
        )  # takes memory when written
        self._pixels = pixels[: count * int(np.prod(shape))].reshape(count, *shape)
        self._asked: set[int] = set()
        self._held: set[int] = set()

    def __reduce__(self) -> tuple[type["PhotoBlocks"], tuple[int, tuple[int, ...]]]:
        return PhotoBlocks, (0, self._shape)

    def reset(self) -> None:
        """Takes back what was asked for and never given out: by an iteration that was broken off."""
        self._asked.clear()

    def leave(self) -> None:
        """What was asked for stays out of use, as workers that are left to themselves may still write there."""
        self._held |= self._asked
        self._asked.clear()

    def take(self) -> int | None:
        """A free block to be asked for; None where there is none, and the batch takes the long way."""
        free = set(range(len(self._pixels))) - self._asked - self._held
        block = min(free, default=None)
        if block is not None:
            self._asked.add(block)
        return block

    def rows(self, block: int, start: int, count: int) -> UInt8[np.ndarray, "product 3 height width"]:
        return self._pixels[block, start : start + count]

    def give(self, block: int) -> UInt8[Tensor, "product 3 height width"]:
        view = self._pixels[block]
        self._asked.discard(block)
        self._held.add(block)
        weakref.finalize(view, self._held.discard, block)  # the tensor's storage keeps the view
        return torch.from_numpy(view)


class IntoBlocks:
    """What a worker does with a request: the photos go into the block, where they are read; the rest is sent."""

    def __init__(self, reader: Reader, blocks: PhotoBlocks) -> None:
        self._reader, self._blocks = reader, blocks

    def __call__(self, request: Request) -> tuple[TupleBatch, list[Failed]]:
        if request.block is None:
            return self._reader.tuples(request)
        count, k = len(request.product), self._reader.pairs.hard_negatives
        negatives = self._blocks.batch // (1 + k) + request.start * k  # behind the tuples of all shares
        rows = [(request.start, count), (negatives, count * k)]
        own, beside = (self._blocks.rows(request.block, *place) for place in rows)
        return self._reader.tuples(request, (own, beside))
