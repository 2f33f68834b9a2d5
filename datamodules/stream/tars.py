"""The tars of a store: bytes at places, through few open files; what cannot be had is a ShardError."""

from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from time import monotonic
from typing import Any

from datamodules.stores.store import LocalStore, Store, open_file
from datamodules.stores.transfer import ShardError
from datamodules.stream.files import OpenFile

# Per process, more than the default streams read from at once; 10 M products have more shards than it may open files.
OPEN_FILES = 128
PATIENCE = 60.0  # s before a shard that could not be had is asked for again: each time takes the store's several tries


class Tars:
    """Shards by number. Safe to fork and to pickle: whoever reads opens the files.

    `unusable` shards are known to be wrong (number -> one of failures.REASONS) and not read. Those of a folder are
    missing, or of another size than the manifest says; `data.verify` adds those with another checksum.
    """

    def __init__(self, store: Store) -> None:
        self.store, self.shards = store, store.manifest.shards
        self.local = isinstance(store, LocalStore)
        self.unusable = self._unusable() if self.local else {}
        self.close()

    def close(self) -> None:
        """Lets all files go; what is read next opens them again."""
        self._files: OrderedDict[int, OpenFile] = OrderedDict()
        self._refused: dict[int, tuple[float, ShardError]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_refused": {}}

    def _unusable(self) -> dict[int, str]:
        unusable = {}
        for number, shard in enumerate(self.shards):
            try:
                size = self.store.path(shard.name).stat().st_size
            except (ShardError, OSError):
                unusable[number] = "missing shard"
                continue
            if size != shard.bytes:
                unusable[number] = "truncated" if size < shard.bytes else "checksum"
        return unusable

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes of a tar from `offset` on. Raises ShardError when the tar cannot be had or is shorter."""
        file = self._file(shard)
        # A thread that still reads from a file that another one pushes out keeps it open by its reference.
        try:
            content = file.read(size, offset)
        except OSError as error:
            raise ShardError("unreachable", f"cannot be read ({error})") from error
        if len(content) < size:
            raise ShardError("truncated", f"{len(content)} of {size} bytes at {offset}")
        return content

    def expect(self, shard: int, offset: int, size: int) -> None:
        """What will be read soon; whatever is wrong with it shows then, and a store is asked for nothing before."""
        if self.local or shard in self._files:
            with suppress(ShardError, OSError):
                self._file(shard).expect(size, offset)

    def _file(self, shard: int) -> OpenFile:
        file = self._files.get(shard) or self._open(shard)
        with suppress(KeyError):  # another thread pushed it out
            self._files.move_to_end(shard)
        return file

    def _open(self, shard: int) -> OpenFile:
        if shard in self.unusable:
            raise ShardError(self.unusable[shard], "is missing, or not what the manifest says: copy or import it again")
        since, error = self._refused.get(shard, (0.0, None))
        if error is not None and monotonic() < since + PATIENCE:
            raise error
        try:
            file = self._files[shard] = open_file(self.store, self.shards[shard].name)
        except (ShardError, OSError) as error:
            cannot = ShardError("unreachable", f"cannot be opened ({error})")
            refused = error if isinstance(error, ShardError) else cannot
            self._refused[shard] = monotonic(), refused
            raise refused from error
        while len(self._files) > OPEN_FILES:
            self._files.popitem(last=False)
        return file

    def fetch(self, shards: Iterable[int]) -> None:
        """Has the store fetch these together, where it is no folder; what fails shows when it is read."""
        if not self.local:
            passed = (self._files, self.unusable, self._refused)  # asked one by one, as threads fetch too
            wanted = [number for number in sorted(set(shards)) if not any(number in of for of in passed)]
            self.store.fetch([self.shards[number].name for number in wanted])
