"""One file of tensors that says itself whether it is whole: header, sections of raw bytes, sha256 of all before it.

The header is JSON behind its length (8 bytes, little-endian): `about`, and of each section the dtype, shape and place.
"""

import hashlib
import json
import math
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAGIC = b"mmfpart1"
ALIGNED = 64  # bytes: where a section may start
SHA256 = 32  # bytes
LONGEST_HEADER = 1 << 20
RAW = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}  # by bytes of a value: numpy knows no bfloat16
PARTIAL = ".partial"


class DamagedPartError(ValueError):
    """A part that is cut short or otherwise not what was written."""


def write_part(path: Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Writes the file, whole or not at all; returns its sha256 in hex."""
    arrays = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sections, at = {}, 0
    for name, array in arrays.items():
        dtype = str(array.dtype).removeprefix("torch.")
        sections[name] = {"dtype": dtype, "shape": list(array.shape), "at": at}
        at = _aligned(at + array.numel() * array.element_size())
    header = json.dumps({"about": dict(about), "sections": sections}).encode()
    header += b" " * (_aligned(len(header) + 16) - len(header) - 16)
    pieces: list[bytes | memoryview] = [MAGIC, len(header).to_bytes(8, "little"), header]
    for array in arrays.values():
        body = raw_bytes(array)
        pieces += [body, bytes(_aligned(len(body)) - len(body))]
    digest = hashlib.sha256()
    with Replacing(path) as file:
        for piece in pieces:
            digest.update(piece)
            file.write(piece)
        file.write(digest.digest())
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor on whatever device, in the order of its dimensions, whatever its memory format."""
    values: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)


def checked(path: Path) -> str:
    """The sha256 of a whole file, which is read to its end; raises DamagedPartError, or FileNotFoundError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size - SHA256
        while left > 0 and (piece := file.read(min(left, 1 << 20))):
            digest.update(piece)
            left -= len(piece)
        if left or file.read() != digest.digest():
            raise DamagedPartError(f"{path}: damaged, or not written to its end; delete it")
    return digest.hexdigest()


def claimed(path: Path) -> str:
    """The sha256 that the file ends with, not compared with what it holds."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - SHA256))
        return file.read().hex()


def header_of(path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """What the file is about, its sections and where the first one starts; raises DamagedPartError."""
    with path.open("rb") as file:
        magic, length = file.read(8), int.from_bytes(file.read(8), "little")
        content = file.read(length) if magic == MAGIC and length <= LONGEST_HEADER else b""
    try:
        header = json.loads(content)
        return header["about"], header["sections"], 16 + length
    except (ValueError, KeyError, TypeError):
        raise DamagedPartError(f"{path}: no part of a feature cache, or damaged; delete it") from None


def mapped(path: Path) -> dict[str, np.ndarray]:
    """Each section as read-only raw values of its dtype's size, mapped into memory; see `typed`."""
    _, sections, start = header_of(path)
    whole = np.asarray(np.memmap(path, mode="r"))
    found = {}
    for name, section in sections.items():
        raw, at = raw_dtype(section["dtype"]), start + section["at"]
        found[name] = whole[at : at + math.prod(section["shape"]) * raw.itemsize].view(raw).reshape(section["shape"])
    return found


def raw_dtype(dtype: str) -> np.dtype:
    return np.dtype(RAW[getattr(torch, dtype).itemsize])


def typed(raw: np.ndarray, dtype: str) -> Tensor:
    """Raw values that are nobody else's, as a tensor."""
    return torch.from_numpy(raw).view(getattr(torch, dtype))


class Replacing:
    """A file that takes its name when it is whole and on the disk; until then, and after an error, nothing is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")

    def __enter__(self) -> Any:
        self.file = self.partial.open("xb")
        return self.file

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with self.file:
                if kind is None:
                    self.file.flush()
                    os.fsync(self.file.fileno())
            if kind is None:
                self.partial.rename(self.path)
        except FileNotFoundError:
            if not self.path.exists():  # else another process wrote the same and swept up
                raise
        finally:
            with suppress(OSError):
                self.partial.unlink(missing_ok=True)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
