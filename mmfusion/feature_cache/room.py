"""How much disk features may take, and what goes first when there is no room."""

import os
import re
import secrets
import shutil
from collections.abc import Set
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmfusion.feature_cache.held import taken
from mmfusion.feature_cache.stored import COMPLETE, DESCRIPTION

GIB = 1 << 30
FEATURES = re.compile(r"[0-9a-f]{32}")  # names of folders, as folder_of gives them; nothing else is ever deleted
DELETED = ".deleted-"


@dataclass(frozen=True)
class CacheOptions:
    """Outputs of frozen encoders on disk, for later stages, epochs, evaluations and runs.

    Args:
        use: auto: where an encoder is frozen and in eval mode; off: never
        folder: on a local disk; by default $MMFUSION_CACHE or ~/.cache/mmfusion. Features lie in its `features`
        limit_gib: GiB that all features there may take together; the least recently used go first
    """

    use: Literal["auto", "off"] = "auto"
    folder: str | None = None
    limit_gib: float = 32

    def __post_init__(self) -> None:
        if not self.limit_gib > 0:
            raise ValueError(f"model.cache.limit_gib is {self.limit_gib}; give GiB above 0, or model.cache.use=off")
        if self.folder and "://" in self.folder:
            raise ValueError("model.cache.folder is an address; features are mapped into memory: give a local folder")

    def root(self) -> Path:
        """Where the feature folders lie; not made yet."""
        folder = self.folder or os.environ.get("MMFUSION_CACHE") or "~/.cache/mmfusion"
        return Path(folder).expanduser() / "features"


def make_room(root: Path, needed_bytes: int, keep: Set[Path], options: CacheOptions) -> list[Path]:
    """Deletes the least recently used feature folders until `needed_bytes` fit; returns those deleted.

    Nothing is reserved: two processes that ask at once may together exceed the limit.

    needed_bytes: what will be written, beyond what lies there already
    keep: folders that are never deleted (nor are those that a process has open); they count towards the limit
    Raises ValueError, before anything is deleted, when the limit or the disk cannot hold it all.
    """
    folders = sorted((path for path in _entries(root) if FEATURES.fullmatch(path.name)), key=_used)
    sizes = {folder: _bytes(folder) for folder in folders}
    limit = int(options.limit_gib * GIB)
    free = shutil.disk_usage(next(path for path in (root, *root.parents) if path.exists())).free
    # The larger of what the limit and what the disk lacks.
    lacking = needed_bytes + max(sum(sizes.values()) - limit, -free)
    kept = {path.resolve() for path in keep}
    victims: list[Path] = []
    with ExitStack() as locks:
        for folder in folders:
            if lacking <= 0:
                break
            if folder.resolve() not in kept and (descriptor := _taken(folder)) is not None:
                locks.callback(os.close, descriptor)
                victims.append(folder)
                lacking -= sizes[folder]
        if lacking > 0:
            stay = sum(size for folder, size in sizes.items() if folder not in victims)
            raise ValueError(_refusal(root, needed_bytes, stay, options, free))
        for folder in victims:
            _delete(folder)
    for left in _entries(root):
        if left.name.startswith(DELETED):  # a process was killed while it deleted
            shutil.rmtree(left, ignore_errors=True)
    return victims


def _refusal(root: Path, needed: int, stay: int, options: CacheOptions, free: int) -> str:
    return (
        f"the feature cache needs {needed / GIB:.3g} GiB in {root}, besides {stay / GIB:.3g} GiB that are in use; "
        f"model.cache.limit_gib is {options.limit_gib:g}, and the disk has {free / GIB:.3g} GiB free: raise "
        "model.cache.limit_gib or make room, choose another folder with model.cache.folder, or do without with "
        "model.cache.use=off"
    )


def _entries(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []


def _used(folder: Path) -> float:
    """When the folder was last opened or begun; a folder that another process has just deleted counts as oldest."""
    for name in (COMPLETE, DESCRIPTION, "."):
        with suppress(OSError):
            return (folder / name).stat().st_mtime
    return 0.0


def _bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def _taken(folder: Path) -> int | None:
    """As `taken`; None also for what is another user's, or gone."""
    try:
        return taken(folder) if os.access(folder, os.W_OK) else None
    except FileNotFoundError:
        return None


def _delete(folder: Path) -> None:
    """Under another name first: whoever looks meanwhile finds the folder whole or not at all."""
    aside = folder.with_name(f"{DELETED}{folder.name}-{secrets.token_hex(4)}")
    with suppress(FileNotFoundError):
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
