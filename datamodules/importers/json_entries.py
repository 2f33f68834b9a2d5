"""A JSON object larger than memory, one entry after the other.

ijson would do but for NaN, which Python's json.dump writes for a product without a title, and which is no JSON.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

CHUNK = 1 << 20  # characters read at once
LONGEST = 64 << 20  # characters of one entry; more is a file of another kind
SPACE = " \t\n\r"
decode = json.JSONDecoder().raw_decode


def json_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """The (key, value) pairs of the object at the top. Raises ValueError naming the file, and the entry before."""
    with path.open(encoding="utf-8") as file:
        try:
            yield from _entries(path, _Buffer(file))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8: {error}") from error


class _Buffer:
    """The part of the file that is not consumed yet."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.at, self.whole = file, "", 0, False

    def grow(self) -> None:
        more = self.file.read(max(CHUNK, len(self.text) - self.at))
        self.text, self.at, self.whole = self.text[self.at :] + more, 0, not more

    def skip(self, position: int) -> int:
        """The first character that is no space. Raises IndexError at the end of what is read."""
        while self.text[position] in SPACE:
            position += 1
        return position


def _entries(path: Path, buffer: _Buffer) -> Iterator[tuple[str, Any]]:
    opening, last = "{", "the start"
    while True:
        try:
            position = buffer.skip(buffer.at)
            if buffer.text[position] == "}" and opening == ",":
                return _check_end(path, buffer, position)
            if buffer.text[position] != opening:
                raise ValueError(f"{path}: expected {opening!r} after {last}, found {buffer.text[position]!r}")
            start = buffer.skip(position + 1)
            if buffer.text[start] == "}":  # an empty object, or a comma too many
                return _check_end(path, buffer, start)
            key, value, end = _entry(buffer, start)
        except (IndexError, json.JSONDecodeError) as error:
            if buffer.whole or len(buffer.text) - buffer.at > LONGEST:
                raise ValueError(f"{path} is no JSON object or cut short, after {last}: {error}") from error
            buffer.grow()
            continue
        if not isinstance(key, str):
            raise ValueError(f"{path}: the key after {last} is {key!r}; expected a string")
        yield key, value
        buffer.at, opening, last = end, ",", f"the entry {key!r}"


def _check_end(path: Path, buffer: _Buffer, closing: int) -> None:
    """Raises ValueError unless nothing but space follows: a file that was written twice, or cut and gone on with."""
    buffer.at = closing + 1
    while not buffer.whole:
        if rest := buffer.text[buffer.at :].strip(SPACE):
            raise ValueError(f"{path} goes on behind the end of its object: {rest[:40]!r}")
        buffer.at = len(buffer.text)
        buffer.grow()


def _entry(buffer: _Buffer, start: int) -> tuple[Any, Any, int]:
    """Key, value, and where they end. Raises IndexError or JSONDecodeError when more must be read, or it is no JSON."""
    key, end = decode(buffer.text, start)
    colon = buffer.skip(end)
    if buffer.text[colon] != ":":
        raise json.JSONDecodeError("expected ':'", buffer.text, colon)
    value, end = decode(buffer.text, buffer.skip(colon + 1))
    if buffer.text[buffer.skip(end)] not in ",}":  # "1." may be the first half of 1.5
        raise json.JSONDecodeError("expected ',' or '}'", buffer.text, end)
    return key, value, end
