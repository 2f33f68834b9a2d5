"""Bytes of a sample's place in a tar -> its members and what they say. Whatever is wrong with them is a ShardError.

Headers are parsed here, as TarInfo.frombuf takes 18 us for one, three times what the JSON of a sample takes. Names of
members are compared and never used as paths; nothing but JSON is parsed, and photos are left to photos.decode.
"""

import json
import re
import struct
import zlib
from typing import Any, NamedTuple, NoReturn

import numpy as np

from datamodules.photos.decode import FORMATS, Content
from datamodules.stores.transfer import ShardError

BLOCK = 512
HEADER = struct.Struct("100s24x12s12x8sc")  # name, size, checksum, kind
CHECKSUM = slice(148, 156)
FILE, EXTRA = b"0", b"x"  # a file, and PAX's extra header before one whose name has more than 100 characters
LONG_NAME = re.compile(rb"^\d+ path=([^\n]*)\n", re.MULTILINE)
RECORD = b".json"
ENDINGS = {b"jpg"} | {name.lower().encode() for name in FORMATS}
NUMBERS, INFINITE = {int, float, type(None)}, float("inf")


class Sample(NamedTuple):
    """One product. `judgments` holds its train judgments: "query" (dense int64 ids, ascending) and, per label column,
    float64 gains, NaN where the pair is not judged in that column. `photo` is a view of all that was read."""

    product_id: str
    id: int
    texts: dict[str, str]
    photo: Content | None
    judgments: dict[str, np.ndarray]


class Member(NamedTuple):
    """A file of a tar: its bytes are content[start:end]."""

    name: bytes
    start: int
    end: int


def find_record(content: bytes, size: int) -> Member | None:
    """The JSON at the start of a sample of `size` bytes; None where `content`, its first bytes, ends before it does.

    Raises ShardError("wrong member"), as `find_photo`.
    """
    found = _find(content, 0, size)
    if found is not None and not found.name.endswith(RECORD):
        raise ShardError("wrong member", f"begins with {found.name!r}, not with its JSON")
    return found


def find_photo(content: bytes, record: Member) -> Member:
    """The photo behind the JSON of a sample that `content` holds whole."""
    found = _find(content, _after(record.end), len(content))
    assert found is not None, "only a part of a sample ends before its members do"
    key, _, ending = found.name.rpartition(b".")
    if ending not in ENDINGS or key + RECORD != record.name:
        raise ShardError("wrong member", f"{found.name!r} follows on {record.name!r}, not its photo")
    return found


def _find(content: bytes, start: int, size: int) -> Member | None:
    long_name = None
    while start + BLOCK <= len(content):
        name, kind, length = _header(content, start)
        start += BLOCK
        end = start + length
        if end > size:
            raise ShardError("wrong member", f"{name!r} of {length:,} bytes is larger than its place")
        if end > len(content):
            return None
        if kind == FILE:
            return Member(long_name or name, start, end)
        named = LONG_NAME.search(content[start:end])
        long_name, start = (named[1] if named else long_name), _after(end)
    if len(content) < size:
        return None
    raise ShardError("wrong member", "ends before its next member")


def _header(content: bytes, start: int) -> tuple[bytes, bytes, int]:
    """Name, kind and size of a member."""
    name, size, checksum, kind = HEADER.unpack_from(content, start)
    # The lower half of adler32 is the sum of the bytes modulo 65,521; in the sum, the checksum itself counts as spaces.
    total = zlib.adler32(content[start : start + BLOCK], 0) & 0xFFFF
    if (total - sum(checksum) + 8 * ord(" ") - _octal(checksum)) % 65_521:
        raise ShardError("wrong member", "its header does not have the checksum that it names")
    name = name.rstrip(b"\0")
    if kind not in (FILE, EXTRA):
        raise ShardError("wrong member", f"{name!r} is no file (kind {kind!r})")
    return name, kind, _octal(size)


def _octal(field: bytes) -> int:
    digits = field.rstrip(b"\0 ")
    try:
        if digits.isdigit():  # int() alone would take a sign, spaces and underscores
            return int(digits, 8)
    except ValueError:  # 8 or 9
        pass
    raise ShardError("wrong member", f"its header has {field!r} where an octal number belongs")


def _after(end: int) -> int:
    """Where the next header begins."""
    return -(-end // BLOCK) * BLOCK


def parse_sample(record: bytes, photo: Content | None) -> Sample:
    """A sample from the bytes of its JSON and its photo. Raises ShardError("invalid JSON")."""
    try:
        content = _decode(record.decode())
        product_id, id, texts = content["product_id"], content["id"], content["texts"]
        if type(product_id) is not str or type(id) is not int:
            raise ValueError("product_id is no text, or id no integer")
        "".join(texts.values()).encode()  # which half a surrogate pair, that no tokenizer takes, is not
        return Sample(product_id, id, texts, photo, _judgments(content["judgments"]))
    except KeyError as error:
        raise ShardError("invalid JSON", f"its JSON has no {error}") from error
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ShardError("invalid JSON", f"its JSON is not that of a sample ({error})") from error


def _judgments(columns: Any) -> dict[str, np.ndarray]:
    query = columns["query"]
    if (
        not set(map(type, query)) <= {int}
        or sorted(set(query)) != query
        or (query and not 0 <= query[0] < 2**63 > query[-1])
    ):
        raise ValueError("judgments of queries that are not ascending ids")
    judgments = {"query": np.array(query, dtype=np.int64)}
    for name, values in columns.items():
        if values is query:
            continue
        if type(values) is not list or len(values) != len(query):
            raise ValueError(f"{name} does not say one thing of each judged query")
        if not set(map(type, values)) <= NUMBERS or INFINITE in values or -INFINITE in values:
            raise ValueError(f"{name} has a gain that is no finite number")
        judgments[name] = np.array(values, dtype=np.float64)
    return judgments


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


_decode = json.JSONDecoder(parse_constant=_refuse).decode
