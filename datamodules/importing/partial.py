"""A folder that is written aside and appears whole under its name. What a stopped import finished there is kept."""

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

LOCK = ".writing"
IMPORT = "import.json"
STAGING = "staging"  # tables and arrays that shards are made from
DONE = ".done.json"  # what the record of a finished shard is called behind its number


@contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """`<out>.partial`, locked while it is written; `publish` renames it. Afterwards it is gone, unless it holds
    finished shards: then these stay, for the next import of the same data to go on.

    Raises ValueError when another import writes it, or it is not ours.
    """
    folder = out.with_name(out.name + ".partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and not _is_ours(folder):
        raise ValueError(f"{folder} is in the way, and no import of ours left it there: move it or choose another OUT")
    folder.mkdir(exist_ok=True)
    with (folder / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another import is writing {folder}: wait for it or choose another OUT") from error
        shutil.rmtree(folder / STAGING, ignore_errors=True)
        try:
            yield folder
        except BaseException:
            if _holds(folder, lock):
                _leave(folder)
            raise
        if _holds(folder, lock):
            discard(folder)


def publish(folder: Path, out: Path) -> None:
    """Gives the finished folder its name. `out` is absent or an empty folder.

    Whenever it is stopped, another import of the same data ends with the same files.
    """
    shutil.rmtree(folder / STAGING)
    os.rename(folder, out)
    tidy(out)


def tidy(out: Path) -> None:
    """Removes from a published folder what only a partial one needs."""
    for path in [*out.glob(f"*{DONE}"), out / LOCK]:
        path.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Leaves nothing of a partial folder; what shows that it is ours goes last."""
    for path in folder.glob("*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK:
            with suppress(OSError):
                path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    marked = any((folder / name).is_file() for name in (LOCK, IMPORT))
    return folder.is_dir() and (marked or not any(folder.iterdir()))


def _holds(folder: Path, lock: IO[str]) -> bool:
    """Whether it is still the folder that we locked: once it is published, another import may begin one."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / LOCK))
    except FileNotFoundError:
        return False


def _leave(folder: Path) -> None:
    finished = len(list(folder.glob(f"*{DONE}")))
    if not finished:
        discard(folder)
        return
    shutil.rmtree(folder / STAGING, ignore_errors=True)
    print(f"stopped: {folder} keeps {finished} finished shards; the same command goes on with them", file=sys.stderr)
