"""Checkpoints' files: sums that sha256sum accepts, the former kept, and whatever moment kills a save, one is whole."""

import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from mmfusion.checkpoints import BEFORE, BEST, LAST, WholeFiles
from mmfusion.sums import SUMS, damage, read_sums
from tests.ddp import RankError, run_ranks


def checkpoint(step: int) -> dict:
    return {"step": step, "state_dict": {"weight": torch.arange(2000.0) + step}}


def step_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["step"]


def save(folder: Path, *steps: int, name: str = LAST) -> WholeFiles:
    files = WholeFiles()
    for step in steps:
        files.save_checkpoint(checkpoint(step), folder / name)
    return files


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def accepted(folder: Path) -> bool:
    return (
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=folder, check=False).returncode == 0
    )


def test_the_former_last_is_kept_and_all_is_as_sha256sum_says(tmp_path):
    files = save(tmp_path, 1)
    assert names(tmp_path) == {LAST, SUMS}
    for step in (2, 3):
        files.save_checkpoint(checkpoint(step), tmp_path / LAST)
        files.save_checkpoint(checkpoint(step), tmp_path / BEST)
        assert accepted(tmp_path)
        assert (step_of(tmp_path / LAST), step_of(tmp_path / BEFORE)) == (step, step - 1)
    assert names(tmp_path) == {LAST, BEFORE, BEST, SUMS}, "only of last is the former kept"
    assert set(read_sums(tmp_path)) == {LAST, BEFORE, BEST}
    (tmp_path / BEST).unlink()
    files.save_checkpoint(checkpoint(4), tmp_path / LAST)
    assert accepted(tmp_path), "what was removed has no sum any more"


def test_where_links_are_not_possible_the_former_is_renamed(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", link)
    save(tmp_path, 1, 2, 3)
    assert (step_of(tmp_path / LAST), step_of(tmp_path / BEFORE)) == (3, 2)
    assert names(tmp_path) == {LAST, BEFORE, SUMS}
    assert accepted(tmp_path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(1000.0, 1010.0).numpy().tobytes())] ^= 1  # of a weight, not of padding
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


@pytest.mark.parametrize("harm", [flip, cut])
@pytest.mark.parametrize("summed", [True, False])
def test_a_damaged_file_is_told_and_not_loaded(tmp_path, harm, summed):
    save(tmp_path, 1, 2)
    if not summed:
        (tmp_path / SUMS).unlink()
        assert WholeFiles().load_checkpoint(tmp_path / LAST, weights_only=True)["step"] == 2, "of a version before"
    harm(tmp_path / LAST)
    with pytest.raises(ValueError, match=rf"{LAST} is damaged: .*\. Whole are {tmp_path / BEFORE}; RESUME=auto"):
        WholeFiles().load_checkpoint(tmp_path / LAST, weights_only=True)
    assert WholeFiles().load_checkpoint(tmp_path / BEFORE, weights_only=True)["step"] == 1
    harm(tmp_path / BEFORE)
    with pytest.raises(ValueError, match="No other checkpoint in"):
        WholeFiles().load_checkpoint(tmp_path / LAST, weights_only=True)


def test_a_file_that_is_another_whole_checkpoint_is_told(tmp_path):
    save(tmp_path, 1, 2)
    shutil.copy(tmp_path / BEFORE, tmp_path / LAST)
    assert "sha256" in damage(tmp_path / LAST)


def test_a_former_that_may_be_damaged_does_not_replace_one_that_is_whole(tmp_path):
    save(tmp_path, 1, 2)
    cut(tmp_path / LAST)
    files = WholeFiles()
    assert files.load_checkpoint(tmp_path / BEFORE, weights_only=True)["step"] == 1
    files.save_checkpoint(checkpoint(2), tmp_path / LAST)
    assert (step_of(tmp_path / LAST), step_of(tmp_path / BEFORE)) == (2, 1)
    files = WholeFiles()
    files.load_checkpoint(tmp_path / LAST, weights_only=True)
    files.save_checkpoint(checkpoint(3), tmp_path / LAST)
    assert (step_of(tmp_path / LAST), step_of(tmp_path / BEFORE)) == (3, 2), "one that was read is whole"
    assert accepted(tmp_path)


def test_sums_that_are_none_are_told(tmp_path):
    save(tmp_path, 1)
    (tmp_path / SUMS).write_text("hello\n")
    with pytest.raises(ValueError, match=f"{SUMS} holds 'hello'; expected"):
        WholeFiles().load_checkpoint(tmp_path / LAST)


def test_a_save_that_fails_leaves_nothing_half_written(tmp_path, monkeypatch):
    save(tmp_path, 1, 2)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    files = WholeFiles()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.save_checkpoint(checkpoint(3), tmp_path / LAST)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def overfill(rank: int, world: int, folder: Path, size: int) -> str:
    """The error of a save where no file may have more than `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))
    try:
        save(folder, 3)
    except OSError as error:
        return str(error)
    return "none"


@pytest.mark.parametrize("size", [100, 5000])
def test_a_file_that_cannot_grow_is_told_as_that(tmp_path, size):
    save(tmp_path, 1)
    before = (tmp_path / LAST).read_bytes()
    assert run_ranks(overfill, 1, tmp_path, size) == ["[Errno 27] File too large"]
    assert (tmp_path / LAST).read_bytes() == before
    assert names(tmp_path) == {LAST, SUMS}


CALLS = ("replace", "link", "fsync")


def die_at(rank: int, world: int, folder: Path, calls: int, links: bool) -> int:
    """Saves step 3 over 2, and is killed at the `calls`-th call that changes what is on disk; its number of calls."""
    made = 0

    def counted(call):
        def wrapped(*args, **kwargs):
            nonlocal made
            made += 1
            if made == calls:
                os.kill(os.getpid(), signal.SIGKILL)
            if call is os_link and not links:
                raise PermissionError
            return call(*args, **kwargs)

        return wrapped

    os_link = os.link
    files = WholeFiles()
    files.load_checkpoint(folder / LAST, weights_only=True)
    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    files.save_checkpoint(checkpoint(3), folder / LAST)
    return made


@pytest.mark.parametrize("links", [True, False])
def test_whatever_moment_kills_a_save_the_newest_or_the_one_before_is_whole(tmp_path, links):
    found = []
    for calls in range(1, 30):
        folder = tmp_path / str(calls)
        folder.mkdir()
        save(folder, 1, 2)
        try:
            made = run_ranks(die_at, 1, folder, calls, links)
        except RankError as error:
            if "exit code -9" not in str(error):
                raise
        else:
            assert made == [calls - 1]
            break
        present = [folder / name for name in (LAST, BEFORE) if (folder / name).is_file()]
        assert [damage(path) for path in present] == [None] * len(present)
        assert set(present) >= {folder / LAST} if links else present
        steps = [step_of(path) for path in present]
        assert steps in ([2, 1], [2, 2], [3, 2], [2])
        found.append(tuple(steps))
        files = WholeFiles()
        files.load_checkpoint(present[0], weights_only=True)
        files.save_checkpoint(checkpoint(4), folder / LAST)
        assert step_of(folder / LAST) == 4
        assert damage(folder / LAST) is None
        assert damage(folder / BEFORE) is None
        files.save_checkpoint(checkpoint(5), folder / LAST)
        assert accepted(folder)
        assert names(folder) == {LAST, BEFORE, SUMS}
    assert calls == len(found) + 1 < 29
    assert {(2, 1), (3, 2)} < set(found), "kills before, between and after the renames"
