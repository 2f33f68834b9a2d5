"""A folder that is written aside and appears whole under its name. What a stopped import finished there is kept."""

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".writing"
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
    if folder.exists() and not (folder / LOCK).is_file():
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
            _leave(folder)
            raise
        discard(folder)


def publish(folder: Path, out: Path) -> None:
    """Gives the finished folder its name. `out` is absent or an empty folder."""
    for path in [folder / LOCK, *folder.glob(f"*{DONE}")]:
        path.unlink()
    shutil.rmtree(folder / STAGING)
    os.rename(folder, out)


def discard(folder: Path) -> None:
    """Leaves nothing of a partial folder."""
    shutil.rmtree(folder, ignore_errors=True)


def _leave(folder: Path) -> None:
    finished = len(list(folder.glob(f"*{DONE}")))
    if not finished:
        discard(folder)
        return
    shutil.rmtree(folder / STAGING, ignore_errors=True)
    print(f"stopped: {folder} keeps {finished} finished shards; the same command goes on with them", file=sys.stderr)
