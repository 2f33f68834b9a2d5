"""Photos by the names that a data set gives them: a file below a folder, a member of a tar, or a URL; and as stored."""

import io
import os
import re
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol, runtime_checkable

from PIL import Image

from datamodules.photos.decode import FORMATS, PhotoError, decode_photo, thumbnail
from datamodules.photos.download import Downloads
from datamodules.photos.options import ABSENT, TOO_LARGE, Failure, PhotoOptions
from datamodules.photos.tar import TarPhotos

# An address rather than a file's name, which may have a colon in it as well.
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|data:|file:", re.IGNORECASE)


class Photo(NamedTuple):
    """The bytes that are stored, and the file ending that belongs to them, whatever the file was called."""

    content: bytes
    ending: str


@runtime_checkable
class Photos(Protocol):
    """How the names in the column `image` become bytes. Can be sent to other processes."""

    def get(self, names: Sequence[str]) -> list[bytes | Failure]:
        """In the order of `names`, none of which is blank. Raises ValueError for a name that leaves the folder."""

    def signature(self, names: Sequence[str], times: bool = True) -> str:
        """Changes when what `get` returns may: by size and time of the files; URLs count by their names alone.

        Without `times` by the sizes alone, so that it is the same for a copy.
        """

    def newest(self, names: Sequence[str]) -> int:
        """When the last of the files changed, nanoseconds since 1970; 0 without files."""

    def place(self, name: str) -> str:
        """Where a file of this name is looked for."""


def photos_of(folder: Path, options: PhotoOptions) -> Photos | None:
    """Photos of a folder that has `images/` or `images.tar`, named with or without "images/" in front; else None.

    Names that are URLs are downloaded. Raises ValueError when it has both, or a tar that cannot be read.
    """
    loose, tar = folder / "images", folder / "images.tar"
    if loose.is_dir() and tar.is_file():
        raise ValueError(f"{folder} has images/ and images.tar; keep the one that counts")
    if tar.is_file():
        return NamedPhotos(TarPhotos(tar), options, "images/")
    return NamedPhotos(LoosePhotos(loose), options, "images/") if loose.is_dir() else None


def web_photos(options: PhotoOptions, folder: Path | None = None) -> Photos:
    """Photos by URL; other names are files below `folder` itself, or missing without one."""
    return NamedPhotos(LoosePhotos(folder) if folder else None, options)


def prepared(content: bytes, product_id: str, max_side: int | None, quality: int) -> Photo:
    """The photo as it is stored: its own bytes, or where it is larger a JPEG whose longer side is `max_side` pixels.

    That JPEG is upright, on white and without metadata; the same bytes give the same JPEG. Raises PhotoError unless the
    whole image decodes: half a download shows only then.
    """
    ending, side = _header(content, product_id)
    if max_side is not None and side > max_side:
        return Photo(thumbnail(content, max_side, product_id, quality), "jpg")
    decode_photo(content, (1, 1), product_id)
    return Photo(content, ending)


def _header(content: bytes, product_id: str) -> tuple[str, int]:
    """File ending and longer side."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            name = (image.format or "").lower()
            return "jpg" if name in ("jpeg", "mpo") else name, max(image.size)
    except Exception as error:
        decode_photo(content, (1, 1), product_id)  # mostly says what is wrong, as a PhotoError
        # a JPEG whose header only the fast decoder forgives
        raise PhotoError("damaged", product_id, f"{type(error).__name__}: {error}") from error


@runtime_checkable
class Files(Protocol):
    """Where photos lie that are no URLs; names are relative to it, as `_relative` gives them."""

    def read(self, name: str, most: int) -> bytes | Failure:
        """At most so many bytes: a larger file is a Failure and not read."""

    def stamp(self, name: str) -> tuple[int, int] | None:
        """Size and time of change, nanoseconds; None for a file that is not there."""

    def place(self, name: str) -> str: ...


class NamedPhotos:
    """Photos in `files` and on the web. `prefix` may stand in front of a file's name."""

    def __init__(self, files: Files | None, options: PhotoOptions, prefix: str = "") -> None:
        self._files, self._web, self._prefix = files, Downloads(options), prefix
        self._most = int(options.max_mib * 2**20)

    def get(self, names: Sequence[str]) -> list[bytes | Failure]:
        paths = self._paths(names)
        urls = [name for name in names if name not in paths]
        downloaded = dict(zip(urls, self._web.get(urls), strict=True))
        return [self._read(paths[name]) if name in paths else downloaded[name] for name in names]

    def signature(self, names: Sequence[str], times: bool = True) -> str:
        paths, digest = self._paths(names), blake2b(digest_size=16)
        for name in names:
            stamp = self._files.stamp(paths[name]) if self._files and name in paths else None
            told = " ".join(map(str, stamp[: 1 + times])) if stamp else ""
            digest.update(f"{name}\0{told}\0".encode())
        return digest.hexdigest()

    def newest(self, names: Sequence[str]) -> int:
        stamps = [self._files.stamp(path) for path in self._paths(names).values()] if self._files else []
        return max((stamp[1] for stamp in stamps if stamp), default=0)

    def place(self, name: str) -> str:
        return self._files.place(self._relative(name)) if self._files else "nowhere, as there is no folder of photos"

    def _paths(self, names: Sequence[str]) -> dict[str, str]:
        """Where in `files` the photos are that have no URL."""
        return {name: self._relative(name) for name in names if not is_web(name)}

    def _read(self, path: str) -> bytes | Failure:
        return self._files.read(path, self._most) if self._files else ABSENT

    def _relative(self, name: str) -> str:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ValueError(f"the photo {name!r} leads out of the folder of photos; name it relative to that folder")
        return str(path).removeprefix(self._prefix)


def is_web(name: str) -> bool:
    """Whether a name is an address. Raises ValueError for a file:// address: a table does not decide which files of
    this machine are read."""
    found = ADDRESS.match(name)
    if found and found[0].lower().startswith("file:"):
        raise ValueError(f"the photo {name!r} is a file on this machine; name it relative to the folder of photos")
    return found is not None


class LoosePhotos:
    """Files below a folder. Raises ValueError for a link that leads out of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = os.path.realpath(folder)

    def read(self, name: str, most: int) -> bytes | Failure:
        path = self._path(name)
        if path is None:
            return ABSENT
        return path.read_bytes() if path.stat().st_size <= most else TOO_LARGE

    def stamp(self, name: str) -> tuple[int, int] | None:
        path = self._path(name)
        status = path.stat() if path else None
        return (status.st_size, status.st_mtime_ns) if status else None

    def place(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _path(self, name: str) -> Path | None:
        path = os.path.realpath(os.path.join(self.folder, name))
        if os.path.commonpath([path, self.folder]) != self.folder:
            raise ValueError(
                f"the photo {name!r} is a link that leads out of {self.folder}: copy the file there instead"
            )
        return Path(path) if os.path.isfile(path) else None
