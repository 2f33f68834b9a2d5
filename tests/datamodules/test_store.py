"""Shards at an address: whatever servers, disks and other processes do, the right bytes or an error that says so."""

import dataclasses
import errno
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec.config
import pytest

from datamodules.catalogue import read_catalogue
from datamodules.importing.writer import write_shards
from datamodules.manifest import Manifest, Shard
from datamodules.stores import pipe, transfer
from datamodules.stores.address import Address
from datamodules.stores.store import LocalStore, RemoteStore, Store, open_file, open_store, read_tables
from datamodules.stores.transfer import ShardError
from datamodules.tuples import TupleDataModule
from tests.datamodules.drawn import same
from tests.datamodules.faulty import Site, serving
from tests.datamodules.fetching import BLOCK, check, fetch, fork_while_fetching, impatient
from tests.datamodules.small import small_catalogue

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BLOCK", "LEAST", "WAIT", "TRIES", "OPEN_TRIES"):
        monkeypatch.setattr(transfer, name, getattr(transfer, name))  # so that it comes back
    monkeypatch.setattr(pipe, "TRIES", pipe.TRIES)
    impatient()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    write_shards(read_catalogue(small_catalogue(folder / "small")), folder / "shards", shard_size=8)
    return folder / "shards"


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> Path:
    """Eight shards, to be changed by the test."""
    return Path(shutil.copytree(made, tmp_path / "shards"))


@pytest.fixture
def site(shards: Path) -> Iterator[Site]:
    with serving(shards) as site:
        yield site


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def names(store: Store) -> list[str]:
    return [shard.name for shard in store.manifest.shards]


def blocks(shard: Shard) -> int:
    return -(-shard.bytes // BLOCK)


def change(folder: Path, edit: Callable[[Manifest], Manifest]) -> Manifest:
    manifest = edit(Manifest.from_json((folder / "manifest.json").read_text()))
    (folder / "manifest.json").write_text(manifest.to_json())
    return manifest


def same_as(folder: Path, store: Store) -> bool:
    expected = {name: (folder / name).read_bytes() for name in (*names(store), *store.manifest.tables)}
    return {name: store.path(name).read_bytes() for name in expected} == expected


def test_a_local_folder_is_read_in_place(shards: Path) -> None:
    for address in (shards, str(shards), f"file://{shards}"):
        store = open_store(address)
        assert isinstance(store, LocalStore)
        assert [store.path(name) for name in names(store)] == [shards / name for name in names(store)]
        assert read_tables(store)["index.parquet"] == shards / "index.parquet"
    (shards / names(store)[0]).unlink()
    with pytest.raises(ShardError, match="missing") as caught:
        store.path(names(store)[0])
    assert caught.value.reason == "missing shard"


def test_files_come_whole_and_only_once(site: Site, cache: Path) -> None:
    store = open_store(site.url + "/some/folder/", cache=cache)
    store.fetch(names(store))
    assert same_as(site.folder, store)
    assert sum(site.counts[shard.name] for shard in store.manifest.shards) == sum(map(blocks, store.manifest.shards))
    site.counts.clear()
    again = open_store(site.url + "/some/folder/", cache=cache)
    assert same_as(site.folder, again)
    assert site.counts == {"manifest.json": 1}
    assert (again.path("manifest.json")).read_bytes() == (site.folder / "manifest.json").read_bytes()


@pytest.mark.parametrize("fault", ["500", "short", "dropped", "no ranges", "no ranges, dropped", "garbled"])
def test_what_fails_now_and_then_is_asked_for_again(site: Site, cache: Path, fault: str) -> None:
    store = open_store(site.url, cache=cache)
    site.faults = lambda name, before: fault if before % 2 == 0 else ""
    if fault == "garbled":  # of every file one block, once
        site.faults = lambda name, before: fault if before == 1 else ""
    assert same_as(site.folder, store)


@pytest.mark.parametrize("fault", ["short", "no ranges"])
def test_a_server_may_always_send_less_or_more_than_it_was_asked_for(site: Site, cache: Path, fault: str) -> None:
    store = open_store(site.url, cache=cache)
    site.faults = lambda name, before: fault
    store.fetch(names(store))
    assert same_as(site.folder, store)


@pytest.mark.parametrize(
    ("fault", "reason", "said", "requests"),
    [
        ("500", "unreachable", "HTTP 500", 4),
        ("503", "unreachable", "tried 4 times", 4),
        ("dropped", "unreachable", "tried 4 times", 4),
        ("no ranges, dropped", "unreachable", "tried 4 times", 4),
        ("403", "unreachable", r"no permission \(HTTP 403\)", 1),
        ("404", "missing shard", "does not exist", 1),
    ],
)
def test_what_always_fails_ends(site: Site, cache: Path, fault: str, reason: str, said: str, requests: int) -> None:
    store = open_store(site.url, cache=cache)
    name = names(store)[3]
    site.faults = lambda name, before: fault
    store.fetch(names(store))
    site.counts.clear()
    with pytest.raises(ShardError, match=f"{site.url}/{name}.*{said}") as caught:
        store.path(name)
    assert caught.value.reason == reason
    assert site.counts[name] == requests
    site.faults = lambda name, before: ""
    assert same_as(site.folder, store)


def test_other_bytes_are_fetched_once_more_and_then_refused(site: Site, cache: Path) -> None:
    store = open_store(site.url, cache=cache)
    shard = store.manifest.shards[0]
    site.faults = lambda name, before: "garbled"
    with pytest.raises(
        ShardError, match=f"{shard.name} has the sha256 .* the manifest says {shard.sha256[:12]}"
    ) as caught:
        store.path(shard.name)
    assert caught.value.reason == "checksum"
    assert site.counts[shard.name] == 2 * blocks(shard)
    assert not [path for path in cache.rglob("*.tar") if path.is_file()]
    with pytest.raises(ValueError, match=r"index\.parquet has the sha256"):
        read_tables(store)


@pytest.mark.parametrize("length", [-100, -8192, 0])
@pytest.mark.parametrize("fault", ["", "no ranges"])
def test_a_file_of_another_length_is_refused(site: Site, cache: Path, length: int, fault: str) -> None:
    store = open_store(site.url, cache=cache)
    path = site.folder / names(store)[0]
    path.write_bytes(path.read_bytes()[:length] if length else path.read_bytes() + b"more")
    site.faults = lambda name, before: fault
    if length == 0 and not fault:  # what was asked for is what it was
        assert store.path(path.name).read_bytes() == path.read_bytes()[:-4]
        return
    said = f"{path.name} has {path.stat().st_size:,} bytes instead of {store.manifest.shards[0].bytes:,}"
    with pytest.raises(ShardError, match=said) as caught:
        store.path(path.name)
    assert caught.value.reason == "checksum"
    assert site.counts[path.name] <= blocks(store.manifest.shards[0]) + 1


def test_a_file_that_is_empty_is_refused(site: Site, cache: Path) -> None:
    store = open_store(site.url, cache=cache)
    (site.folder / names(store)[0]).write_bytes(b"")
    with pytest.raises(ShardError) as caught:
        store.path(names(store)[0])
    assert caught.value.reason == "unreachable"


def test_a_connection_on_which_nothing_comes_is_given_up(
    site: Site, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "SILENCE", 0.2)
    store = open_store(site.url, cache=cache)
    site.faults = lambda name, before: "wait" if before == 0 else ""
    assert store.path(names(store)[0]).read_bytes() == (site.folder / names(store)[0]).read_bytes()


def test_a_new_manifest_is_seen_and_old_shards_are_not_used(site: Site, cache: Path, tmp_path: Path) -> None:
    old = open_store(site.url, cache=cache)
    old.path(names(old)[0])
    write_shards(read_catalogue(small_catalogue(tmp_path / "other", products=40)), tmp_path / "new", shard_size=8)
    for path in (tmp_path / "new").iterdir():
        shutil.copy(path, site.folder)
    new = open_store(site.url, cache=cache)
    assert same_as(site.folder, new)
    with pytest.raises(ShardError) as caught:
        old.path(names(old)[1])
    assert caught.value.reason == "checksum"


def test_a_cache_may_be_a_mount_that_is_only_read(site: Site, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(site.url, cache=cache)
    name = store.manifest.shards[0].name
    path = store.path(name)

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "utime", refuse)
    assert open_store(site.url, cache=cache).path(name) == path


def test_a_cached_file_that_was_cut_is_fetched_again(site: Site, cache: Path) -> None:
    store = open_store(site.url, cache=cache)
    path = store.path(names(store)[0])
    os.truncate(path, 100)
    assert store.path(path.name).read_bytes() == (site.folder / path.name).read_bytes()


def test_what_a_part_holds_is_not_trusted(site: Site, cache: Path) -> None:
    store = open_store(site.url, cache=cache)
    (parts,) = cache.glob("*/*.parts")
    shard = store.manifest.shards[0]
    for left in (b"x" * 100, b"x" * shard.bytes, b"x" * (2 * shard.bytes)):
        (parts / shard.name).write_bytes(left)
        path = store.path(shard.name)
        assert path.read_bytes() == (site.folder / shard.name).read_bytes()
        path.unlink()


# processes


def test_processes_that_ask_at_once_download_once(site: Site, cache: Path) -> None:
    store = open_store(site.url, cache=cache)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    wanted = [*names(store), "index.parquet"]
    ranks = [context.Process(target=fetch, args=(store, wanted, barrier)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert {name: site.counts[name] for name in names(store)} == {s.name: blocks(s) for s in store.manifest.shards}
    site.counts.clear()
    assert same_as(site.folder, store)
    assert not set(site.counts) & set(wanted)


def test_threads_that_ask_at_once_download_once(site: Site, cache: Path) -> None:
    store = open_store(site.url, cache=cache)
    threads = [threading.Thread(target=store.fetch, args=(names(store),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: site.counts[name] for name in names(store)} == {s.name: blocks(s) for s in store.manifest.shards}


def times_open(path: Path) -> int:
    """How often this process has the file open."""
    count = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            count += descriptor.readlink() == path
    return count


def test_who_waited_for_a_download_that_failed_makes_its_own(site: Site, cache: Path) -> None:
    store = open_store(site.url, cache=cache)
    shard = store.manifest.shards[0]
    (parts,) = cache.glob("*/*.parts")
    site.faults = lambda name, before: "wait" if before == 0 else "garbled" if before < 2 * blocks(shard) else ""
    failed: list[str] = []

    def first() -> None:
        try:
            store.path(shard.name)
        except ShardError as error:
            failed.append(error.reason)

    threads = [threading.Thread(target=first), threading.Thread(target=store.path, args=(shard.name,))]
    threads[0].start()
    assert site.waiting.wait(60)
    threads[1].start()
    while times_open(parts / shard.name) < 2:
        pass
    site.gate.set()
    for thread in threads:
        thread.join()
    assert failed == ["checksum"]
    assert (store.path("manifest.json").parent / shard.name).read_bytes() == (site.folder / shard.name).read_bytes()
    assert site.counts[shard.name] == 3 * blocks(shard)


def test_a_killed_download_is_gone_on_with(site: Site, cache: Path) -> None:
    store = open_store(site.url, cache=cache)
    shard = max(store.manifest.shards, key=lambda shard: shard.bytes)
    assert blocks(shard) > 2
    site.faults = lambda name, before: "wait" if (name, before) == (shard.name, 2) else ""
    rank = multiprocessing.get_context("spawn").Process(target=fetch, args=(store, [shard.name]))
    rank.start()
    assert site.waiting.wait(60)
    os.kill(rank.pid or 0, signal.SIGKILL)
    rank.join(60)
    assert rank.exitcode == -signal.SIGKILL
    assert not (store.path("manifest.json").parent / shard.name).exists()
    site.asked.clear()
    assert store.path(shard.name).read_bytes() == (site.folder / shard.name).read_bytes()
    assert min(start for name, start, _ in site.asked if name == shard.name) == 2 * BLOCK


def test_a_lock_does_not_outlive_its_holder_in_forked_children(site: Site, cache: Path) -> None:
    store = open_store(site.url, cache=cache)
    shard = max(store.manifest.shards, key=lambda shard: shard.bytes)
    site.faults = lambda name, before: "wait" if (name, before) == (shard.name, 2) else ""
    context = multiprocessing.get_context("spawn")
    child: multiprocessing.Queue[int] = context.Queue()
    rank = context.Process(target=fork_while_fetching, args=(store, shard.name, child))
    rank.start()
    orphan = child.get(timeout=60)
    try:
        os.kill(rank.pid or 0, signal.SIGKILL)
        os.waitid(os.P_PID, rank.pid or 0, os.WEXITED | os.WNOWAIT)
        assert store.path(shard.name).read_bytes() == (site.folder / shard.name).read_bytes()
    finally:
        os.kill(orphan, signal.SIGKILL)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_works_in_workers(site: Site, cache: Path, method: str) -> None:
    """Its connections are open when the worker is forked; a spawned one gets it pickled."""
    store = open_store(site.url, cache=cache)
    store.path(names(store)[0])
    worker = multiprocessing.get_context(method).Process(target=fetch, args=(store, names(store)))
    worker.start()
    worker.join(120)
    assert worker.exitcode == 0
    site.counts.clear()
    assert same_as(site.folder, store)
    assert not set(site.counts) & set(names(store))


# the cache


def bound(store: Store, shards: int) -> float:
    return shards * max(shard.bytes for shard in store.manifest.shards) / GIB


def held(cache: Path) -> int:
    """Bytes of all shards that are there whole."""
    return sum(path.stat().st_size for path in cache.rglob("*.tar") if not path.parent.name.endswith(".parts"))


def cached(store: Store) -> set[str]:
    return {path.name for path in store.path("manifest.json").parent.glob("*.tar")}


def test_the_least_recently_used_shards_are_given_up(site: Site, cache: Path) -> None:
    store = open_store(site.url, cache=cache)
    wanted = names(store)
    store = open_store(site.url, cache=cache, cache_gib=bound(store, 3))
    read_tables(store)
    for number, name in enumerate(wanted[:3]):
        os.utime(store.path(name), (number, number))
    reader = open_file(store, wanted[0])  # which uses it
    for name in wanted[3:5]:
        store.path(name)
    assert cached(store) == {wanted[0], *wanted[3:5]}
    store.fetch(wanted[5:8])
    assert cached(store) == set(wanted[5:8])
    content = (site.folder / wanted[0]).read_bytes()
    assert reader.read(len(content), 0) == content  # deleted, and still open
    assert same_as(site.folder, store)
    assert held(cache) <= bound(store, 3) * GIB
    open_store(site.url, cache=cache, cache_gib=bound(store, 1))
    assert len(cached(store)) == 1


def test_processes_share_a_cache_with_little_room(site: Site, cache: Path) -> None:
    store = open_store(site.url, cache=cache)
    store = open_store(site.url, cache=cache, cache_gib=bound(store, 2))
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    ranks = [context.Process(target=check, args=(store, site.folder, barrier, 3)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert held(cache) <= bound(store, 2) * GIB


class Losing(RemoteStore):
    """Another process needs the room of each file as soon as it is there, a few times."""

    left = 3

    def path(self, name: str) -> Path:
        path = super().path(name)
        if self.left:
            path.unlink()
            self.left -= 1
        return path


def test_a_file_given_up_before_it_is_opened_is_fetched_again(site: Site, cache: Path) -> None:
    store = open_store(site.url, cache=cache)
    assert isinstance(store, RemoteStore)
    store.__class__ = Losing
    content = (site.folder / names(store)[0]).read_bytes()
    assert open_file(store, names(store)[0]).read(len(content), 0) == content


def test_no_more_is_fetched_ahead_than_fits(site: Site, cache: Path) -> None:
    store = open_store(site.url, cache=cache)
    store = open_store(site.url, cache=cache, cache_gib=bound(store, 2))
    store.fetch(names(store))
    assert cached(store) >= set(names(store)[:2])
    assert sum(site.counts[name] > 0 for name in names(store)) < 4


def test_shards_of_an_older_manifest_are_given_up_first(site: Site, cache: Path) -> None:
    old = open_store(site.url, cache=cache)
    read_tables(old)
    old.fetch(names(old))
    (parts,) = cache.glob("*/*.parts")
    (parts / "left.tar").write_bytes(b"x" * 1000)
    (parts / "gone.tar").symlink_to("nowhere")  # as one that another process deletes meanwhile
    for path in cache.rglob("*.tar"):
        if path.exists():
            os.utime(path, (1, 1))
    change(site.folder, lambda manifest: dataclasses.replace(manifest, name="new"))
    new = open_store(site.url, cache=cache, cache_gib=bound(old, 2))
    new.fetch(names(new)[:2])
    assert cached(new) == set(names(new)[:2])
    assert not cached(old)
    assert not (parts / "left.tar").exists()
    assert same_as(site.folder, new)


@pytest.mark.parametrize(("gib", "said"), [(1e-9, "one shard alone has"), (0.0, "more than 0"), (-1.0, "more than 0")])
def test_a_cache_has_room_for_a_shard(site: Site, cache: Path, gib: float, said: str) -> None:
    with pytest.raises(ValueError, match=f"data.cache_gib is .*{said}"):
        open_store(site.url, cache=cache, cache_gib=gib)


def test_a_full_disk_is_told(site: Site, cache: Path) -> None:
    store = open_store(site.url, cache=cache)
    (parts,) = cache.glob("*/*.parts")
    full = parts / names(store)[0]
    full.symlink_to("/dev/full")
    store.fetch(names(store)[:1])  # says nothing, and leaves no part
    assert not full.is_symlink()
    full.symlink_to("/dev/full")
    said = f"the cache {cache}.*{os.strerror(errno.ENOSPC)}.*GiB are free.*MMFUSION_CACHE"
    with pytest.raises(ValueError, match=said):
        store.path(full.name)


def test_a_cache_that_cannot_be_made_is_told(site: Site, cache: Path) -> None:
    cache.write_text("a file")
    with pytest.raises(ValueError, match=f"the cache {cache}.*{os.strerror(errno.ENOTDIR)}"):
        open_store(site.url, cache=cache)


def test_the_cache_is_where_the_environment_says(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMFUSION_CACHE", str(tmp_path / "there"))
    store = open_store(site.url)
    assert store.path(names(store)[0]).is_relative_to(tmp_path / "there")


# addresses


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("s3:/bucket/folder", "expected two slashes: s3://"),
        ("s3://", "names no server or bucket"),
        ("http:///folder", "names no server or bucket"),
        ("nosuch://host/folder", "no protocol 'nosuch' is known; expected s3://"),
        ("simplecache::s3://bucket/folder", "chains protocols"),
        (
            "http://127.0.0.1:1/folder",
            r"http://127\.0\.0\.1:1/folder/manifest\.json.*Connect.*tried 2 times.*FSSPEC_HTTP",
        ),
        ("http://host:port/folder", "a port that is no number"),
    ],
)
def test_a_wrong_address_is_told(cache: Path, address: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        open_store(address, cache=cache)


def test_a_missing_package_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for protocol in ("gs", "gcs"):
        with pytest.raises(ValueError, match=r"gc?s://bucket/folder: .*pip install 'mmfusion\[gcs\]'"):
            open_store(f"{protocol}://bucket/folder", cache=cache)


def test_an_address_without_shards_is_told(site: Site, cache: Path) -> None:
    (site.folder / "manifest.json").rename(site.folder / "other.json")
    with pytest.raises(
        FileNotFoundError, match=f"{site.url}/x/manifest.json does not exist: expected a folder of shards"
    ):
        open_store(f"{site.url}/x", cache=cache)
    (site.folder / "manifest.json").write_text("<html>Please log in</html>")
    with pytest.raises(ValueError, match=r"is no manifest of shards.*<html>Please log in"):
        open_store(site.url, cache=cache)
    (site.folder / "manifest.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="is no manifest of shards"):
        open_store(site.url, cache=cache)
    site.faults = lambda name, before: "403"
    with pytest.raises(ValueError, match=r"manifest.json: no permission \(HTTP 403\): .*FSSPEC_HTTP_HEADERS"):
        open_store(site.url, cache=cache)


@pytest.mark.parametrize("name", ["../secret.tar", "/etc/passwd", "a/b.tar", "..", "", "manifest.json", "a\\b"])
def test_names_are_plain(site: Site, cache: Path, name: str) -> None:
    def renamed(manifest: Manifest) -> Manifest:
        first, *others = manifest.shards
        return dataclasses.replace(manifest, shards=[dataclasses.replace(first, name=name), *others])

    store = open_store(site.url, cache=cache)
    if name != "manifest.json":
        with pytest.raises(ValueError, match="plain file name"):
            store.path(name)
    change(site.folder, renamed)
    for address in (site.url, str(site.folder)):
        with pytest.raises(ValueError, match="plain file name"):
            open_store(address, cache=cache)


def test_a_file_that_the_manifest_does_not_list_is_no_shard(site: Site, cache: Path) -> None:
    with pytest.raises(ValueError, match=r"lists no other\.tar"):
        open_store(site.url, cache=cache).path("other.tar")


@pytest.mark.parametrize("fault", ["403", "404", "500", "dropped"])
def test_secrets_are_not_shown(site: Site, cache: Path, fault: str) -> None:
    host = site.url.removeprefix("http://")
    address = f"http://someone:pa%2Fss@{host}/folder?t0k=t0ps3cret&expires=never#fragment"
    store = open_store(address, cache=cache)
    assert site.headers["path"] == "/folder/manifest.json?t0k=t0ps3cret&expires=never"
    assert site.headers["Authorization"].startswith("Basic ")
    assert store.address == f"{site.url}/folder"
    store.path(names(store)[0])
    site.faults = lambda name, before: fault
    shown = [repr(store), repr(pickle.loads(pickle.dumps(store))), *map(str, cache.rglob("*"))]
    for failing in (lambda: store.path(names(store)[1]), lambda: open_store(address, cache=cache)):
        try:
            failing()
        except (ShardError, ValueError, FileNotFoundError) as error:
            shown += [str(error), repr(error), "".join(traceback.format_exception(error))]
    assert len(shown) > 8
    for secret in ("someone", "pa%2Fss", "pa/ss", "t0ps3cret", "t0k", "never", "fragment"):
        assert not [text for text in shown if secret in text]
    site.faults = lambda name, before: ""
    assert same_as(site.folder, pickle.loads(pickle.dumps(store)))


def test_what_others_say_is_shown_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "http", {"headers": {"Authorization": "Bearer c0nfigured"}, "port": "8080"})
    address = Address.parse("https://me:pa%2Fss@host/x?sig=s1gned%3D&n=10")
    said = "GET 'https://me:pa%2Fss@host/x/0.tar?sig=s1gned%3D&n=10': pa/ss, s1gned=, Bearer c0nfigured, 8080, 10"
    assert address.clean(said) == "GET 'https://host/x/0.tar': ***, ***, ***, 8080, 10"
    assert address.file("0 %.tar") == "https://me:pa%2Fss@host/x/0%20%25.tar?sig=s1gned%3D&n=10"
    assert "pa%2Fss" not in repr(address)
    quoted = Address.parse("https://me:it's(secret)@host/x")
    assert quoted.clean(f"GET {quoted.file('0.tar')}") == "GET https://host/x/0.tar"


@pytest.mark.parametrize(
    "address", ["https://me:se/cret@host/x", "s3://AKIA:se/cret@bucket/x", "http://me:se?cret@host"]
)
def test_a_password_that_looks_like_a_port_is_not_shown(cache: Path, address: str) -> None:
    with pytest.raises(ValueError, match="%2F") as caught:
        open_store(address, cache=cache)
    assert "se" not in str(caught.value).replace("these", "").replace("user", "")


# pipe


def test_a_command_runs_only_where_it_is_allowed(shards: Path, cache: Path, tmp_path: Path) -> None:
    address = f"pipe:touch {tmp_path}/ran; cat {shards}/{{name}}"
    with pytest.raises(ValueError, match=r"pipe:touch \.\.\., which runs a shell command.*data\.allow_pipe=true"):
        open_store(address, cache=cache)
    assert not (tmp_path / "ran").exists()
    store = open_store(address, cache=cache, allow_pipe=True)
    assert (tmp_path / "ran").exists()
    store.fetch(names(store))
    assert same_as(shards, store)


def test_names_are_quoted_for_the_shell(shards: Path, cache: Path, tmp_path: Path) -> None:
    name = "a'b \"$(touch ran)` `; touch ran.tar"

    def renamed(manifest: Manifest) -> Manifest:
        first, *others = manifest.shards
        (shards / first.name).rename(shards / name)
        return dataclasses.replace(manifest, shards=[dataclasses.replace(first, name=name), *others])

    change(shards, renamed)
    store = open_store(f"pipe:cd {shards}; cat {{name}}", cache=cache, allow_pipe=True)
    assert store.path(name).read_bytes() == (shards / name).read_bytes()
    assert not list(tmp_path.rglob("ran*"))


@pytest.mark.parametrize(
    ("command", "reason", "said"),
    [
        ("echo went wrong >&2; exit 3", "unreachable", r"exit status 3; stderr: went wrong \(tried 2 times\)"),
        (": --password hunter22; echo refused hunter22 >&2; exit 1", "unreachable", r"stderr: refused \*\*\*"),
        ("echo more", "unreachable", "gives more than the file's"),
        ("yes", "unreachable", "gives more than the file's"),
        ("exit 0", "checksum", "has the sha256"),
        ("sleep 60", "unreachable", "nothing came for 0.3 s"),
        ("exec >&-; sleep 60", "unreachable", "closed its output and did not end in 0.3 s"),
    ],
)
def test_a_command_that_fails_is_told(
    shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, command: str, reason: str, said: str
) -> None:
    monkeypatch.setattr(pipe, "SILENCE", 0.3)
    failing = f"case {{name}} in *.tar) {command} ;; esac;"
    store = open_store(f"pipe:{failing} cat {shards}/{{name}}", cache=cache, allow_pipe=True)
    with pytest.raises(ShardError, match=said) as caught:
        store.path(names(store)[0])
    assert caught.value.reason == reason
    assert "hunter22" not in str(caught.value)


def test_a_command_has_a_place_for_the_name(cache: Path) -> None:
    with pytest.raises(ValueError, match=r"pipe:cat \.\.\. has no {name}"):
        open_store("pipe:cat folder", cache=cache, allow_pipe=True)
    with pytest.raises(ValueError, match=r"exit status 1; stderr: cat: .*Expected the bytes of manifest\.json"):
        open_store("pipe:cat /nowhere/{name}", cache=cache, allow_pipe=True)


# S3


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The endpoint of an S3 server on this machine."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "an-id-for-tests")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-for-tests")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3: str, shards: Path) -> str:
    """The address of the shards there."""
    files = fsspec.filesystem("s3")
    files.makedirs("shards-bucket", exist_ok=True)
    files.put(f"{shards}/", "shards-bucket/some/folder/", recursive=True)
    return "s3://shards-bucket/some/folder"


def test_shards_on_s3(bucket: str, s3: str, shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(bucket + "/", cache=cache)
    assert isinstance(store, RemoteStore)
    assert store.address == bucket
    store.fetch(names(store))
    assert same_as(shards, store)
    shutil.rmtree(store.path("manifest.json").parent)
    forked = multiprocessing.get_context("fork").Process(target=fetch, args=(store, names(store)[:4]))
    forked.start()
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", s3)  # which fsspec reads when it is imported
    spawned = multiprocessing.get_context("spawn").Process(target=fetch, args=(store, names(store)[4:]))
    spawned.start()
    for worker in (forked, spawned):
        worker.join(120)
        assert worker.exitcode == 0
    assert cached(store) == set(names(store))


def test_shards_that_s3_does_not_have(bucket: str, cache: Path) -> None:
    store = open_store(bucket, cache=cache)
    first, second = names(store)[:2]
    files = fsspec.filesystem("s3")
    files.rm(f"{bucket}/{first}")
    files.pipe(f"{bucket}/{second}", b"other bytes")
    for name, reason in ((first, "missing shard"), (second, "checksum")):
        with pytest.raises(ShardError, match=f"{bucket}/{name}") as caught:
            store.path(name)
        assert caught.value.reason == reason
    with pytest.raises(
        FileNotFoundError,
        match=r"s3://no-such-bucket/x/manifest.json does not exist \(The specified bucket .*AWS_ENDPOINT",
    ):
        open_store("s3://no-such-bucket/x", cache=cache)
    with pytest.raises(
        FileNotFoundError, match=r"s3://shards-bucket/x/manifest.json does not exist \(The specified key"
    ):
        open_store("s3://shards-bucket/x", cache=cache)


def test_s3_without_permission(site: Site, cache: Path) -> None:
    """A process of its own, as the package keeps what it found in the environment."""
    site.faults = lambda name, before: "403"
    code = "from datamodules.stores.store import open_store; open_store('s3://bucket/x')"
    environment = {**os.environ, "AWS_ENDPOINT_URL_S3": site.url, "AWS_ACCESS_KEY_ID": "an-id-for-tests"}
    environment |= {"AWS_SECRET_ACCESS_KEY": "a-secret-for-tests", "MMFUSION_CACHE": str(cache)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "ValueError: s3://bucket/x/manifest.json: no permission (Forbidden): expected a folder" in run.stderr
    assert "AWS_PROFILE" in run.stderr
    assert "-for-tests" not in run.stderr


# Training


def batches(path: str, **options: Any) -> list[Any]:
    """Two epochs of training, and all of validation and test."""
    data = TupleDataModule(path, batch_size=16, image_size=8, eval_batch_size=16, **options)
    data.setup("fit")
    trained = [batch for _ in range(2) for batch in data.train_dataloader()]
    evaluated = [batch for loader in (*data.val_dataloader(), *data.test_dataloader()) for batch in loader]
    data.teardown("fit")
    return trained + evaluated


def test_training_reads_the_same_from_everywhere(site: Site, bucket: str, shards: Path, cache: Path) -> None:
    expected = batches(str(shards))
    assert len(expected) > 8
    little = 3 * max(path.stat().st_size for path in shards.glob("*.tar")) / GIB
    site.faults = lambda name, before: "dropped" if before % 5 == 1 else ""
    for path, options in (
        (site.url, {"cache_gib": little}),
        (site.url, {"workers": 2}),
        (bucket, {}),
        (bucket, {"workers": 2, "cache_gib": little}),
    ):
        shutil.rmtree(cache, ignore_errors=True)
        found = batches(path, cache=str(cache), **options)
        assert [same(*pair) for pair in zip(expected, found, strict=True)] == [True] * len(expected)
    assert held(cache) <= little * GIB
