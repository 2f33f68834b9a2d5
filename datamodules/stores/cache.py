"""Files of an address on the local disk, shared by all processes of the machine: whole and checked, or not there.

A file is written in `<manifest>.parts/`, under a lock on that very part (the kernel frees it when its holder is
killed), and renamed into `<manifest>/` when its sha256 is right. A part that a killed process left is gone on with, and
checked as a whole like any other. Nothing is fsynced: a cache may be lost.
"""

import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

from datamodules.stores.transfer import ShardError, restart

GIB = 1 << 30
PARTS = ".parts"

_opening = threading.Lock()
_held: set[int] = set()  # descriptors that hold a lock, or wait for one


@dataclass(frozen=True)
class Kept:
    """What the manifest says of a file. `bytes` is None for tables; these are never given up."""

    sha256: str
    bytes: int | None


class Cache:
    """The cache of one manifest at one address, `root`/`key`; `files` maps names to what they must be.

    Of the shards of the address, those of older manifests included, the least recently used are deleted beyond
    `most_bytes` (None: all are kept); parts of what is being downloaded come on top. A process that has a deleted file
    open still reads it.
    """

    def __init__(self, root: Path, key: str, files: Mapping[str, Kept], most_bytes: int | None) -> None:
        """Raises ValueError when `most_bytes` has no room for the largest shard, or the folder cannot be written."""
        self.root, self.folder, self.files, self.most_bytes = root, root / key, files, most_bytes
        largest = max((file.bytes or 0 for file in files.values()), default=0)
        if most_bytes is not None and most_bytes < largest:
            raise ValueError(
                f"data.cache_gib is {most_bytes / GIB:.3g}, and one shard alone has {largest / GIB:.3g} GiB: "
                "give it room for several shards per rank and worker, or leave it out to keep all"
            )
        with self._writing(), self._room(0):
            pass

    def write(self, name: str, content: bytes) -> None:
        """Puts a file there whose content is known."""
        path = self.folder / name
        if path.is_file() and path.read_bytes() == content:
            return
        with self._writing(), self._part(name) as part:
            restart(part)
            part.write(content)
            part.flush()
            os.rename(self._parts / name, path)

    def has(self, name: str) -> bool:
        """Whether the file is there; if so, it now counts as used."""
        path, size = self.folder / name, self.files[name].bytes
        try:
            found = path.stat().st_size
            with suppress(OSError):  # someone else's cache, or a mount that is only read
                os.utime(path)
        except FileNotFoundError:
            return False
        return size in (None, found)

    def fitting(self, names: Sequence[str]) -> list[str]:
        """The first of the names, as far as the cache has room for them together; those that it does not know not."""
        known = [name for name in names if name in self.files]
        room = accumulate(self.files[name].bytes or 0 for name in known)
        return [name for name, most in zip(known, room, strict=True) if most <= (self.most_bytes or most)]

    def path(self, name: str, shown: str, copy: Callable[[BinaryIO], None]) -> Path:
        """The file; where it is not there, `copy` adds to a part of it what is missing.

        Of all processes and threads that ask for a file at once, one downloads it. Raises what `copy` raises, or
        ShardError ("checksum") when a second download is wrong as well; ValueError when the disk is full or forbidden.
        """
        if self.has(name):
            return self.folder / name
        with self._writing(), self._part(name) as part:
            if not self.has(name):  # nobody else fetched it while we waited
                self._complete(part, name, shown, copy)
        return self.folder / name

    def _complete(self, part: BinaryIO, name: str, shown: str, copy: Callable[[BinaryIO], None]) -> None:
        expected = self.files[name].sha256
        try:
            copy(part)
            if (found := _digest(part)) != expected:
                restart(part)
                copy(part)
                found = _digest(part)
            if found != expected:
                differs = f"has the sha256 {found[:12]}..., the manifest says {expected[:12]}... (downloaded twice)"
                raise ShardError("checksum", f"{shown}/{name} {differs}: copy the shards there again")
            with self._room(self.files[name].bytes or 0):
                os.rename(part.name, self.folder / name)
        except (OSError, ShardError) as error:
            if not (isinstance(error, ShardError) and error.reason == "unreachable"):  # which goes on another time
                Path(part.name).unlink(missing_ok=True)
            raise

    @property
    def _parts(self) -> Path:
        return self.folder.with_name(self.folder.name + PARTS)

    @contextmanager
    def _part(self, name: str) -> Iterator[BinaryIO]:
        """What there is of a file, its position at the end, locked against all other processes and threads."""
        path = self._parts / name
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._parts.mkdir(exist_ok=True)
            with _locked(path) as part:
                # Whoever had the lock before us may have renamed or deleted the file that we waited for.
                if _is_at(part, path):
                    part.seek(0, os.SEEK_END)
                    yield part
                    return

    @contextmanager
    def _room(self, size: int) -> Iterator[None]:
        """Deletes the least recently used files until `size` bytes more fit, which nobody else takes meanwhile."""
        if self.most_bytes is None:
            yield
            return
        self.root.mkdir(parents=True, exist_ok=True)
        with _locked(self.root / ".evicting"):
            used = sorted(self._shards(), key=lambda file: file[1].st_mtime_ns)
            total = size + sum(stat.st_size for _, stat in used)
            for path, stat in used:
                if total > self.most_bytes:
                    total -= stat.st_size if _deleted(path) else 0
            yield

    def _shards(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Files that may be deleted: shards, whatever other manifests left, and their parts."""
        for folder in self.root.iterdir():
            if not folder.is_dir() or folder == self._parts:
                continue
            for path in folder.iterdir():
                kept = Kept("", None) if path.name == "manifest.json" else self.files.get(path.name)
                if folder == self.folder and kept is not None and kept.bytes is None:
                    continue
                with suppress(FileNotFoundError):
                    yield path, path.stat()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            place = next(folder for folder in (self.root, *self.root.parents) if folder.exists())
            raise ValueError(
                f"the cache {self.root} cannot be written: {error.strerror} ({shutil.disk_usage(place).free / GIB:.1f} "
                "GiB are free): make room, bound it with data.cache_gib, or choose another folder with MMFUSION_CACHE"
            ) from error


def _digest(part: BinaryIO) -> str:
    part.seek(0)
    digest = hashlib.file_digest(part, "sha256").hexdigest()  # type: ignore[arg-type]
    part.seek(0, os.SEEK_END)
    return digest


def _deleted(path: Path) -> bool:
    """Deletes the file, or leaves it because it is a part that a process is writing."""
    if not path.parent.name.endswith(PARTS):
        path.unlink(missing_ok=True)
        return True
    with path.open("rb") as part, suppress(BlockingIOError):
        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    return False


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The file, made where it is absent, open for reading and appending, as the only one who has its lock."""
    with _opening:
        file = path.open("a+b")
        _held.add(file.fileno())
    descriptor = file.fileno()
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            with suppress(OSError):
                file.flush()
            _held.discard(descriptor)
            fcntl.flock(file, fcntl.LOCK_UN)


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _let_go() -> None:
    """A forked child shares the locks of its parent's threads: they would outlive a parent that is killed."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()
    _opening.release()


os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_let_go)
