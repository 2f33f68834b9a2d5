"""The stream on real shards is elastic: what a step or an evaluation sees depends neither on ranks nor on workers.

Loaders are given their rank and need no process group; trainers on two real ranks are in test_tuples.py.
"""

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from datamodules.catalogue import read_catalogue
from datamodules.importing.writer import write_shards
from datamodules.stream.loaders import CorpusLoader, QueryLoader, Share, TupleLoader
from datamodules.tuples import TupleDataModule
from mmfusion.batch import ProductBatch, TupleBatch
from tests.datamodules.drawn import PRODUCTS, QUERIES, SIZE, Tables, draw_shards, module

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"
)  # more workers than this machine has cores


class Seen(NamedTuple):
    """A tuple as the model is given it, by the catalogue's own words; `judged` is (column, query, gain, positive)."""

    product: int
    query: str
    text: str
    draw: int
    photo: str
    judged: tuple[tuple[str, int, float, bool], ...]


def tuples(batch: TupleBatch) -> list[Seen]:
    judged: list[list[Any]] = [[] for _ in range(len(batch))]
    for column, rows in batch.judged.items():
        for row, *said in zip(rows.product, rows.query_id, rows.gain, rows.positive, strict=True):
            judged[row].append((column, *(value.item() for value in said)))
    return [
        Seen(*row, tuple(said))
        for row, said in zip(
            zip(batch.product.id.tolist(), batch.query.text, *looks(batch.product), strict=True), judged, strict=True
        )
    ]


def looks(batch: ProductBatch) -> tuple[list[str], list[int], list[str]]:
    """Texts, draws and a digest of each photo with what is present."""
    pixels = zip(batch.photo.numpy(), batch.present.numpy(), strict=True)
    digests = [hashlib.sha256(photo.tobytes() + present.tobytes()).hexdigest() for photo, present in pixels]
    return batch.text, batch.draw.tolist(), digests


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    return draw_shards(tmp_path_factory.mktemp("catalogue"))


def steps_of_rank(data: TupleDataModule, at: tuple[int, int], rank: int, ranks: int) -> Iterator[TupleBatch]:
    """A rank's batches of epoch at[0] from step at[1] on, by as many workers as the datamodule has."""
    loader = TupleLoader(data.plan, data.slots, data.reader, lambda: at, rank=rank, ranks=ranks, workers=data.workers)
    yield from loader
    loader.close()


def steps(data: TupleDataModule, at: tuple[int, int] = (0, 0), ranks: int = 1) -> list[list[Seen]]:
    """The tuples of each global step: those of rank 0, then those of rank 1, and so on."""
    parts = [steps_of_rank(data, at, rank, ranks) for rank in range(ranks)]
    return [[seen for batch in batches for seen in tuples(batch)] for batches in zip(*parts, strict=True)]


@pytest.fixture(scope="module")
def straight(tables: Tables) -> list[list[Seen]]:
    """Epoch 2 as one process without workers sees it."""
    return steps(module(tables, photo_cache_mib=0), (2, 0))


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_step_is_the_same_set_on_any_ranks_and_workers(
    tables: Tables, straight: list[list[Seen]], ranks: int, workers: int
) -> None:
    found = steps(module(tables, workers=workers), (2, 0), ranks)
    assert len(found) == len(straight) == 5
    assert [set(step) for step in found] == [set(step) for step in straight]
    assert found == straight  # and in the same order, so that a loss sums in the same order
    assert {len(set(step)) for step in found} == {16}


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 1), (4, 0), (4, 2)])
def test_an_epoch_goes_on_in_the_middle_on_other_ranks_and_workers(
    tables: Tables, straight: list[list[Seen]], ranks: int, workers: int
) -> None:
    data = module(tables, workers=workers)
    for done in (1, 4):
        assert steps(data, (2, done), ranks) == straight[done:]
    assert steps(data, (2, 5), ranks) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_done_is_not_read_again(tables: Tables, tmp_path: Path, workers: int) -> None:
    """Zeros in place of all samples but those of the steps to come, and no tar at all where there are none."""
    path, options = shutil.copytree(tables.path, tmp_path / "shards"), {"streams": 1, "window": 4}
    data = TupleDataModule(str(path), batch_size=16, image_size=SIZE, workers=workers, **options)
    data.setup("fit")
    done, index = 3, data.shards.index
    expected = steps(module(tables, **options), (2, 0))[done:]
    needed = [seen.product for step in expected for seen in step]
    for number, shard in enumerate(data.shards.manifest.shards):
        kept = bytearray(shard.bytes)
        for id in (id for id in needed if index.shard[id] == number):
            place = slice(index.offset[id], index.offset[id] + index.size[id])
            kept[place] = (path / shard.name).read_bytes()[place]
        (path / shard.name).unlink()
        if any(kept):
            (path / shard.name).write_bytes(kept)
    assert 0 < len(list(path.glob("*.tar"))) < len(data.shards.manifest.shards) - 2
    assert steps(data, (2, done)) == expected


def test_an_epoch_of_pairs_is_elastic_too(tables: Tables) -> None:
    whole = steps(module(tables, epoch="pairs"), (1, 0))
    assert steps(module(tables, epoch="pairs", workers=2), (1, 0), ranks=4) == whole
    assert steps(module(tables, epoch="pairs", workers=1), (1, 7), ranks=2) == whole[7:]
    times = Counter(seen.product for step in whole for seen in step)
    pairs = module(tables).shards.index.pairs
    assert all(times[product] <= pairs[product] for product in times)
    assert times.total() == len(whole) * 16 > pairs.sum() - 16


def choices(data: TupleDataModule, epoch: int) -> dict[int, tuple[str, int]]:
    """Of each product that an epoch shows: its query and its draw, from which augmentation derives."""
    return {seen.product: (seen.query, seen.draw) for step in steps(data, (epoch, 0)) for seen in step}


@pytest.fixture(scope="module")
def finer(tables: Tables, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same catalogue in shards of 7 products instead of 20."""
    out = tmp_path_factory.mktemp("finer") / "shards"
    write_shards(read_catalogue(tables.path.parent), out, shard_size=7)
    return out


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 40}, {"streams": 4}, {"window": 2}, {"workers": 3}, {"image_size": 9, "modalities": ["image"]},
        {"text_fields": ["brand"]}, {"photo_cache_mib": 0}, {"eval_batch_size": 3}, {"finer": True},
    ],
    ids=str,
)  # fmt: skip
def test_query_and_draw_depend_on_seed_epoch_and_product_alone(
    tables: Tables, finer: Path, options: dict[str, Any]
) -> None:
    data = module(tables)
    options = {"batch_size": 16, "image_size": SIZE, **options}
    other = TupleDataModule(str(finer if options.pop("finer", False) else tables.path), **options)
    other.setup("fit")
    assert (other.shards.index.product_id == data.shards.index.product_id).all()
    for epoch in (0, 3):
        expected, found = choices(data, epoch), choices(other, epoch)
        both = expected.keys() & found.keys()
        assert len(both) >= len(data.slots.product) - 16 - options["batch_size"] + 2
        assert {product: found[product] for product in both} == {product: expected[product] for product in both}


def test_another_seed_and_another_epoch_choose_otherwise(tables: Tables) -> None:
    first = choices(module(tables), 0)
    several = module(tables).shards.index.pairs > 1
    for other in (choices(module(tables), 1), choices(module(tables, seed=1), 0)):
        both = first.keys() & other.keys()
        assert all(first[product][1] != other[product][1] for product in both)
        chosen = [first[product][0] != other[product][0] for product in both if several[product]]
        assert np.mean(chosen) > 0.25
        assert all(first[product][0] == other[product][0] for product in both if not several[product])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_corpus_is_seen_once_on_any_number_of_ranks(tables: Tables, ranks: int, workers: int) -> None:
    data = module(tables, "validate")
    alone = shown(CorpusLoader(data.reader, Share.of(data.corpus_ids("all"), 0, 1), 16, data.seed, 0))
    shares = [Share.of(data.corpus_ids("all"), rank, ranks) for rank in range(ranks)]
    loaders = [CorpusLoader(data.reader, share, 16, data.seed, workers) for share in shares]
    assert len({len(loader) for loader in loaders}) == 1
    batches = [list(loader) for loader in loaders]
    assert len({tuple(len(batch.id) for batch in own) for own in batches}) == 1
    ids = np.concatenate([batch.id[batch.valid] for own in batches for batch in own])
    assert sorted(ids.tolist()) == list(range(PRODUCTS))
    assert [product for own in batches for product in shown(own)] == alone


def shown(batches: Any) -> list[tuple[Any, ...]]:
    """Each product that counts, as it is shown."""
    return [
        row
        for batch in batches
        for row, counts in zip(zip(batch.id.tolist(), *looks(batch), strict=True), batch.valid.tolist(), strict=True)
        if counts
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_queries_are_seen_once_on_any_number_of_ranks(tables: Tables, ranks: int, split: str) -> None:
    data = module(tables, "validate")
    ids = data.shards.queries.of(split).astype(np.int64)
    loaders = [QueryLoader(data.reader, Share.of(ids, rank, ranks), 3) for rank in range(ranks)]
    batches = [list(loader) for loader in loaders]
    assert len({len(loader) for loader in loaders} | {len(own) for own in batches}) == 1
    assert len({tuple(len(batch.id) for batch in own) for own in batches}) == 1
    counted = [text for own in batches for b in own for text, valid in zip(b.text, b.valid, strict=True) if valid]
    assert counted == [text for q, text in tables.query.items() if tables.split[q] == split]
    assert sum(len(b.id) for own in batches for b in own) < QUERIES
