"""One map by this process, by several or by Ray: the same results and the same bytes; no process is left behind."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from datamodules.importing.jobs import run_map, workers
from datamodules.photos.files import photos_of
from datamodules.photos.options import PhotoOptions
from tests.datamodules.small import convert, small_catalogue


def square(number: int) -> int:
    return number**2


def killed(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def slow(number: int) -> int:
    time.sleep(0 if number == 0 else 60)
    return number


@pytest.mark.parametrize("jobs", [0, -1, "four", 1.5, True, "Ray"])
def test_jobs_that_cannot_be(jobs: Any) -> None:
    with pytest.raises(ValueError, match=r"jobs is .*; expected a number of processes from 1 on, or ray"):
        workers(jobs)


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_task_gives_its_result(jobs: int) -> None:
    assert sorted(run_map(square, range(20), jobs)) == [number**2 for number in range(20)]
    assert not multiprocessing.active_children()


def test_our_own_error_comes_back_as_it_was_raised(tmp_path: Path) -> None:
    """In a file of ours, so that the command prints its message alone."""
    photos = photos_of(small_catalogue(tmp_path / "small"), PhotoOptions())
    assert photos is not None
    with pytest.raises(ValueError, match="leads out of the folder of photos") as found:
        list(run_map(photos.signature, [["p1.png"], ["../p1.png"]], 2))
    assert found.traceback[-1].path.name == "outcomes.py"
    assert not multiprocessing.active_children()


def test_whoever_stops_early_waits_for_nobody() -> None:
    results = run_map(slow, range(100), 2)
    assert next(results) == 0
    assert isinstance(results, Iterator)
    results.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_a_process_that_is_killed_is_told() -> None:
    with pytest.raises(ValueError, match="a process that wrote shards was killed"):
        list(run_map(killed, range(6), 2))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_bytes_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    folder = small_catalogue(tmp_path / "small", labels=("label", "stars"), tar=True)
    options: dict = {"photos": PhotoOptions(max_side=6), "shard_size": 5}
    convert(str(folder), str(tmp_path / "one"), **options)
    convert(str(folder), str(tmp_path / "two"), jobs=2, **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_ray_writes_the_same_bytes(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    folder = small_catalogue(tmp_path / "small")
    convert(str(folder), str(tmp_path / "one"))
    on_sigterm = signal.getsignal(signal.SIGTERM)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        convert(str(folder), str(tmp_path / "ray"), jobs="ray")
        (folder / "images" / "p1.png").write_bytes(b"no photo")
        with pytest.raises(ValueError, match=r"row 2 \(line 3\): the photo of product 'p1'"):
            convert(str(folder), str(tmp_path / "broken"), jobs="ray")
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray leaves its own, in a process that other tests go on in
    assert contents(tmp_path / "one") == contents(tmp_path / "ray")
