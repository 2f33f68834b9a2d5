"""The least recently used features go first, those in use never, and nothing else is touched."""

import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch

from mmfusion.encoders import Encoded
from mmfusion.feature_cache import CacheOptions, FeatureFolder, make_room, open_stored

KIB = 1024
NAMES = ["a" * 32, "b" * 32, "c" * 32]
KEY = {"of": "room"}


def limit(kib: float) -> CacheOptions:
    return CacheOptions(limit_gib=kib * KIB / 2**30)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three folders of 10 KiB, the first one used last, and what is none of ours."""
    root = tmp_path / "features"
    for age, name in enumerate(NAMES):
        (root / name).mkdir(parents=True)
        (root / name / "00000.part").write_bytes(bytes(10 * KIB))
        mark = root / name / ("complete.json" if age else "description.json")
        mark.touch()
        os.utime(mark, (1e9 - age, 1e9 - age))
    (root / "mine").mkdir()
    (root / "mine" / "thesis.tex").write_bytes(bytes(100 * KIB))
    (root / "notes.txt").touch()
    return root


def left(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name in NAMES)


def test_what_fits_deletes_nothing(root: Path) -> None:
    assert make_room(root, 10 * KIB, set(), limit(40)) == []
    assert left(root) == NAMES


@pytest.mark.parametrize(("needed", "gone"), [(11, 1), (20, 1), (21, 2), (31, 3), (40, 3)])
def test_least_recently_used_go_first(root: Path, needed: int, gone: int) -> None:
    oldest_first = [root / name for name in NAMES[::-1]]
    assert make_room(root, needed * KIB, set(), limit(40)) == oldest_first[:gone]
    assert left(root) == NAMES[: 3 - gone]
    assert (root / "mine" / "thesis.tex").exists()
    assert (root / "notes.txt").exists()
    assert not [path for path in root.iterdir() if path.name.startswith(".")]


def test_what_is_kept_counts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    keep = {Path(NAMES[2]), root / NAMES[1]}
    assert make_room(root, 20 * KIB, keep, limit(40)) == [root / NAMES[0]]
    with pytest.raises(ValueError, match="in use"):
        make_room(root, 21 * KIB, keep, limit(40))
    assert left(root) == NAMES[1:]


def test_refused_before_anything_is_deleted(root: Path) -> None:
    said = (
        r"needs 4\.\d+e-05 GiB in .*features.*model.cache.limit_gib is 3\.8147e-05.*GiB free.*raise "
        "model.cache.limit_gib.*model.cache.folder.*model.cache.use=off"
    )
    with pytest.raises(ValueError, match=said):
        make_room(root, 45 * KIB, set(), limit(40))
    assert left(root) == NAMES


def test_the_disk_must_have_room_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5 * KIB))
    assert make_room(root, 15 * KIB, set(), CacheOptions()) == [root / NAMES[2]]
    with pytest.raises(ValueError, match=r"the disk has 4\.77e-06 GiB free"):
        make_room(root, 26 * KIB, set(), CacheOptions())
    assert left(root) == NAMES[:2]


def test_a_root_that_is_not_there_yet(tmp_path: Path) -> None:
    assert make_room(tmp_path / "a" / "b", KIB, set(), limit(40)) == []
    with pytest.raises(ValueError, match="limit_gib"):
        make_room(tmp_path / "a" / "b", 41 * KIB, set(), limit(40))
    assert not (tmp_path / "a").exists()


def test_what_a_killed_deletion_left_goes(root: Path) -> None:
    (root / NAMES[0]).rename(root / f".deleted-{NAMES[0]}-1234")
    assert make_room(root, KIB, set(), limit(40)) == []
    assert not list(root.glob(".deleted-*"))


def built(root: Path, name: str) -> FeatureFolder:
    folder = FeatureFolder(root / name, KEY, 4, keep_tokens=False)
    folder.write(range(4), Encoded.pooled_only(torch.ones(4, 2)))
    return folder


def test_what_is_open_stays(root: Path) -> None:
    """While it is built, and while it is read."""
    name = "d" * 32
    folder = built(root, name)
    os.utime(root / name / "description.json", (0, 0))
    assert make_room(root, 36 * KIB, set(), limit(40)) == [root / old for old in NAMES[::-1]]
    stored = folder.finish()
    del folder
    os.utime(root / name / "complete.json", (0, 0))
    with pytest.raises(ValueError, match="in use"):
        make_room(root, 40 * KIB, set(), limit(40))
    del stored
    assert make_room(root, 40 * KIB, set(), limit(40)) == [root / name]


def _hold(folder: Path, opened: object, enough: object) -> None:
    stored = open_stored(folder, KEY)
    opened.set()
    enough.wait(60)
    assert torch.equal(stored(torch.arange(4)).pooled, torch.ones(4, 2))


def test_what_another_process_has_open_stays(root: Path) -> None:
    name, context = "d" * 32, multiprocessing.get_context("fork")
    built(root, name).finish()
    opened, enough = context.Event(), context.Event()
    reader = context.Process(target=_hold, args=(root / name, opened, enough))
    reader.start()
    assert opened.wait(60)
    os.utime(root / name / "complete.json", (0, 0))
    with pytest.raises(ValueError, match="in use"):
        make_room(root, 40 * KIB, set(), limit(40))
    enough.set()
    reader.join(60)
    assert reader.exitcode == 0
    assert root / name in make_room(root, 40 * KIB, set(), limit(40))


def test_a_use_makes_it_young(root: Path) -> None:
    name = "d" * 32
    built(root, name).finish()
    os.utime(root / name / "complete.json", (0, 0))
    assert open_stored(root / name, KEY) is not None
    assert root / name not in make_room(root, 30 * KIB, set(), limit(42))
    assert (root / name).exists()


def test_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MMFUSION_CACHE", raising=False)
    assert CacheOptions().root() == tmp_path / ".cache" / "mmfusion" / "features"
    assert CacheOptions(folder="~/x").root() == tmp_path / "x" / "features"
    monkeypatch.setenv("MMFUSION_CACHE", "/there")
    assert CacheOptions().root() == Path("/there/features")
    assert CacheOptions(folder="/here").root() == Path("/here/features")
    for wrong in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=r"limit_gib is .*model.cache.use=off"):
            CacheOptions(limit_gib=wrong)
    with pytest.raises(ValueError, match="local folder"):
        CacheOptions(folder="s3://bucket/features")
