"""One shard's tar as it is written: deterministic, hashed on the way, with the place of each sample."""

import hashlib
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import numpy as np
from webdataset import TarWriter

from datamodules.manifest import Shard
from datamodules.photos.files import Photo
from datamodules.stream.files import OpenFile


class SampleTar:
    """Written under a name of its own and called `path` when it is whole and on the disk."""

    def __init__(self, path: Path) -> None:
        self.path, self._hash, self._bytes = path, hashlib.sha256(), 0

    def __enter__(self) -> "SampleTar":
        self._part = self.path.with_name(f"{self.path.name}.{uuid4().hex}.part")  # two may write it on a cluster
        self._file = self._part.open("xb")
        # PAX: USTAR refuses names of more than 100 characters, and percent-encoded ids grow long
        self._tar = TarWriter(self, user="", group="", mode=0o644, encoder=False, mtime=0, format="PAX_FORMAT")
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if failed:
            self._part.unlink()
        else:
            os.replace(self._part, self.path)

    def write(self, content: bytes) -> int:
        """What TarWriter asks of a file."""
        self._hash.update(content)
        self._bytes += len(content)
        return self._file.write(content)

    def add(self, product_id: str, record: Mapping[str, Any], photo: Photo | None) -> tuple[int, int]:
        """Offset and size of the sample: its JSON, then its photo (TarWriter alone would sort jpg before json)."""
        start, key = self._tar.tarstream.offset, sample_key(product_id)
        content = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
        self._tar.write({"__key__": key, "json": content})
        if photo:
            self._tar.write({"__key__": key, photo.ending: photo.content})
        return start, self._tar.tarstream.offset - start

    def shard(self, pairs: np.ndarray) -> Shard:
        """`pairs`: train positives of each product."""
        trainable, total = int((pairs > 0).sum()), int(pairs.sum())
        return Shard(self.path.name, self._hash.hexdigest(), self._bytes, len(pairs), trainable, total)


def sample_key(product_id: str) -> str:
    """The name of a sample in a tar: what WebDataset would split at (dots, slashes) is percent-encoded as well."""
    return quote(product_id, safe="").replace(".", "%2E")


class StoredPhotos:
    """Photos of a shard that was written before, by product id; none without a path."""

    def __init__(self, path: Path | None) -> None:
        self._places: dict[str, tuple[int, int, str]] = {}
        if path is None:
            return
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, ending = member.name.rsplit(".", 1)
                if ending != "json":
                    self._places[key] = member.offset_data, member.size, ending
        self._file = OpenFile(path)

    def __contains__(self, product_id: str) -> bool:
        return sample_key(product_id) in self._places

    def get(self, product_id: str) -> Photo | None:
        if product_id not in self:
            return None
        offset, size, ending = self._places[sample_key(product_id)]
        return Photo(self._file.read(size, offset), ending)
