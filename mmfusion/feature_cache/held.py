"""Who has a feature folder open: a lock that the kernel frees when its holder dies."""

import fcntl
import os
import weakref
from pathlib import Path


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
