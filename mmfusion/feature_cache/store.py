"""The folder of one frozen encoder's outputs over one table, while it is built: parts, each whole or absent."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmfusion.encoders import Encoded
from mmfusion.feature_cache.held import CLAIM, Claim, Held, changing
from mmfusion.feature_cache.identity import digest
from mmfusion.feature_cache.part import (
    PARTIAL,
    DamagedPartError,
    Replacing,
    checked,
    claimed,
    header_of,
    mapped,
    typed,
    write_part,
)
from mmfusion.feature_cache.room import GIB
from mmfusion.feature_cache.stored import COMPLETE, DESCRIPTION, Stored, open_stored, part_name, require_description

VERSION = 1  # of the files and of what encoders compute; belongs into every description
PART = 8192  # rows of a part
TOKEN_PART = 1024  # the same where tokens are kept: a part of 50 tokens 768 wide is 150 MiB in memory


class FeatureFolder:
    """The folder while it is built: `description.json`, parts `00000.part` ..., at last `complete.json`.

    Made where it does not exist yet. Any number of processes may write parts of one folder at once; each part is
    whole or absent. As long as this object, or the Stored it gave, lives, `make_room` of any process leaves the
    folder alone.

    Args:
        folder: see `folder_of`
        description: JSON-able; all that the outputs depend on. Raises ValueError where the folder's own differs
        rows: of the table, one for each dense id
        keep_tokens: keep the tokens too; without, the token axis of what is read is 0 long
        part: rows of a part; by default PART, with tokens TOKEN_PART
    """

    def __init__(
        self, folder: Path, description: Mapping[str, Any], rows: int, keep_tokens: bool, part: int | None = None
    ) -> None:
        self.folder, self.description, self.rows, self.keep_tokens = folder, description, rows, keep_tokens
        self.part = part or (TOKEN_PART if keep_tokens else PART)
        if rows < 1:
            raise ValueError(f"a feature cache of {rows} rows: a table has at least one")
        self._hashes: dict[range, str] = {}  # of the parts that this process wrote or has read whole
        self._layout: dict[str, Any] | None = None
        with self._writing():
            self.held = Held(folder, make=True)
            if not (folder / DESCRIPTION).exists():
                with Replacing(folder / DESCRIPTION) as file:
                    file.write(json.dumps(description, indent=1).encode())
            require_description(folder, description)

    def missing(self) -> list[range]:
        """The rows of each part that is not there yet, or damaged, in order.

        Reads every part whole once, to compare its hash; nothing where the folder is complete. Raises ValueError
        where the parts there are of another number of rows, of another size, or with tokens instead of without.
        """
        return [] if self.stored() else [rows for rows in self.parts() if not self._is_whole(rows)]

    def has(self, rows: range) -> bool:
        """Whether a part of these rows is there by now, whole: another process may have written it meanwhile."""
        return self._is_whole(rows)

    def write(self, rows: range, encoded: Encoded, flags: Bool[Tensor, "row 3"] | None = None) -> None:
        """Writes one part: `rows` is one of `missing()`, `encoded` its outputs, from any device, in whatever dtype.

        flags: text present, photo present, readable, of each product; of all parts or of none.
        Raises ValueError for other rows, another number of outputs, or another width or dtype than the parts there,
        and where the disk is full or forbidden.
        """
        if rows not in self.parts() or len(encoded.pooled) != len(rows):
            raise ValueError(
                f"{self.folder}: {len(encoded.pooled)} outputs for {rows}; a part has {self.part} rows, the last one "
                f"what is left of {self.rows}: write the ranges that missing() lists"
            )
        tensors = {"pooled": encoded.pooled}
        if self.keep_tokens:
            tensors |= _ragged(list(_real_tokens(encoded)))
        if flags is not None:
            tensors["flags"] = flags
        layout = self._layout_of(encoded, flags is not None)
        self._require(layout, f"the outputs for {rows}")
        with self._writing():
            self._write(rows, tensors, layout)

    def replace(
        self, rows: range, places: Int[Tensor, "some"], encoded: Encoded, flags: Bool[Tensor, "some 3"]
    ) -> None:
        """Puts outputs of products that could not be read before into the part of `rows`, which is there, at `places`.

        Whoever reads the folder goes on with what it opened. Raises ValueError as `write` does.
        """
        self._require(self._layout_of(encoded, flags=True), f"the outputs for {len(places)} of {rows}")
        with self._writing(), changing(self.folder / DESCRIPTION):
            _, sections, _ = header_of(self._path(rows))
            raw = mapped(self._path(rows))
            tensors = {name: typed(raw[name].copy(), sections[name]["dtype"]) for name in raw}
            tensors["pooled"][places] = encoded.pooled.cpu()
            tensors["flags"][places] = flags
            if self.keep_tokens:
                tokens = list(tensors["tokens"].split(tensors["offsets"].diff().tolist()))
                for place, own in zip(places.tolist(), _real_tokens(encoded), strict=True):
                    tokens[place] = own.cpu()
                tensors |= _ragged(tokens)
            assert self._layout is not None
            self._write(rows, tensors, self._layout)
            if (self.folder / COMPLETE).exists():
                self._list_parts()

    def claim(self, rows: range) -> Claim | None:
        """The right to write this part; None where another process is at it. See `has` once it is there."""
        with self._writing():
            return Claim.on(self._path(rows))

    def flags(self, rows: range) -> Bool[Tensor, "row 3"] | None:
        """Of a part that is there: text present, photo present, readable; None for queries."""
        with self._writing():
            raw = mapped(self._path(rows))
        return typed(raw["flags"].copy(), "bool") if "flags" in raw else None

    def there(self) -> list[range]:
        """The rows of each part that is there, whole, in order."""
        missing = set(self.missing())
        return [rows for rows in self.parts() if rows not in missing]

    def finish(self) -> Stored:
        """Verifies that every part is there, writes `complete.json`. Safe to be called by several processes.

        Raises ValueError that names what is missing.
        """
        if missing := self.missing():
            raise ValueError(f"{self.folder}: parts are missing, the first of {len(missing)} is {missing[0]}: build it")
        if stored := self.stored():
            return stored
        with self._writing(), changing(self.folder / DESCRIPTION):
            self._list_parts()
            for pattern in (f"*{PARTIAL}", f"*{CLAIM}"):  # of processes that were killed, or wrote the same as we
                for left in self.folder.glob(pattern):
                    left.unlink(missing_ok=True)
        stored = self.stored()
        assert stored is not None
        return stored

    def stored(self) -> Stored | None:
        """What can be read, once the folder is complete and all sizes are right; marks it as used now. Else None."""
        stored = open_stored(self.folder, self.description)
        if stored is not None and (stored.rows, stored.keeps_tokens) != (self.rows, self.keep_tokens):
            raise ValueError(
                f"{self.folder} holds {stored.rows} rows, tokens {stored.keeps_tokens}; expected {self.rows} and "
                f"{self.keep_tokens}: these belong into the description"
            )
        return stored

    def parts(self) -> Iterator[range]:
        """The rows of each part, in order."""
        return (range(i, min(i + self.part, self.rows)) for i in range(0, self.rows, self.part))

    def _path(self, rows: range) -> Path:
        return self.folder / part_name(rows.start // self.part)

    def _write(self, rows: range, tensors: Mapping[str, Tensor], layout: Mapping[str, Any]) -> None:
        longest = int(tensors["offsets"].diff().max()) if self.keep_tokens else 0
        about = {"start": rows.start, "stop": rows.stop, "longest": longest, "layout": layout}
        self._hashes[rows] = write_part(self._path(rows), about, tensors)

    def _list_parts(self) -> None:
        paths = [self._path(rows) for rows in self.parts()]
        parts = [{"bytes": path.stat().st_size, "sha256": claimed(path)} for path in paths]
        with Replacing(self.folder / COMPLETE) as file:
            file.write(json.dumps({"rows": self.rows, "part": self.part, "parts": parts}).encode())

    def _is_whole(self, rows: range) -> bool:
        """Reads a part to its end unless it is one that this process has read or written."""
        path = self._path(rows)
        try:
            if claimed(path) != self._hashes.get(rows):
                found = checked(path)
                about = header_of(path)[0]
                if (about["start"], about["stop"]) != (rows.start, rows.stop):
                    return False
                self._require(about["layout"], path.name)
                self._hashes[rows] = found
        except (FileNotFoundError, DamagedPartError):
            return False
        return True

    def _layout_of(self, encoded: Encoded, flags: bool) -> dict[str, Any]:
        """What all parts of a folder share."""
        return {
            "version": VERSION,
            "rows": self.rows,
            "part": self.part,
            "keep_tokens": self.keep_tokens,
            "width": encoded.pooled.shape[1],
            "dtype": str(encoded.pooled.dtype).removeprefix("torch."),
            "token_width": encoded.tokens.shape[2],
            "token_dtype": str(encoded.tokens.dtype).removeprefix("torch."),
            "flags": flags,
        }

    def _require(self, layout: dict[str, Any], what: str) -> None:
        """Raises ValueError unless a part is like the first one seen, and that one as this folder wants it."""
        wanted = {"version": VERSION, "rows": self.rows, "part": self.part, "keep_tokens": self.keep_tokens}
        expected = (self._layout or {}) | wanted
        if differs := {key: (layout.get(key), value) for key, value in expected.items() if layout.get(key) != value}:
            raise ValueError(
                f"{self.folder}: {what} differ from this folder's parts in (received, expected): {differs}; what "
                "outputs depend on belongs into the description. Delete the folder, or give it another description"
            )
        self._layout = layout

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            place = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
            raise ValueError(
                f"the feature cache {self.folder} cannot be written: {error.strerror} "
                f"({shutil.disk_usage(place).free / GIB:.1f} GiB are free): make room, choose another folder with "
                "model.cache.folder, or do without with model.cache.use=off"
            ) from error


def _real_tokens(encoded: Encoded) -> Iterator[Tensor]:
    """Of each row, what is not padding."""
    return (row[real] for row, real in zip(encoded.tokens, encoded.mask, strict=True))


def _ragged(tokens: list[Tensor]) -> dict[str, Tensor]:
    """The tokens of all rows after one another, and where each row's begin and end."""
    ends = torch.tensor([0, *(len(row) for row in tokens)]).cumsum(0)
    return {"tokens": torch.cat(tokens), "offsets": ends}


def folder_of(root: Path, description: Mapping[str, Any]) -> Path:
    """Where outputs of this description lie: `<root>/<first 32 digits of its digest>`."""
    return root / digest(description)[:32]


def bytes_needed(
    rows: int, width: int, dtype_size: int, tokens_per_row: float = 0, token_width: int | None = None
) -> int:
    """Bytes that a folder will take, to a thousandth: tokens as wide as the pooled vector unless `token_width` differs.

    tokens_per_row: real tokens of a row, on average; 0 where tokens are not kept
    """
    values = width + tokens_per_row * (token_width or width)
    marks = 3 + (8 if tokens_per_row else 0)  # flags, and the place of the first token
    files = math.ceil(rows / (TOKEN_PART if tokens_per_row else PART)) + 2
    return math.ceil(rows * (values * dtype_size + marks)) + files * 1024
