"""What an import writes down about itself: a record per finished shard, and import.json about the whole."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datamodules.importing.partial import DONE, IMPORT
from datamodules.manifest import Shard

VERSION = 1  # of how shards are made from tables: raise it when their bytes change
LIBRARIES = ("pillow", "webdataset")  # that decide bytes


class Failed(NamedTuple):
    """A photo that is named but not stored. `row`: of the products table; `broken`: its bytes are no image; `web`: it
    is named by URL."""

    row: int
    reason: str
    transient: bool
    broken: bool
    web: bool


@dataclass(frozen=True)
class Done:
    """A finished shard: its entry in the manifest, its rows of index.parquet, and what its photos were.

    `signature`: of the photos' names, sizes and times; `sizes`: without the times.
    """

    number: int
    shard: Shard
    signature: str
    sizes: str
    offset: np.ndarray
    size: np.ndarray
    photo: np.ndarray
    failed: list[Failed]

    def write(self, folder: Path) -> None:
        columns = {name: getattr(self, name).tolist() for name in ("offset", "size", "photo")}
        record = {"shard": asdict(self.shard), "signature": self.signature, "sizes": self.sizes, "failed": self.failed}
        write_whole(_record(folder, self.number), json.dumps({**record, **columns}))

    @classmethod
    def read(cls, folder: Path, number: int) -> "Done | None":
        """None unless the shard was finished, and its record and its tar are whole."""
        if not _record(folder, number).is_file():
            return None
        try:
            record = json.loads(_record(folder, number).read_text(encoding="utf-8"))
            shard = Shard(**record["shard"])
            offset, size, photo = (np.array(record[name]) for name in ("offset", "size", "photo"))
            failed = [Failed(*failed) for failed in record["failed"]]
            signature, sizes = str(record["signature"]), str(record["sizes"])
        except (ValueError, TypeError, KeyError):  # cut short, by a machine that lost its power
            return None
        tar = folder / shard.name
        if not tar.is_file() or tar.stat().st_size != shard.bytes:
            return None
        return cls(number, shard, signature, sizes, offset, size, photo, failed)

    @staticmethod
    def forget(folder: Path, number: int) -> None:
        _record(folder, number).unlink(missing_ok=True)

    @property
    def record(self) -> str:
        """The name of the file."""
        return _record(Path(), self.number).name


def _record(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}{DONE}"


def import_record(decisive: Mapping[str, Any]) -> dict[str, Any]:
    """The content of import.json: all that decides the bytes of shards besides the photos, and its digest."""
    versions = {"import": str(VERSION), **{name: metadata.version(name) for name in LIBRARIES}}
    record = {**decisive, "versions": versions}
    canonical = json.dumps(record, sort_keys=True)
    return {**record, "fingerprint": hashlib.sha256(canonical.encode()).hexdigest()}


def read_record(folder: Path) -> dict[str, Any]:
    """import.json of a folder, {} without one."""
    path = folder / IMPORT
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def differences(record: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The names of what differs, as "seed, tables.products"."""
    ours, theirs = dict(_flat(record)), dict(_flat(other))
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return ", ".join(name for name in names if name not in ("fingerprint", "signature"))


def _flat(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found = []
    for name, value in record.items():
        nested = isinstance(value, dict) and name in ("tables", "versions", "photos")
        found += [(f"{name}.{key}", entry) for key, entry in value.items()] if nested else [(name, value)]
    return found


def write_whole(path: Path, content: str) -> None:
    """Replaces a file in one step."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(content, encoding="utf-8")
    os.replace(aside, path)
