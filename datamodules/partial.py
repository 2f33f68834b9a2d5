"""A folder that is written aside and appears whole under its name, or not at all."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".writing"


@contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """`<out>.partial`, locked while it is written and gone afterwards; `publish` renames it before that.

    What a killed import left there is deleted. Raises ValueError when another import writes it, or it is not ours.
    """
    folder = out.with_name(out.name + ".partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        _reclaim(folder)
    folder.mkdir()
    try:
        with (folder / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, out: Path) -> None:
    """Gives the finished folder its name. `out` is absent or an empty folder."""
    (folder / LOCK).unlink()
    os.rename(folder, out)


def _reclaim(folder: Path) -> None:
    if not (folder / LOCK).is_file():
        raise ValueError(f"{folder} is in the way, and no import of ours left it there: move it or choose another OUT")
    with (folder / LOCK).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another import is writing {folder}: wait for it or choose another OUT") from error
    shutil.rmtree(folder)
