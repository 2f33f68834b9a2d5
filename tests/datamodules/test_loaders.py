"""Loaders: the same batches whatever the workers and ranks; broken photos are counted."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.loaders import Share, TupleLoader
from datamodules.shards import Shards
from datamodules.tuples import TupleDataModule
from tests.datamodules.drawn import PRODUCTS, SIZE, Tables, draw_shards, module, same, tuples_of


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    return draw_shards(tmp_path_factory.mktemp("catalogue"))


def of_rank(data: TupleDataModule, rank: int, ranks: int) -> TupleLoader:
    return TupleLoader(data.plan, data.slots, data.reader, lambda: (0, 0), rank=rank, ranks=ranks)


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
    with pytest.warns(UserWarning, match=r"epoch 0: 3 photos of 80 products .*\(3 not a photo\).*00000.tar \(3\)"):
        batches = list(data.train_dataloader())
    absent = [p for batch in batches for p in batch.product.id[~batch.product.present[:, 1]].tolist() if photos[p]]
    assert len(absent) == 3
    with pytest.warns(UserWarning, match=r"corpus: 3 photos of 150 products cannot be decoded"):
        list(data.corpus_loader())


def test_too_many_broken_photos_stop_the_epoch(tables: Tables, tmp_path: Path) -> None:
    data = TupleDataModule(str(spoiled(tables, tmp_path, photos=3)), batch_size=16, image_size=SIZE, max_broken=0.02)
    data.setup("fit")
    with pytest.raises(
        ValueError, match=r"2 photos of 80 products .* most in shards 00000.tar .* data.max_broken=0.02"
    ):
        list(data.train_dataloader())
