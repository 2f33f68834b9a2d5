"""Vectors in a .npy file: written batch by batch, read in pieces, so that a corpus may be larger than memory."""

import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

DTYPES = {"float16": torch.float16, "float32": torch.float32}


class VectorWriter:
    """Writes vectors to a .npy file, batch by batch.

    The file has its name only once it is whole: until `close` it lies beside, as `<name>.part`.
    """

    def __init__(self, path: Path, dtype: Literal["float16", "float32"] = "float32") -> None:
        self.path, self.dtype = path, dtype
        self.rows, self.dim = 0, 0
        self._part = path.with_name(f"{path.name}.part")
        self._file = self._part.open("wb")

    def add(self, batch: Float[Tensor, "row dim"]) -> None:
        """Raises ValueError on a batch of another width than those before and on values that the type cannot hold."""
        values = batch.detach().to("cpu", DTYPES[self.dtype]).contiguous().numpy()
        if not self.dim:
            self.dim = values.shape[1]
            _write_header(self._file, (0, self.dim), self.dtype)
        if values.shape[1] != self.dim:
            raise ValueError(f"row {self.rows} on holds vectors of width {values.shape[1]}; before, it was {self.dim}")
        if not np.isfinite(values).all():
            raise ValueError(f"row {self.rows} on holds values that are NaN, infinite or too large for {self.dtype}")
        self._file.write(values.data)
        self.rows += len(values)

    def close(self) -> "VectorFile":
        """Raises ValueError when nothing was added."""
        if not self.dim:
            raise ValueError("there are no vectors to write: expected one batch at least")
        self._file.seek(0)
        _write_header(self._file, (self.rows, self.dim), self.dtype)
        self._file.close()
        self._part.replace(self.path)
        return VectorFile(self.path)

    def discard(self) -> None:
        """Removes what was not closed."""
        self._file.close()
        self._part.unlink(missing_ok=True)


def write_vectors(
    path: Path, batches: Iterable[Float[Tensor, "_ _"]], dtype: Literal["float16", "float32"] = "float32"
) -> "VectorFile":
    """Writes the rows of all batches to a .npy file at `path`; when that fails, no file is left.

    Raises ValueError on no batch at all, on batches of different width and on values that `dtype` cannot hold.
    """
    writer = VectorWriter(path, dtype)
    try:
        for batch in batches:
            writer.add(batch)
        return writer.close()
    finally:
        writer.discard()


def _write_header(file: BinaryIO, shape: tuple[int, int], dtype: str) -> None:
    """numpy pads headers so that the first axis can grow: those of 0 and of all rows are equally long."""
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})


class ReadVectors(ABC):
    """Vectors of which a piece exists once it is read: `vectors[10:20]` and `vectors[rows]` are tensors on `device`."""

    device: torch.device
    shape: torch.Size

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def __getitem__(self, rows: slice | Int[Tensor, "row"]) -> Float[Tensor, "row dim"]:
        """A tensor names the rows one by one, in any order."""


class VectorFile(ReadVectors):
    """The vectors of a .npy file, memory-mapped: `file[10:20]` and `file[rows]` are copies, as CPU tensors.

    Mapped pages count as this process's memory for as long as they are mapped, so each piece gives back its own: no
    more than a piece is ever resident (what the system caches beyond that, it frees when memory is needed).
    """

    device = torch.device("cpu")

    def __init__(self, path: Path) -> None:
        """Raises FileNotFoundError where there is no file, ValueError where it does not hold rows of floats."""
        if not path.is_file():
            raise FileNotFoundError(f"no file of vectors at {path}; write_vectors makes one")
        with path.open("rb") as file:
            shape, dtype = _read_header(file, path)
            start = file.tell()
            if start + (size := int(np.prod(shape)) * dtype.itemsize) != path.stat().st_size:
                raise ValueError(f"{path} has {path.stat().st_size} bytes, {shape} of {dtype} take {start + size}")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._rows = np.frombuffer(self._map, dtype, offset=start).reshape(shape)
        self.shape = torch.Size(shape)

    def __getitem__(self, rows: slice | Int[Tensor, "row"]) -> Float[Tensor, "row dim"]:
        """Copies of the rows; a tensor names them one by one, in any order."""
        wanted = rows if isinstance(rows, slice) else rows.numpy()
        # Around a row that is read by itself, nothing should be read ahead.
        self._map.madvise(mmap.MADV_SEQUENTIAL if isinstance(rows, slice) else mmap.MADV_RANDOM)
        part = torch.from_numpy(np.array(self._rows[wanted]))
        self._map.madvise(mmap.MADV_DONTNEED)
        return part


def _read_header(file: BinaryIO, path: Path) -> tuple[tuple[int, ...], np.dtype]:
    try:
        assert np.lib.format.read_magic(file) == (1, 0)
        shape, columns_first, dtype = np.lib.format.read_array_header_1_0(file)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"{path} is not a .npy file of vectors; write_vectors makes one") from error
    if len(shape) != 2 or columns_first or dtype.name not in DTYPES:
        order = ", columns first" if columns_first else ""
        raise ValueError(f"{path} holds {shape} of {dtype}{order}; expected rows of {' or '.join(DTYPES)}")
    return shape, dtype
