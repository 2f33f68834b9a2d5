"""Blocks of photos: what is given out never changes while somebody holds it, and all comes back."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from datamodules.plan import Plan
from datamodules.stream import loaders, workers
from datamodules.stream.blocks import BLOCKS, PhotoBlocks
from datamodules.stream.loaders import TupleLoader
from mmfusion.batch import TupleBatch
from tests.datamodules.drawn import Tables, draw_shards, module, same

NUMBERS = pytest.mark.parametrize("number", [0, 2])


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    return draw_shards(tmp_path_factory.mktemp("catalogue"))


def loader_of(tables: Tables, number: int = 0, **options: object) -> tuple[TupleLoader, list[int]]:
    """A loader, and its epoch, which may be changed. No photo is cached: each batch is decoded anew."""
    data, epoch = module(tables, workers=number, photo_cache_mib=0, batch_size=8, **options), [0]
    loader = data.train_dataloader()
    loader.progress = lambda: (epoch[0], 0)
    return loader, epoch


def cloned(batch: TupleBatch) -> TupleBatch:
    return replace(batch, product=replace(batch.product, photo=batch.product.photo.clone()))


def straight(tables: Tables, epochs: int) -> list[list[TupleBatch]]:
    """The oracle: every batch read by itself, into memory of its own."""
    loader, epoch = loader_of(tables)
    loader._blocks = loader._shares.blocks = PhotoBlocks(0, (8, 3, 5, 4))
    found = []
    for epoch[0] in range(epochs):
        found.append(list(loader))
    return found


@NUMBERS
def test_a_batch_that_is_held_stays_as_it_is(tables: Tables, number: int) -> None:
    loader, epoch = loader_of(tables, number)
    first = next(iter(loader))
    was = cloned(first)
    assert was.product.photo.any()
    for epoch[0] in range(1, 4):
        assert sum(len(batch) for batch in loader) == 8 * len(loader)
    assert len(loader) > 2 * BLOCKS  # so every block was in use more than once
    assert torch.equal(first.product.photo, was.product.photo)
    loader.close()


@NUMBERS
def test_more_batches_than_blocks_are_held_and_right(tables: Tables, number: int) -> None:
    loader, _ = loader_of(tables, number)
    held = list(loader)
    assert len(held) > BLOCKS
    assert all(same(one, other) for one, other in zip(held, straight(tables, 1)[0], strict=True))
    loader.close()


@NUMBERS
def test_blocks_come_back(tables: Tables, number: int) -> None:
    loader, _ = loader_of(tables, number)
    for batch in loader:
        assert batch.product.photo.untyped_storage().nbytes() > 1
    view = batch.product.photo[1:, 0]
    del batch
    gc.collect()
    assert len(loader._blocks._held) == 1, "a view holds its block"
    del view
    gc.collect()
    assert not loader._blocks._held | loader._blocks._asked
    loader.close()


@NUMBERS
def test_one_batch_at_a_time_always_finds_a_block(tables: Tables, number: int) -> None:
    loader, _ = loader_of(tables, number)
    missed = []
    take = loader._blocks.take

    def noted() -> int | None:
        block = take()
        missed.append(block is None)
        return block

    loader._blocks.take = noted  # type: ignore[method-assign]
    previous = None
    for batch in loader:  # as a trainer, which holds one while it asks for the next
        previous = batch
    assert previous is not None
    assert len(missed) == len(loader)
    assert not any(missed)
    loader.close()


@NUMBERS
def test_an_iteration_that_is_broken_off_leaves_no_trace(tables: Tables, number: int) -> None:
    expected = straight(tables, 2)
    loader, epoch = loader_of(tables, number)
    for epoch[0] in (0, 1, 0):
        broken_off = list(islice(loader, 3))
        assert all(same(one, other) for one, other in zip(broken_off, expected[epoch[0]], strict=False))
    held: Iterator[TupleBatch] = iter(loader)
    next(held)
    loader.close()
    epoch[0] = 1
    assert all(same(one, other) for one, other in zip(loader, expected[1], strict=True))
    loader.close()


def test_workers_that_are_not_forked_send_their_photos(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CONTEXT", "spawn")
    monkeypatch.setattr(loaders, "FORKS", False)
    loader, _ = loader_of(tables, 1)
    assert all(same(one, other) for one, other in zip(loader, straight(tables, 1)[0], strict=True))
    loader.close()


def test_text_alone_writes_no_photo(tables: Tables) -> None:
    loader, _ = loader_of(tables, 0, modalities=["text"])
    assert not len(loader._blocks._pixels)
    assert not any(batch.product.photo.any() or batch.product.present[:, 1].any() for batch in loader)


@NUMBERS
def test_an_error_of_ours_is_raised_as_such(tables: Tables, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the command shows its message alone, whichever process met it."""

    def refuse(*_: object) -> None:
        Plan(np.array([3]), seed=0, batch=8)

    loader, _ = loader_of(tables, number)
    monkeypatch.setattr(loader._reading.args[0]._reader, "tuples", refuse)
    with pytest.raises(ValueError, match=r"^3 training samples are fewer than one global batch of 8"):
        next(iter(loader))
    loader.close()
