"""Folders filled by several at once, with products that cannot be read: each part once, nothing lost for good."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfusion.encoders import TimmEncoder
from mmfusion.feature_cache import FeatureFolder, open_stored, todo
from mmfusion.feature_cache.build import build
from mmfusion.feature_cache.todo import Job
from mmfusion.memo import FeatureMemo
from tests.ddp import run_ranks
from tests.small_run import small_data, small_shards

KEY = {"of": "photos"}
PRODUCTS, PART = 64, 16
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


@contextmanager
def uncounted(*_: object) -> Iterator[object]:
    yield lambda _: None


def job_on(folder: Path) -> Job:
    torch.manual_seed(1)
    encoder = TimmEncoder("test_vit", image_size=(32, 32), augment="none").eval().requires_grad_(False)
    return Job(encoder, "products", FeatureFolder(folder, KEY, PRODUCTS, False, part=PART), FeatureMemo(False, 0))


def data_of(shards: Path, **options: object):
    data = small_data(shards, eval_batch_size=16, **options)
    data.setup("fit")
    return data


def built(shards: Path, folder: Path, **options: object) -> torch.Tensor:
    job = job_on(folder)
    with torch.no_grad():
        build([job], data_of(shards, **options), CPU, uncounted)
    stored = open_stored(folder, KEY)
    assert stored is not None
    return stored(torch.arange(PRODUCTS)).pooled


def test_who_comes_second_takes_what_the_first_has_not_begun(shards: Path, tmp_path: Path) -> None:
    expected = built(shards, tmp_path / "alone")
    first = FeatureFolder(tmp_path / "f", KEY, PRODUCTS, False, part=PART)
    rows = range(16, 32)
    claim = first.claim(rows)
    assert claim is not None
    assert first.claim(rows) is None
    job, data = job_on(tmp_path / "f"), data_of(shards)
    asked: list[int] = []
    read = data.product_batches
    data.product_batches = lambda ids: asked.extend(ids.tolist()) or read(ids)

    def finish_later() -> None:
        while len(list((tmp_path / "f").glob("*.part"))) < 3:
            time.sleep(0.01)
        os.link(tmp_path / "alone" / "00001.part", tmp_path / "f" / "00001.part")
        claim.release()

    other = threading.Thread(target=finish_later)
    other.start()
    with torch.no_grad():
        build([job], data, CPU, uncounted)
    other.join()
    assert sorted(asked) == [id for id in range(PRODUCTS) if id not in rows], "what another encodes is not decoded"
    stored = open_stored(tmp_path / "f", KEY)
    assert stored is not None
    assert torch.equal(stored(torch.arange(PRODUCTS)).pooled, expected)
    assert not list((tmp_path / "f").glob("*.building"))


def lost(data: object, ids: set[int]) -> None:
    """As if these could not be read."""
    read = data.product_batches

    def some(wanted: np.ndarray):
        for batch in read(wanted):
            gone = torch.tensor([id in ids for id in batch.id.tolist()])
            batch.valid &= ~gone
            batch.present[gone] = False
            batch.photo[gone] = 0
            yield batch

    data.product_batches = some


def test_what_could_not_be_read_is_read_again(shards: Path, tmp_path: Path) -> None:
    expected = built(shards, tmp_path / "whole")
    folder, data = tmp_path / "f", data_of(shards, max_broken=0.5)
    lost(data, {3, 20, 21})
    with torch.no_grad():
        build([job_on(folder)], data, CPU, uncounted)
        before = open_stored(folder, KEY)
        assert before.unread == 3
        times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.part")}
        build([job_on(folder)], data, CPU, uncounted)
        assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.part")} == times, "nothing is new"
        again = data_of(shards, max_broken=0.5)
        lost(again, {3})
        build([job_on(folder)], again, CPU, uncounted)
    after = open_stored(folder, KEY)
    assert (before.unread, after.unread) == (3, 1)
    changed = [name for name, at in times.items() if (folder / name).stat().st_mtime_ns != at]
    assert changed == ["00001.part"]
    found = after(torch.arange(PRODUCTS)).pooled
    others = [id for id in range(PRODUCTS) if id != 3]
    assert torch.equal(found[others], expected[others])


def test_the_limit_is_of_the_whole_table_and_leaves_the_parts_of_others(shards: Path, tmp_path: Path) -> None:
    folder, data = tmp_path / "f", data_of(shards, max_broken=3 / PRODUCTS)
    lost(data, {1, 20, 40})
    with torch.no_grad():
        build([job_on(folder)], data, CPU, uncounted)
    folder, data = tmp_path / "g", data_of(shards, max_broken=2 / PRODUCTS)
    lost(data, {1, 20, 40})
    with pytest.raises(ValueError, match=r"g: 3 of 64 products cannot be read.*data.max_broken"), torch.no_grad():
        build([job_on(folder)], data, CPU, uncounted)
    assert sorted(path.name for path in folder.glob("*.part")) == ["00000.part", "00001.part", "00002.part"]
    with pytest.raises(ValueError, match=r"g: 3 of 64 products"), torch.no_grad():
        build([job_on(folder)], data, CPU, uncounted)


def one_fails(rank: int, world: int, shards: Path, folder: Path, where: str) -> str:
    """What each rank hears."""
    job = job_on(folder)
    todo.LEAST = PART  # else the first rank takes all of so few
    if rank == 0:
        job.encoder.register_forward_pre_hook(lambda *_: time.sleep(0.3))
    elif where == "missing":
        job.folder.missing = lambda: 1 / 0
    else:
        job.encoder.register_forward_hook(lambda *_: 1 / 0)
    try:
        with torch.no_grad():
            build([job], data_of(shards), CPU, uncounted)
    except (RuntimeError, ZeroDivisionError) as error:
        return str(error)
    return "fine"


@pytest.mark.parametrize("where", ["missing", "encoding"])
def test_a_rank_that_fails_alone_takes_the_others_with_it(shards: Path, tmp_path: Path, where: str) -> None:
    told = run_ranks(one_fails, 2, shards, tmp_path / "f", where)
    assert told == ["rank 1 failed: ZeroDivisionError: division by zero", "division by zero"]


def test_what_is_forbidden_is_missed(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(shards, tmp_path / "f")
    opened = os.open

    def forbidden(path: object, *options: object, **named: object) -> int:
        if str(path) == str(tmp_path / "f"):
            raise PermissionError(13, "Permission denied")
        return opened(path, *options, **named)

    monkeypatch.setattr(os, "open", forbidden)
    assert open_stored(tmp_path / "f", KEY) is None
    assert open_stored(tmp_path / "nowhere", KEY) is None
