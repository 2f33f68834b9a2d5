"""Where shards lie: a local folder, or an address (S3, GCS, HTTP, ...) with a local cache that processes share."""

import hashlib
import os
import re
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Protocol, runtime_checkable

from fsspec.implementations.local import LocalFileSystem

from datamodules.manifest import Manifest, pair_file, read_manifest
from datamodules.stores.address import Address, without_secrets
from datamodules.stores.cache import GIB, Cache, Kept
from datamodules.stores.pipe import Pipe, piped
from datamodules.stores.transfer import Files, ShardError, Source
from datamodules.stream.files import OpenFile

THREADS = 8  # downloads at once of one `fetch`
MANIFEST = "manifest.json"


@runtime_checkable
class Store(Protocol):
    """Shards and their tables, as local files. Safe to fork, to pickle and to use from threads."""

    address: str  # to be shown: without user, password, query string or keys
    manifest: Manifest

    def path(self, name: str) -> Path:
        """A whole local file: the file itself, or fetched into the cache first. Also pairs/<name>.parquet.

        Raises ShardError: "missing shard", "unreachable" (after several tries) or "checksum" (it is not what the
        manifest says); ValueError when `name` is no plain file name or not in the manifest, or the cache is full.
        """

    def fetch(self, names: Sequence[str]) -> None:
        """Fetches several at once and returns when all are there or have failed; never raises: `path` will."""


class LocalStore:
    """A folder of shards. Nothing is hashed here: `data.verify` does that."""

    def __init__(self, folder: Path) -> None:
        """Raises FileNotFoundError or ValueError when `folder` holds no shards."""
        self.folder, self.address = folder, str(folder)
        self.manifest = read_manifest(folder)
        _check_names(self.manifest, self.address)
        self._pairs = {pair_file(name) for name in self.manifest.pairs}

    def path(self, name: str) -> Path:
        known = name == MANIFEST or name in self._pairs
        path = self.folder / (name if known else plain(name, self.address))
        if not path.is_file():
            raise ShardError(
                "missing shard", f"{path} is missing: the shards are not complete, copy or import them again"
            )
        return path

    def fetch(self, names: Sequence[str]) -> None:
        """They are local."""


class RemoteStore:
    """Shards at an address, by way of a cache. The manifest is always asked for anew; the cache belongs to its hash."""

    def __init__(self, source: Source, manifest: bytes, root: Path, cache_gib: float | None) -> None:
        """Raises ValueError when the manifest is none, or the cache is too small or cannot be written."""
        self.address, self._source = source.shown, source
        self.manifest = _parsed(manifest, self.address)
        files = {name: Kept(sha256, None) for name, sha256 in self.manifest.tables.items()}
        files |= {shard.name: Kept(shard.sha256, shard.bytes) for shard in self.manifest.shards}
        pairs = self.manifest.pairs
        # Under a name of its content's: a table of pairs may be replaced, while the cache belongs to the same hash.
        self._pairs = {pair_file(name): f"{name}.{pair.sha256[:32]}.pairs" for name, pair in pairs.items()}
        files |= {self._pairs[pair_file(name)]: Kept(pair.sha256, None) for name, pair in pairs.items()}
        most_bytes = None if cache_gib is None else int(cache_gib * GIB)
        self._cache = Cache(root, self.manifest.hash[:32], files, most_bytes)
        self._cache.write(MANIFEST, manifest)

    def __repr__(self) -> str:
        return f"RemoteStore({self.address!r})"

    def path(self, name: str) -> Path:
        if name == MANIFEST:
            return self._cache.folder / name
        kept = self._pairs.get(name) or plain(name, self.address)
        if kept not in self._cache.files:
            raise ValueError(f"{self.address}/{MANIFEST} lists no {name}; expected one of its shards or tables")
        copy = partial(self._source.copy, name, size=self._cache.files[kept].bytes)
        try:
            return self._cache.path(kept, self.address, copy)
        except ShardError as error:
            raise ShardError(error.reason, str(error).replace(kept, name)) from None

    def fetch(self, names: Sequence[str]) -> None:
        waiting = deque(name for name in self._cache.fitting(names) if not self._cache.has(name))
        # Unlike those of an executor, these threads do not hold up a process that is stopped; parts are gone on with.
        threads = [Thread(target=self._fetch, args=(waiting,), daemon=True) for _ in range(min(THREADS, len(waiting)))]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            waiting.clear()

    def _fetch(self, waiting: deque[str]) -> None:
        with suppress(IndexError):  # there is no other name
            while name := waiting.popleft():
                with suppress(ShardError, ValueError):
                    self.path(name)


def open_store(
    address: str | Path, *, cache: Path | None = None, cache_gib: float | None = None, allow_pipe: bool = False
) -> Store:
    """The shards at an address. Raises FileNotFoundError or ValueError when there are none.

    Args:
        address: a local folder (read in place), or a folder at s3://, gs://, http(s)://, or any protocol of fsspec
            whose package is installed. An HTTP address may have a user and password, and a query string that each
            file's address is to end with. Everything else that a server asks for comes from where the protocol's
            package looks for it (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL_S3, GOOGLE_APPLICATION_CREDENTIALS),
            and from fsspec's configuration: variables FSSPEC_<PROTOCOL>_<OPTION> or FSSPEC_<PROTOCOL> (JSON), set
            before Python starts, and *.json and *.ini files in FSSPEC_CONFIG_DIR (~/.config/fsspec). For example
            FSSPEC_S3_ENDPOINT_URL, FSSPEC_S3_ANON=true, FSSPEC_GS_TOKEN=anon, FSSPEC_HTTP_HEADERS (JSON).
        cache: folder for what is downloaded; default $MMFUSION_CACHE or ~/.cache/mmfusion. On a local disk.
        cache_gib: most GiB of this address's shards that the cache keeps; None: all.
        allow_pipe: whether the address may be `pipe:COMMAND with {name}`, a shell command that writes a file to its
            output.
    """
    if cache_gib is not None and not cache_gib > 0:
        raise ValueError(f"data.cache_gib is {cache_gib}; expected more than 0, or nothing for no bound")
    address = str(address) if isinstance(address, Path) else address
    if address.startswith("pipe:"):
        return _piped(address, cache, cache_gib, allow_pipe)
    if "://" not in address:
        if (wrong := re.match(r"([a-z0-9]{2,}):/+(.*)", address)) and not Path(address).exists():
            raise ValueError(
                f"{wrong[1]}:/... is no address; expected two slashes: {wrong[1]}://<server or bucket>/<folder>"
            )
        return LocalStore(Path(address))
    if address.partition("://")[0].lower() in ("file", "local"):
        return LocalStore(Path(LocalFileSystem._strip_protocol(address)))
    found = Address.parse(address)
    source = Files(found)
    try:
        manifest = source.read(MANIFEST)
    except ShardError as error:
        raise _unopened(error, found.environment) from None
    return RemoteStore(source, manifest, _root(cache, found.shown), cache_gib)


def shown(address: str) -> str:
    """What may be shown of it: that of its store, before there is one."""
    if address.startswith("pipe:"):
        return piped(address)
    return without_secrets(address).rstrip("/") if "://" in address else address


def _piped(address: str, cache: Path | None, cache_gib: float | None, allow_pipe: bool) -> RemoteStore:
    source = Pipe(address)
    if not allow_pipe:
        raise ValueError(
            f"data.path is {source.shown}, which runs a shell command for each file, as whoever wrote it likes. "
            "Where you trust it: data.allow_pipe=true"
        )
    try:
        manifest = source.read(MANIFEST)
    except ShardError as error:
        raise ValueError(f"{error}. Expected the bytes of {MANIFEST}, as an import writes it") from None
    return RemoteStore(source, manifest, _root(cache, address), cache_gib)


def _root(cache: Path | None, address: str) -> Path:
    folder = cache or Path(os.environ.get("MMFUSION_CACHE") or "~/.cache/mmfusion")
    return folder.expanduser().absolute() / hashlib.sha256(address.encode()).hexdigest()[:16]


def _unopened(error: ShardError, environment: str) -> ValueError | FileNotFoundError:
    kind = FileNotFoundError if error.reason == "missing shard" else ValueError
    return kind(
        f"{error}: expected a folder of shards (manifest.json, *.tar), as `make data` writes it and you copied it. "
        f"Where and as whom it is asked for comes from the environment: {environment}"
    )


def _parsed(content: bytes, shown: str) -> Manifest:
    try:
        manifest = Manifest.from_json(content.decode())
    except (ValueError, AttributeError) as error:
        start = content[:40].decode(errors="replace")
        raise ValueError(f"{shown}/{MANIFEST} is no manifest of shards: {error} (it starts with {start!r})") from error
    _check_names(manifest, shown)
    return manifest


def _check_names(manifest: Manifest, shown: str) -> None:
    for name in (*manifest.tables, *(shard.name for shard in manifest.shards)):
        plain(name, f"{shown}/{MANIFEST}")


def plain(name: str, shown: str) -> str:
    """The name; ValueError when it is more than the name of one file."""
    if name in ("", ".", "..", MANIFEST) or any(mark in name for mark in "/\\\0"):
        raise ValueError(f"{shown} names a file {name!r}; expected a plain file name, without folders")
    return name


def open_file(store: Store, name: str) -> OpenFile:
    """The file, open; it stays readable when the cache gives it up. Raises what `Store.path` raises."""
    while True:
        path = store.path(name)
        with suppress(FileNotFoundError):  # another process needed its room just now
            return OpenFile(path)


def read_tables(store: Store) -> dict[str, Path]:
    """Local paths of the manifest's tables ("index.parquet", ...), fetched. ValueError when one cannot be had."""
    store.fetch(list(store.manifest.tables))
    try:
        return {name: store.path(name) for name in store.manifest.tables}
    except ShardError as error:
        raise ValueError(str(error)) from None
