"""Loaders: the same batches whatever the workers and ranks; broken photos are counted."""

import multiprocessing
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.shards import Shards
from datamodules.stream import lookahead, tars
from datamodules.stream.batches import Reader
from datamodules.stream.loaders import CorpusLoader, Share, TupleLoader
from datamodules.stream.lookahead import LookAhead
from datamodules.tuples import TupleDataModule
from tests.datamodules.damage import Elsewhere, copied, overwrite
from tests.datamodules.drawn import PRODUCTS, SIZE, Tables, draw_shards, module, same, tuples_of


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    return draw_shards(tmp_path_factory.mktemp("catalogue"))


def of_rank(data: TupleDataModule, rank: int, ranks: int, **options: float) -> TupleLoader:
    return TupleLoader(data.plan, data.slots, data.reader, lambda: (0, 0), rank=rank, ranks=ranks, **options)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_do_not_depend_on_workers(tables: Tables, workers: int) -> None:
    alone = list(module(tables).train_dataloader())
    helped = list(module(tables, workers=workers, photo_cache_mib=0).train_dataloader())
    assert len(alone) == len(helped) > 3
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iteration_begins_where_progress_says(tables: Tables, workers: int) -> None:
    data, progress = module(tables), (2, 0)
    loader = TupleLoader(data.plan, data.slots, data.reader, lambda: progress, workers=workers)
    whole = list(loader)
    begun = iter(loader)
    next(begun)  # an iteration that is left in the middle does not disturb the next one
    progress = (2, 3)
    assert loader.state_dict() == {"seed": 0, "epoch": 2, "step": 3}
    rest = list(loader)
    assert len(whole) == len(loader) == len(rest) + 3
    assert all(same(a, b) for a, b in zip(whole[3:], rest, strict=True))


@pytest.mark.parametrize("epoch", ["products", "pairs"])
def test_steps_do_not_depend_on_ranks(tables: Tables, epoch: str) -> None:
    data = module(tables, epoch=epoch)
    whole = [tuples_of(batch) for batch in data.train_dataloader()]
    for ranks in (2, 4):
        for step, batches in enumerate(zip(*(of_rank(data, rank, ranks) for rank in range(ranks)), strict=True)):
            assert [len(batch) for batch in batches] == [16 // ranks] * ranks
            assert [row for batch in batches for row in tuples_of(batch)] == whole[step]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 50), st.integers(1, 9), st.integers(1, 20))
def test_shares_of_ranks_are_equally_long_and_hold_each_row_once(rows: int, ranks: int, batch_size: int) -> None:
    ids = np.random.default_rng(rows).permutation(100)[:rows]
    parts = [Share.of(ids, rank, ranks).parts(batch_size) for rank in range(ranks)]
    assert len({tuple(len(part.id) for part in own) for own in parts}) == 1
    valid = [id for own in parts for part in own for id in part.id[part.valid]]
    assert valid == ids.tolist()
    assert all(np.isin(part.id, ids).all() for own in parts for part in own)  # what pads is real, too
    assert all(0 < len(part.id) <= batch_size for own in parts for part in own)


def test_evaluation_draws_are_fixed(tables: Tables) -> None:
    data = module(tables)
    corpus = list(data.corpus_loader())
    helped = list(module(tables, workers=2, photo_cache_mib=0).corpus_loader())
    assert all(same(a, b) for a, b in zip(corpus, helped, strict=True))
    draws = {draw for batch in corpus for draw in batch.draw.tolist()}
    assert len(draws) == PRODUCTS
    assert not draws & {draw for batch in data.train_dataloader() for draw in batch.product.draw.tolist()}
    assert same(data.products(np.arange(16)), corpus[0])


def spoiled(tables: Tables, tmp_path: Path, photos: int) -> Path:
    """A copy of the shards in which the first photos of trainable products are overwritten with zeros."""
    path = tmp_path / "spoiled"
    shutil.copytree(tables.path, path)
    index = Shards.open(path).index
    for id in np.flatnonzero(index.photo & index.trainable)[:photos]:
        tar = path / f"{index.shard[id]:05d}.tar"
        content = bytearray(tar.read_bytes())
        start = content.index(b"\x89PNG", index.offset[id], index.offset[id] + index.size[id])
        content[start : start + 60] = bytes(60)
        tar.write_bytes(content)
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_photos_are_absent_and_told_of(tables: Tables, tmp_path: Path, workers: int) -> None:
    path = spoiled(tables, tmp_path, photos=3)
    data = TupleDataModule(str(path), batch_size=16, image_size=SIZE, workers=workers, max_broken=0.1)
    data.setup("fit")
    photos = data.shards.index.photo
    loader, corpus = data.train_dataloader(), data.corpus_loader()
    batches = list(loader)
    with pytest.warns(UserWarning, match=r"epoch 0: 3 of 80 products .*\(3 not a photo\).*00000.tar \(3\)"):
        loader.failures.warn()
    absent = [p for batch in batches for p in batch.product.id[~batch.product.present[:, 1]].tolist() if photos[p]]
    assert len(absent) == 3
    list(corpus)
    with pytest.warns(UserWarning, match=r"corpus: 3 of 150 products failed"):
        corpus.failures.warn()


def test_too_many_broken_photos_stop_the_epoch(tables: Tables, tmp_path: Path) -> None:
    data = TupleDataModule(str(spoiled(tables, tmp_path, photos=3)), batch_size=16, image_size=SIZE, max_broken=0.02)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"2 of 80 products .* most in shards 00000.tar .* data.max_broken=0.02"):
        list(data.train_dataloader())


@pytest.fixture
def damaged(tables: Tables, tmp_path: Path) -> Path:
    """Shards in which three products that the first epoch shows cannot be read."""
    path = copied(tables, tmp_path)
    for id in next(iter(module(tables).train_dataloader())).product.id[:3].tolist():
        overwrite(path, id, b"")
    return path


@pytest.mark.filterwarnings("ignore:epoch 0")
@pytest.mark.parametrize("epoch", [pytest.param("products", marks=pytest.mark.slow), "pairs"])
def test_who_takes_the_place_of_a_lost_product_depends_on_neither_ranks_nor_workers(damaged: Path, epoch: str) -> None:
    options = {"batch_size": 16, "image_size": SIZE, "max_broken": 1.0, "epoch": epoch, "photo_cache_mib": 0}
    data, helped = (TupleDataModule(str(damaged), workers=workers, **options) for workers in (0, 2))
    data.setup("fit")
    helped.setup("fit")
    whole = [tuples_of(batch) for batch in data.train_dataloader()]
    assert [tuples_of(batch) for batch in helped.train_dataloader()] == whole
    for ranks in (2, 4):
        parts = [[tuples_of(batch) for batch in of_rank(data, rank, ranks, max_broken=1.0)] for rank in range(ranks)]
        assert [[row for part in step for row in part] for step in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_lost_products_are_counted_and_limited(damaged: Path, workers: int) -> None:
    options = {"batch_size": 16, "image_size": SIZE, "eval_batch_size": 16, "workers": workers}
    data = TupleDataModule(str(damaged), max_broken=0.1, **options)
    data.setup("fit")
    loader = data.train_dataloader()
    said = r"epoch 0: 3 of 80 products failed \(3 wrong member\).*the 3 that could not be read at all were replaced"
    list(loader)
    with pytest.warns(UserWarning, match=said):
        counts = data.failures()
    assert counts == {**dict.fromkeys(counts, 0), "wrong member": 3}
    corpus = data.corpus_loader()
    assert sum(len(batch.id) for batch in corpus) == 150
    with pytest.warns(UserWarning, match=r"corpus: 3 of 150 .*the 3 .* were taken without text and photo"):
        corpus.failures.warn()
    data.max_broken = 0.01
    for passing in (data.corpus_loader(), data.train_dataloader()):
        with pytest.raises(ValueError, match=r"failed \(\d wrong member\).*data.max_broken=0.01"):
            list(passing)


def test_a_row_that_pads_is_not_counted_twice(tables: Tables, tmp_path: Path) -> None:
    path = copied(tables, tmp_path)
    overwrite(path, PRODUCTS - 1, b"")
    reader = Reader(Shards.open(path), module(tables).look, 0.5, 0)
    shares = [Share.of(np.arange(PRODUCTS), rank, 4) for rank in range(4)]
    assert (~shares[3].valid).sum() == 2
    counts = []
    for share in shares:
        loader = CorpusLoader(reader, share, 5, seed=0, workers=0)
        counts += [len(failed) for _, failed in map(loader._read, loader.parts)]
    assert sum(counts) == 1


def remote(path: Path, tables: Tables, **options: int) -> tuple[TupleDataModule, Elsewhere]:
    """A datamodule on shards that a store has elsewhere."""
    store = Elsewhere(path)
    data = module(tables, batch_size=8, **options)
    data.reader = Reader(Shards.open(store), data.look, 0.5, 0)
    store.fetched.clear()
    return data, store


def names(fetched: list[list[str]]) -> set[str]:
    return {name for some in fetched for name in some}


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_from_elsewhere_are_fetched_ahead_of_their_step(
    tables: Tables, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookahead, "STEPS", 2)
    expected = [tuples_of(batch) for batch in module(tables, batch_size=8).train_dataloader()]
    data, store = remote(copied(tables, tmp_path), tables)
    data.workers = workers
    loader = data.train_dataloader()
    got, batches = [], iter(loader)
    got.append(tuples_of(next(batches)))
    assert ahead_threads(), "a thread fetches"
    got += [tuples_of(batch) for batch in batches]
    assert got == expected
    assert not ahead_threads(wait=True)
    assert workers == 0 or names(store.fetched) == {f"{n:05d}.tar" for n in range(8)}, "not by the workers alone"
    data.teardown("fit")


def ahead_threads(wait: bool = False) -> list[threading.Thread]:
    threads = [thread for thread in threading.enumerate() if thread.name == "look-ahead"]
    for thread in threads if wait else []:
        thread.join(10)
    return [thread for thread in threads if thread.is_alive()]


def test_a_loader_that_is_left_ends_its_look_ahead(tables: Tables, tmp_path: Path) -> None:
    data, _ = remote(copied(tables, tmp_path), tables)
    batches = iter(data.train_dataloader())
    next(batches)
    del batches
    assert not ahead_threads(wait=True)


def test_look_ahead_stays_within_its_steps(tables: Tables, tmp_path: Path) -> None:
    _, store = remote(copied(tables, tmp_path), tables)
    asked: list[int] = []
    arrived = threading.Condition()

    def shards_of(step: int) -> list[int]:
        with arrived:
            asked.append(step)
            arrived.notify()
        return [step % 8]

    ahead = LookAhead(Shards.open(store).tars, shards_of, first=5, last=200)
    with arrived:
        assert arrived.wait_for(lambda: len(asked) == lookahead.STEPS, 10)
    ahead.at(60)  # what lies behind is not fetched any more
    with arrived:
        assert arrived.wait_for(lambda: asked[-1] == 60 + lookahead.STEPS, 10)
    ahead.close()
    assert not ahead_threads(wait=True)
    assert asked == [*range(5, 5 + lookahead.STEPS), *range(61, 61 + lookahead.STEPS)]


def test_reading_asks_for_all_shards_of_a_request_at_once(tables: Tables, tmp_path: Path) -> None:
    data, store = remote(copied(tables, tmp_path), tables)
    ids = np.array([0, 60, 1, 149])
    for _ in range(2):
        data.reader.products(ids, ids)
    assert store.fetched == [["00000.tar", "00003.tar", "00007.tar"], []]  # then they are open


def test_a_lost_shard_is_asked_for_when_it_is_read_and_not_before(
    tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tars, "PATIENCE", 0.0)  # each time that it is asked for shows
    data, store = remote(copied(tables, tmp_path), tables)
    store.lacks.add("00003.tar")
    store.asked.clear()
    ids = np.array([0, 60, 1, 149])
    _, failed = data.reader.products(ids, ids)
    assert [one.shard for one in failed] == ["00003.tar"]
    assert sorted(store.asked) == ["00000.tar", "00003.tar", "00007.tar"]


class Slow(Elsewhere):
    """Each fetch takes a while."""

    inside = False

    def fetch(self, names: Sequence[str]) -> None:
        self.inside = True
        time.sleep(0.02)
        self.inside = False


def test_no_worker_is_forked_in_the_middle_of_a_fetch(tables: Tables) -> None:
    """It would inherit the locks that the thread holds, for ever."""
    store = Slow(tables.path)
    shards = Shards.open(store)
    ahead = LookAhead(shards.tars, lambda step: [step % 8], first=0, last=10**6)
    context = multiprocessing.get_context("fork")
    found = []
    for step in range(8):
        ahead.at(100 * step)  # there is always something to fetch
        ours, theirs = context.Pipe()
        child = context.Process(target=lambda pipe: pipe.send(store.inside), args=(theirs,))
        child.start()
        found.append(ours.recv())
        child.join()
    ahead.close()
    assert not ahead_threads(wait=True)
    assert found == [False] * 8
