"""Shards made wrong on purpose: samples overwritten in their place, with headers whose checksums are right."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.manifest import Manifest
from datamodules.shards import Shards
from datamodules.stores.store import LocalStore, ShardError
from datamodules.stream.members import BLOCK, find_photo, find_record
from tests.datamodules.drawn import Tables


def copied(tables: Tables, folder: Path) -> Path:
    return Path(shutil.copytree(tables.path, folder / "damaged"))


def tar_of(path: Path, id: int) -> Path:
    shards = Shards.open(path)
    return path / shards.manifest.shards[shards.index.shard[id]].name


def content_of(path: Path, id: int) -> bytes:
    """The sample's bytes in its tar."""
    index = Shards.open(path).index
    return tar_of(path, id).read_bytes()[index.offset[id] : index.offset[id] + index.size[id]]


def overwrite(path: Path, id: int, content: bytes) -> None:
    """Puts `content` where the sample lies; what it leaves of the place is zeros."""
    index = Shards.open(path).index
    assert len(content) <= index.size[id]
    with tar_of(path, id).open("r+b") as file:
        file.seek(index.offset[id])
        file.write(content.ljust(index.size[id], b"\0"))


def parts_of(content: bytes) -> tuple[str, bytes, bytes]:
    """Key, JSON and photo of a sample that has one."""
    record = find_record(content, len(content))
    assert record is not None
    photo = find_photo(content, record)
    return (
        record.name.removesuffix(b".json").decode(),
        content[record.start : record.end],
        content[photo.start : photo.end],
    )


def header(name: str, size: int, kind: bytes = b"0", size_field: bytes | None = None) -> bytes:
    field = b"%011o\0" % size if size_field is None else size_field
    start = name.encode().ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field + b"%011o\0" % 0
    whole = (start + b" " * 8 + kind).ljust(BLOCK, b"\0")
    return whole[:148] + b"%06o\0 " % sum(whole) + whole[156:]


def member(name: str, content: bytes, **options: Any) -> bytes:
    return header(name, len(content), **options) + content.ljust(-(-len(content) // BLOCK) * BLOCK, b"\0")


def sample(key: str, record: bytes, photo: bytes, ending: str = "png") -> bytes:
    return member(f"{key}.json", record) + member(f"{key}.{ending}", photo)


def changed(record: bytes, **entries: Any) -> bytes:
    """The JSON with other entries, padded to as many blocks as before where it is shorter."""
    content = json.dumps({**json.loads(record), **entries}, separators=(",", ":")).encode()
    return content.ljust(len(record))


class Elsewhere:
    """A store that is no local folder, though its files are: notes what is fetched, and lacks what it is told to."""

    def __init__(self, folder: Path, lacks: Sequence[str] = ()) -> None:
        local = LocalStore(folder)
        self.address, self.folder, self.lacks = f"elsewhere://{folder.name}", folder, set(lacks)
        self.manifest: Manifest = local.manifest
        self.fetched: list[list[str]] = []
        self.asked: list[str] = []

    def path(self, name: str) -> Path:
        self.asked.append(name)
        if name in self.lacks:
            raise ShardError("unreachable", f"{self.address}/{name} cannot be reached")
        return self.folder / name

    def fetch(self, names: Sequence[str]) -> None:
        self.fetched.append(list(names))
