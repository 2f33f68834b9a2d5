"""Who has a feature folder open, and who writes which part: locks that the kernel frees when their holder dies."""

import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLAIM = ".building"  # behind the name of the file that is being written


class Held:
    """A shared lock on a folder, as long as this object lives: `taken` gives the folder to nobody meanwhile."""

    def __init__(self, folder: Path, make: bool) -> None:
        """Raises FileNotFoundError where there is no folder and none is to be made."""
        while True:
            if make:
                folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if _is_at(descriptor, folder):
                break
            os.close(descriptor)  # whoever deleted it held the lock that we waited for
        weakref.finalize(self, os.close, descriptor)


def taken(folder: Path) -> int | None:
    """A descriptor that holds the folder's only lock until it is closed; None where a process has the folder open."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _is_at(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False


class Claim:
    """The right to write one file, as long as nobody else has it: a lock beside the file, freed with its holder."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._close = path, weakref.finalize(self, os.close, descriptor)

    @classmethod
    def on(cls, path: Path) -> "Claim | None":
        """None where another one holds it. Whoever gets it looks first whether the file is there by now."""
        lock = path.with_name(path.name + CLAIM)
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return cls(lock, descriptor)

    def release(self) -> None:
        if self._close.alive:
            self._path.unlink(missing_ok=True)
            self._close()


@contextmanager
def looking(path: Path) -> Iterator[None]:
    """While nobody is `changing` what `path` stands for. Raises FileNotFoundError."""
    with _locked(path, fcntl.LOCK_SH):
        yield


@contextmanager
def changing(path: Path) -> Iterator[None]:
    """While nobody else is, nor is `looking`. Raises FileNotFoundError."""
    with _locked(path, fcntl.LOCK_EX):
        yield


@contextmanager
def _locked(path: Path, kind: int) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)
