"""SHA256SUMS beside checkpoints, as sha256sum writes it: what tells a whole file from a damaged one.

While a file is replaced it has two lines, of the old content and the new: after a crash either is found whole.
"""

import hashlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

SUMS = "SHA256SUMS"
Sums = dict[str, set[str]]  # by name, the hexadecimal sums that a whole file of that name may have


class Summed:
    """A file that is written from its beginning to its end; `sum` is that of what was written.

    error: why it could not be: torch.save goes on after it, and tells of what comes of that.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self._hash = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, content: bytes | memoryview) -> int:
        self._hash.update(content)
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()

    @property
    def sum(self) -> str:
        return self._hash.hexdigest()


def read_sums(folder: Path) -> Sums:
    """Empty where the folder has none. Raises ValueError on a line that is not sha256sum's."""
    path, sums = folder / SUMS, Sums()
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        digest, _, name = line.partition(" ")
        if len(digest) != 64 or name[:1] not in (" ", "*"):
            raise ValueError(
                f"{path} holds {line!r:.80}; expected lines as sha256sum writes them. Where no file's content is in "
                "doubt, make it anew: sha256sum *.ckpt > SHA256SUMS"
            )
        sums.setdefault(name[1:], set()).add(digest)
    return sums


def write_sums(folder: Path, sums: Mapping[str, set[str]]) -> None:
    partial = folder / f"{SUMS}.partial"
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(f"{digest}  {name}\n" for name in sorted(sums) for digest in sorted(sums[name]))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / SUMS)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's file, or None. One without a sum, of a version before, is read by its CRCs."""
    expected = read_sums(path.parent).get(path.name)
    if expected is None:
        return _damage_of_archive(path)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found in expected:
        return None
    size = path.stat().st_size
    return f"its {size} bytes have the sha256 {found[:12]}..., {SUMS} says {min(expected)[:12]}..."


def _damage_of_archive(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except zipfile.BadZipFile as error:
        return str(error)
    return None if broken is None else f"its part {broken} is not what was written"
