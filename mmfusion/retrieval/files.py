"""Files that are replaced whole."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path beside `path`: what is written there takes its place in the end, and after an error nothing is left of it.

    A reader sees the old file or the new one, whole. Folders above are made. Raises ValueError where `file_path` does.
    """
    file_path(path).parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def file_path(path: Path) -> Path:
    """The path of a file to be written, as it is. Raises ValueError where a folder has that name."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected the name of a file, such as {path / 'page.html'}")
    return path
