"""Outputs of one frozen encoder over one table, read by dense id from parts that are mapped into memory."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmfusion.encoders import Encoded
from mmfusion.feature_cache.held import Held, looking
from mmfusion.feature_cache.identity import digest
from mmfusion.feature_cache.part import DamagedPartError, claimed, header_of, mapped, raw_dtype, typed

DESCRIPTION, COMPLETE = "description.json", "complete.json"


class Stored:
    """A complete folder. `flags` are text present, photo present, readable, of each product; None for queries.

    As long as it lives, `make_room` leaves the folder alone. Opened by `open_stored` or FeatureFolder.stored.
    """

    def __init__(self, folder: Path, held: Held, complete: Mapping[str, Any]) -> None:
        """Raises DamagedPartError or OSError where a part is not that of `complete.json` by its size and last bytes."""
        self.folder, self._held = folder, held
        self.rows: int = complete["rows"]
        self.bytes = (folder / COMPLETE).stat().st_size + (folder / DESCRIPTION).stat().st_size
        self._part: int = complete["part"]
        self._maps: list[dict[str, np.ndarray]] = []
        self.longest = 0  # tokens of the row that has most
        if (count := len(complete["parts"])) != -(-self.rows // self._part):
            raise DamagedPartError(f"{folder / COMPLETE}: {count} parts cannot be {self.rows} rows; delete it")
        for number, listed in enumerate(complete["parts"]):
            path = folder / part_name(number)
            about = header_of(path)[0]
            is_own = about["start"] == number * self._part and about["stop"] <= self.rows
            if not is_own or path.stat().st_size != listed["bytes"] or claimed(path) != listed["sha256"]:
                raise DamagedPartError(f"{path}: not what {COMPLETE} says; delete it")
            self._layout = about["layout"]
            self._maps.append(mapped(path))
            self.longest = max(self.longest, about["longest"])
            self.bytes += listed["bytes"]
        self.width: int = self._layout["width"]
        self.keeps_tokens: bool = self._layout["keep_tokens"]
        self.flags: Bool[Tensor, "row 3"] | None = None
        self.unread = 0  # products that could not be read when they were to be encoded
        if self._layout["flags"]:
            self.flags = typed(np.concatenate([part["flags"] for part in self._maps]), "bool")
            self.unread = int((~self.flags[:, 2]).sum())

    def __call__(self, ids: Int[Tensor, "row"]) -> Encoded:
        """The outputs of these rows, on the CPU, bit for bit as they were written; tokens padded to the longest here.

        Padding is zeros. Raises IndexError for an id out of range.
        """
        wanted = ids.cpu().numpy()
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < self.rows:
            raise IndexError(f"{self.folder}: asked for ids {wanted.min()} to {wanted.max()}, rows are {self.rows}")
        pooled = np.empty((len(wanted), self.width), self._maps[0]["pooled"].dtype)
        groups = list(self._by_part(wanted))
        for part, places, rows in groups:
            pooled[places] = part["pooled"][rows]
        tokens, mask = self._tokens(groups, len(wanted))
        return Encoded(typed(pooled, self._layout["dtype"]), tokens, mask)

    def _by_part(self, wanted: np.ndarray) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]]:
        """Of each part that is asked for: its sections, places in the batch, rows in the part, in the file's order."""
        order = wanted.argsort(kind="stable")
        number, row = np.divmod(wanted[order], self._part)
        for start, stop in pairwise(np.flatnonzero(np.diff(number, prepend=-1, append=-1))):
            yield self._maps[number[start]], order[start:stop], row[start:stop]

    def _tokens(
        self, groups: list[tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]], count: int
    ) -> tuple[Tensor, Tensor]:
        """Tokens of the batch, and which are real."""
        lengths = np.zeros(count, np.int64)
        if self.keeps_tokens:
            for part, places, rows in groups:
                lengths[places] = part["offsets"][rows + 1] - part["offsets"][rows]
        mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
        dtype, width = self._layout["token_dtype"], self._layout["token_width"]
        tokens = np.zeros((*mask.shape, width), raw_dtype(dtype))
        for part, places, rows in groups if mask.size else ():
            row, column = mask[places].nonzero()
            tokens[places[row], column] = part["tokens"][part["offsets"][rows[row]] + column]
        return typed(tokens, dtype), torch.from_numpy(mask)


def part_name(number: int) -> str:
    return f"{number:05}.part"


def open_stored(folder: Path, description: Mapping[str, Any]) -> Stored | None:
    """A complete folder, marked as used now; None where there is none, or not what `complete.json` says.

    None too for what another user keeps to himself, or what is being deleted. Makes nothing. Raises ValueError where
    the folder is of another description.
    """
    try:
        held = Held(folder, make=False)  # from here on no make_room takes it away
        if not (folder / COMPLETE).exists():
            return None
        require_description(folder, description)
        with looking(folder / DESCRIPTION):
            stored = Stored(folder, held, json.loads((folder / COMPLETE).read_bytes()))
    except (OSError, DamagedPartError, KeyError, TypeError, json.JSONDecodeError):
        return None
    with suppress(OSError):  # someone else's folder, or a mount that is only read
        os.utime(folder / COMPLETE)
    return stored


def require_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Raises ValueError unless the folder's description is this one, OSError where it cannot be read."""
    path = folder / DESCRIPTION
    try:
        same = digest(json.loads(path.read_bytes())) == digest(description)
    except json.JSONDecodeError:
        same = False
    if not same:
        raise ValueError(f"{path} is damaged, or of other features than those asked for: delete {folder}")
