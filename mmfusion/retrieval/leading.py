"""The leading dimensions of vectors, as vectors of their own (Matryoshka, Kusupati 2022, arXiv 2205.13147)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmfusion.retrieval.topk import exact_dot
from mmfusion.retrieval.vectors import ReadVectors

SMALLEST = 1e-12  # length of a vector that is not divided by it; zero stays zero
ROWS = 16_384  # whose lengths are computed at a time


class Leading(ReadVectors):
    """The first `dim` coordinates of vectors, at unit length again, computed as they are read: nothing is held twice.

    A vector is the same to the bit whichever others it is read with.
    """

    def __init__(self, vectors: Float[Tensor, "row width"] | ReadVectors, dim: int) -> None:
        assert 0 < dim <= vectors.shape[1]
        self.vectors, self.dim = vectors, dim
        self.device, self.shape = vectors.device, torch.Size([len(vectors), dim])

    def __getitem__(self, rows: slice | Int[Tensor, "row"]) -> Float[Tensor, "row dim"]:
        leading = self.vectors[rows][:, : self.dim].float()
        lengths = [exact_dot(part, part).sqrt() for part in leading.split(ROWS)]
        return leading / torch.cat(lengths).clamp(min=SMALLEST)[:, None]


def leading(vectors: Float[Tensor, "row width"] | ReadVectors, dim: int | None) -> Float[Tensor, "row _"] | ReadVectors:
    """The vectors, or the first `dim` coordinates of each."""
    return vectors if dim is None else Leading(vectors, dim)
