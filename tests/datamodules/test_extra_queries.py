"""Extra queries of a step: train queries beside those of its tuples, the same whatever reads them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from datamodules.plan import extra
from datamodules.stream.known import KnownReader, LeftOut
from datamodules.stream.loaders import TupleLoader
from datamodules.tuples import TupleDataModule
from mmfusion.batch import Known, QueryBatch, TupleBatch
from tests.datamodules.drawn import Tables, draw_shards, module, same

EXTRA = 24


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    return draw_shards(tmp_path_factory.mktemp("catalogue"))


def batches(data: TupleDataModule, at: tuple[int, int] = (2, 0), rank: int = 0, ranks: int = 1) -> list[TupleBatch]:
    loader = TupleLoader(data.plan, data.slots, data.reader, lambda: at, rank=rank, ranks=ranks, workers=data.workers)
    found = list(loader)
    loader.close()
    return found


def cut(query: QueryBatch, rows: slice) -> QueryBatch:
    return QueryBatch(query.text[rows], query.id[rows], query.valid[rows])


@pytest.mark.parametrize("options", [{}, {"hard_negatives": 2}], ids=str)
@pytest.mark.parametrize("workers", [0, 2])
def test_they_come_behind_the_tuples_and_change_nothing_else(tables: Tables, workers: int, options: dict) -> None:
    plain = batches(module(tables, **options))
    data = module(tables, extra_queries=EXTRA, workers=workers, **options)
    train = [row for row, id in enumerate(data.shards.queries.query_id) if tables.trains(str(id))]
    for step, (batch, alone) in enumerate(zip(batches(data), plain, strict=True)):
        assert len(batch) == len(alone) == 16
        assert same(replace(batch, query=cut(batch.query, slice(16))), alone)
        behind = cut(batch.query, slice(16, None))
        assert behind.id.tolist() == [train[i] for i in extra(0, 2, step, EXTRA, len(train))]
        assert behind.text == [tables.query[str(data.shards.queries.query_id[id])] for id in behind.id]
        assert behind.valid.all()


def test_all_are_drawn_as_often_and_anew_in_each_step() -> None:
    drawn = [extra(seed, epoch, step, 50, 20) for seed in (0, 1) for epoch in range(10) for step in range(10)]
    assert len({tuple(one.tolist()) for one in drawn}) == len(drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=20)
    assert len(counts) == 20
    assert abs(counts - 500).max() < 5 * 500**0.5


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_them(tables: Tables, ranks: int) -> None:
    data = module(tables, extra_queries=EXTRA)
    parts = [batches(data, rank=rank, ranks=ranks) for rank in range(ranks)]
    for whole, *shares in zip(batches(data), *parts, strict=True):
        of_tuples, behind = 16 // ranks, EXTRA // ranks
        assert {len(share.query.id) for share in shares} == {of_tuples + behind}
        assert torch.cat([share.query.id[of_tuples:] for share in shares]).equal(whole.query.id[16:])
        assert torch.cat([share.query.id[:of_tuples] for share in shares]).equal(whole.query.id[:16])


def test_a_resumed_epoch_has_the_same(tables: Tables) -> None:
    data = module(tables, extra_queries=EXTRA)
    assert all(same(*pair) for pair in zip(batches(data)[2:], batches(data, (2, 2)), strict=True))


def test_batches_without_content_have_the_same(tables: Tables) -> None:
    data = module(tables, extra_queries=EXTRA)
    read = batches(data)
    loaders = TupleLoader(data.plan, data.slots, data.reader, lambda: (2, 0), left_out=left_out(data))
    for batch, known in zip(read, loaders, strict=True):
        assert not known.product.shown
        assert same(known.query, batch.query)


def left_out(data: TupleDataModule) -> LeftOut:
    everything = torch.ones(len(data.shards), 2, dtype=torch.bool)
    return LeftOut(KnownReader(data.reader, Known(everything, everything[:, 0])), until=10**6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra_queries": -8}, "data.extra_queries is -8; expected at least 0"),
        (
            {"extra_queries": 12},
            "data.extra_queries is 12; ranks share them.* 8 streams: .* multiple of them, such as 8",
        ),
    ],
    ids=str,
)
def test_mistakes_are_told(tables: Tables, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(tables, **options)


def test_a_checkpoint_tells_how_many(tables: Tables) -> None:
    data = module(tables, extra_queries=EXTRA)
    assert data.state_dict()["extra_queries"] == data.extra_queries == EXTRA
    assert module(tables).state_dict()["extra_queries"] == 0
