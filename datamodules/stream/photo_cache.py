"""Decoded photos, kept in memory that the workers of a rank share."""

import mmap

import numpy as np
from jaxtyping import Bool, Int64, UInt8


class PhotoCache:
    """Decoded photos of the lowest dense ids, as many as fit into `mib`.

    The memory is shared with forked workers: what one has decoded, all have. Unpickled elsewhere it starts empty.
    """

    def __init__(self, products: int, size: tuple[int, int], mib: int) -> None:
        self._arguments = (products, size, mib)
        bytes_each = 3 * size[0] * size[1]
        self.rows = min(products, mib * 2**20 // bytes_each)
        pixels = np.frombuffer(mmap.mmap(-1, max(self.rows * bytes_each, 1)), np.uint8)  # takes memory when written
        self._pixels = pixels[: self.rows * bytes_each].reshape(self.rows, 3, *size)
        self._filled = np.frombuffer(mmap.mmap(-1, max(self.rows, 1)), np.uint8)

    def __reduce__(self) -> tuple[type["PhotoCache"], tuple[int, tuple[int, int], int]]:
        return PhotoCache, self._arguments

    def get(self, id: int) -> UInt8[np.ndarray, "3 height width"] | None:
        return self._pixels[id] if id < self.rows and self._filled[id] else None

    def holds(self, ids: Int64[np.ndarray, "product"]) -> Bool[np.ndarray, "product"]:
        return (ids < self.rows) & (self._filled[np.minimum(ids, len(self._filled) - 1)] == 1)

    def put(self, id: int, pixels: UInt8[np.ndarray, "3 height width"]) -> None:
        if id < self.rows:
            self._pixels[id] = pixels
            self._filled[id] = 1  # after the pixels: two workers may write the same photo, none reads half of it
