"""Photos of a catalogue on disk: found by name in `images/` or `images.tar`, proved to be what training can decode."""

import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from datamodules.files import OpenFile
from datamodules.photos import FORMATS, decode_photo

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
Find = Callable[[str], bytes | None]  # content of the photo with a name, None where there is no such file


class Photo(NamedTuple):
    """The original bytes, and the file ending that belongs to them, whatever the file was called."""

    content: bytes
    ending: str


def checked(content: bytes, product_id: str) -> Photo:
    """Raises PhotoError unless the whole image decodes: half a download shows only then."""
    decode_photo(content, (1, 1), product_id)
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        name = (image.format or "").lower()
    return Photo(content, "jpg" if name in ("jpeg", "mpo") else name)


def photos_of(folder: Path) -> Find | None:
    """How to find the photos of a catalogue's folder; None when it has neither images/ nor images.tar."""
    loose, tar = folder / "images", folder / "images.tar"
    if loose.is_dir() and tar.is_file():
        raise ValueError(f"{folder} has images/ and images.tar; keep the one that counts")
    if tar.is_file():
        return TarPhotos(tar)
    return LoosePhotos(loose) if loose.is_dir() else None


class LoosePhotos:
    """Files below `images/`, named relative to it, with or without "images/" in front."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str) -> bytes | None:
        path = self.folder / _relative(name)
        return path.read_bytes() if path.is_file() else None


class TarPhotos:
    """Members of one uncompressed tar, read through an index of their places that is made once."""

    def __init__(self, path: Path) -> None:
        try:
            with tarfile.open(path, "r:") as tar:
                self._places = {_relative(m.name): (m.offset_data, m.size) for m in tar if m.isfile()}
        except tarfile.TarError as error:
            raise ValueError(f"{path} is no uncompressed tar, or it is damaged: {error}") from error
        self._file = OpenFile(path)

    def __call__(self, name: str) -> bytes | None:
        place = self._places.get(_relative(name))
        return None if place is None else self._file.read(size=place[1], offset=place[0])


def _relative(name: str) -> str:
    return name.removeprefix("./").removeprefix("images/")
