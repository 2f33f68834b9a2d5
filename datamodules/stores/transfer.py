"""Bytes from an address into a file: in blocks by range, each tried again when it fails.

What is written is what the server sent: the cache compares the whole file with the manifest before it is used.
"""

import errno
import math
import os
import random
import time
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol, runtime_checkable

import fsspec
from fsspec.config import conf

from datamodules.stores.address import Address

BLOCK = 8 << 20  # bytes asked for at once
LEAST = 64 << 10  # bytes; an answer shorter than the block gets us on from this length, else it counts as failed
TRIES, OPEN_TRIES = 8, 4  # of a block: about a minute in all; of the manifest
OPEN_SECONDS = 10.0  # after which the manifest is not tried again (S3's package tries on its own as well): is it there?
WAIT, LONGEST_WAIT = 0.5, 30.0  # s before the second try, doubled before each further one; of these, half to all
CONNECT, SILENCE = 20.0, 60.0  # s without an answer after which an HTTP connection counts as dropped
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
BUSY = (408, 425, 429)  # HTTP: the only client errors that another try may mend
FINAL = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError", "InvalidURL"}


class ShardError(Exception):
    """A file of a store that cannot be had. `reason` is one of failures.REASONS; the message names no secrets."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)  # both, so that it can be pickled
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[1])


@runtime_checkable
class Source(Protocol):
    """Where files come from. Picklable; safe to fork and to use from threads."""

    @property
    def shown(self) -> str: ...

    def read(self, name: str) -> bytes:
        """A small file, whole. Raises ShardError: "missing shard" or "unreachable"."""

    def copy(self, name: str, part: BinaryIO, size: int | None) -> None:
        """Writes what `part`, whose position is its end, lacks of the file's `size` bytes (None: not known).

        Raises ShardError; an OSError is one of writing `part`.
        """


class Tries:
    """Failures in a row of one request. Between them it waits, longer each time and by chance (ranks do not come at
    once); after the last, or one that another try cannot mend, it raises ShardError."""

    def __init__(self, what: str, clean: Callable[[str], str], most: int, seconds: float = math.inf) -> None:
        self.what, self.clean, self.most = what, clean, most
        self.count, self.end = 0, time.monotonic() + seconds

    def failed(self, error: Exception | str) -> None:
        self.count += 1
        if isinstance(error, FileNotFoundError):
            # From None: the chain would show the address as the file system knows it.
            said = self.clean(str(error))
            why = (
                f" ({said})" if " " in said and "/" not in said else ""
            )  # which bucket or key; HTTP only repeats the URL
            raise ShardError("missing shard", f"{self.what} does not exist{why}") from None
        if self.count >= self.most or time.monotonic() > self.end or not _may_mend(error):
            tries = f" (tried {self.count} times)" if self.count > 1 else ""
            raise ShardError("unreachable", f"{self.what}: {self.clean(_described(error))}{tries}") from None
        time.sleep(min(LONGEST_WAIT, WAIT * 2 ** (self.count - 1)) * random.uniform(0.5, 1))


class Files:
    """Files of an fsspec file system. fsspec keeps one instance per process and address, forgets it in forked children,
    and runs the requests of all threads on one event loop: nothing of it is kept here."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._ranges = True

    @property
    def shown(self) -> str:
        return self.address.shown

    def read(self, name: str) -> bytes:
        tries = Tries(f"{self.shown}/{name}", self.address.clean, OPEN_TRIES, OPEN_SECONDS)
        while True:
            try:
                file_system, path = self._at(name)
                file_system.invalidate_cache()  # someone may have listed the folder, with lengths as they were then
                return bytes(file_system.cat_file(path, start=0))  # else S3 is asked for the length first
            except Exception as error:  # of a package that we do not know
                tries.failed(error)

    def copy(self, name: str, part: BinaryIO, size: int | None) -> None:
        tries = Tries(f"{self.shown}/{name}", self.address.clean, TRIES)
        size = self._length(name) if size is None else size
        try:
            while size is None or part.tell() < size:
                if size is None or not self._ranges:
                    return self._stream(name, part, size, tries)
                self._add_block(name, part, size, tries)
        except ShardError as error:
            if size is not None and error.reason == "unreachable":
                self._check_length(name, size)
            raise

    def _add_block(self, name: str, part: BinaryIO, size: int, tries: Tries) -> None:
        """Adds what one request gives; less than a block, or nothing, where it fails."""
        start, end = part.tell(), min(part.tell() + BLOCK, size)
        try:
            file_system, path = self._at(name)
            content = file_system.cat_file(path, start=start, end=end)
        except Exception as error:  # of a package that we do not know
            return tries.failed(error)
        if len(content) > end - start:  # the server takes no ranges: this is the file from its start
            self._ranges = False
            restart(part)
        part.write(content)
        part.flush()  # what is there now is there after a kill
        if len(content) < min(end - start, LEAST) or part.tell() > size:
            self._check_length(name, size)
            return tries.failed(f"sent {len(content):,} bytes instead of {end - start:,} at {start:,}")
        tries.count = 0

    def _stream(self, name: str, part: BinaryIO, size: int | None, tries: Tries) -> None:
        """The file from its start to its end, by one request that holds little of it in memory."""
        while True:
            restart(part)
            try:
                file_system, path = self._at(name)
                file_system.get_file(path, part.name)
            except Exception as error:
                if isinstance(error, OSError) and error.errno in NO_ROOM:
                    raise
                tries.failed(error)
                continue
            if part.seek(0, os.SEEK_END) == size or size is None:
                return
            self._check_length(name, size)
            tries.failed(f"sent {part.tell():,} of {size:,} bytes")

    def _check_length(self, name: str, size: int) -> None:
        """Raises ShardError when the file there has another length: asking again would not help."""
        found = self._length(name)
        if found not in (None, size):
            problem = f"has {found:,} bytes instead of {size:,}: copy the shards there again"
            raise ShardError("checksum", f"{self.shown}/{name} {problem}") from None

    def _length(self, name: str) -> int | None:
        """Bytes of the file, as far as the server tells."""
        try:
            file_system, path = self._at(name)
            size = file_system.info(path).get("size")
        except Exception:  # it only tells an error better
            return None
        return size if isinstance(size, int) and size > 0 else None

    def _at(self, name: str) -> tuple[Any, str]:
        file = self.address.file(name)
        if self.address.family != "http":
            return fsspec.url_to_fs(file)
        return fsspec.filesystem(self.address.protocol, client_kwargs=_http_options()), file


def restart(part: BinaryIO) -> None:
    part.seek(0)
    part.truncate()


def _http_options() -> dict[str, Any]:
    import aiohttp  # noqa: PLC0415  (slow; for HTTP alone)

    configured = {**conf.get("http", {}), **conf.get("https", {})}.get("client_kwargs", {})
    # Without a limit for all of it: a block may be long in coming on a slow line.
    return {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=SILENCE), **configured}


def _may_mend(error: Exception | str) -> bool:
    if isinstance(error, PermissionError | ValueError | TypeError | NotImplementedError):
        return False
    status = _status(error)
    return type(error).__name__ not in FINAL and (status is None or status in BUSY or status >= 500)


def _status(error: Exception | str) -> int | None:
    found = getattr(error, "status", None) or getattr(error, "code", None)
    return found if isinstance(found, int) and 400 <= found < 600 else None


def _described(error: Exception | str) -> str:
    status = _status(error)
    if isinstance(error, str):
        return error
    if isinstance(error, PermissionError) or status in (401, 403):
        return f"no permission ({f'HTTP {status}' if status else error})"
    return f"HTTP {status} {getattr(error, 'message', '')}".strip() if status else f"{type(error).__name__}: {error}"
