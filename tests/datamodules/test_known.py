"""Batches without content, against those that are read: equal in everything but texts and photos."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.pair_tables import write_pair_table
from datamodules.plan import chosen
from datamodules.shards import Shards
from datamodules.stream.batches import Reader, Request
from datamodules.stream.failures import SAMPLE_REASONS, Failed
from datamodules.stream.judgments import Positives, _running
from datamodules.stream.known import KnownReader
from datamodules.stream.loaders import TupleLoader
from datamodules.tuples import TupleDataModule
from mmfusion.batch import Known, ProductBatch, TupleBatch
from tests.datamodules.damage import Elsewhere, copied, overwrite
from tests.datamodules.drawn import PRODUCTS, QUERIES, SIZE, Tables, draw_shards, module, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:.* products .*failed"),
]
HARD: dict[str, Any] = {"hard_negatives": 3, "hard_from": ["mined", "judged"], "scores": ["teacher"]}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """With tables of pairs; every eighth sample cannot be read, and some photos cannot be decoded."""
    folder, random = tmp_path_factory.mktemp("catalogue"), np.random.default_rng(2)
    drawn = draw_shards(folder)
    path = copied(drawn, folder)
    pairs = np.argwhere(random.random((QUERIES, PRODUCTS)) < 0.1).T
    for name, kind in (("mined", "negatives"), ("teacher", "scores")):
        write_pair_table(path, name, kind, *pairs, random.normal(size=len(pairs[0])), {})  # type: ignore[arg-type]
    index = Shards.open(path).index
    for id in range(0, PRODUCTS, 8):
        overwrite(path, id, b"")
    for id in np.flatnonzero(index.photo)[1::9].tolist():
        tar = path / f"{index.shard[id]:05d}.tar"
        content, place = tar.read_bytes(), slice(index.offset[id], index.offset[id] + index.size[id])
        tar.write_bytes(content[: place.start] + content[place].replace(b"\x89PNG", b"GNP!") + content[place.stop :])
    return replace(drawn, path=path)


def damaged(tables: Tables, stage: str = "fit", **options: Any) -> TupleDataModule:
    return module(tables, stage, max_broken=1.0, **options)


def known_of(data: TupleDataModule) -> Known:
    """Of all products, as who keeps features learns it."""
    batches = list(data.product_batches(np.arange(len(data.shards))))
    return Known(torch.cat([batch.present for batch in batches]), torch.cat([batch.valid for batch in batches]))


def bare(batch: ProductBatch) -> ProductBatch:
    rows = len(batch.id)
    return replace(batch, text=[""] * rows, photo=torch.zeros((rows, 3, 0, 0), dtype=torch.uint8), shown=False)


def without_content(batch: TupleBatch) -> TupleBatch:
    return replace(batch, product=bare(batch.product))


def dtypes(batch: TupleBatch) -> list[torch.dtype]:
    found = list[torch.dtype]()
    batch.to("cpu")
    for part in (batch.query, batch.product, *batch.judged.values(), *batch.scores.values()):
        found += [value.dtype for value in vars(part).values() if isinstance(value, torch.Tensor)]
    return [*found, batch.hard.dtype]


def kinds(failed: list[Failed]) -> Counter[tuple[str, bool]]:
    """Whose sample, or photo, how often."""
    return Counter((one.product_id, one.reason in SAMPLE_REASONS) for one in failed)


OPTIONS: list[dict[str, Any]] = [
    {}, {"epoch": "pairs", "damping": 0.0}, {"modalities": ["image"], "damping": 2.0},
    HARD, {"modalities": ["text"], **HARD},
    {"text_fields": ["brand"], "hard_negatives": 20, "hard_from": []},
]  # fmt: skip


@pytest.fixture(scope="module", params=OPTIONS, ids=str)
def readers(tables: Tables, request: pytest.FixtureRequest) -> tuple[TupleDataModule, KnownReader]:
    data = damaged(tables, **request.param)
    known = known_of(data)
    assert 0 < (~known.readable).sum() < 30
    assert known.present.any() or not data.look.text
    return data, KnownReader(data.reader, known)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 2**31), st.integers(1, 60))
def test_they_equal_those_that_are_read(
    readers: tuple[TupleDataModule, KnownReader], seed: int, epoch: int, rows: int
) -> None:
    data, known = readers
    position = np.random.default_rng(seed + epoch).integers(0, data.slots.end[-1], rows)
    request = Request(seed, epoch, *data.slots.at(position))
    (read, failed), (made, lost) = data.reader.tuples(request), known.tuples(request)
    assert kinds(failed) == kinds(lost)
    assert read.product.shown
    assert same(without_content(read), made)
    assert dtypes(read) == dtypes(made)


def test_some_of_those_are_in_the_place_of_others(readers: tuple[TupleDataModule, KnownReader]) -> None:
    """Else the test above would prove less than it says."""
    data, known = readers
    request = Request(0, 0, *data.slots.at(np.arange(data.slots.end[-1])))
    made, failed = known.tuples(request)
    assert len(failed) > 5
    assert (made.product.id[: len(made)] != torch.from_numpy(request.product)).sum() > 5
    assert known.known.readable[made.product.id].all()
    if data.pairs.hard_from == ("mined", "judged") and data.pairs.hard_negatives:
        assert (made.hard == 0).sum() > 5


def test_without_substitutes_it_says_so(tables: Tables) -> None:
    data = damaged(tables, hard_negatives=2)
    known = known_of(data)
    request = Request(0, 0, *data.slots.at(np.arange(4)))
    with pytest.raises(ValueError, match=r"none of 64 products that could take the place of product \d+ can be read"):
        KnownReader(data.reader, replace(known, readable=torch.zeros(PRODUCTS, dtype=torch.bool))).tuples(request)


def test_known_of_other_products_is_refused(tables: Tables) -> None:
    data = damaged(tables)
    few = Known(torch.ones(7, 2, dtype=torch.bool), torch.ones(7, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"has 7 and 7 rows, .*damaged has 150 products"):
        data.leave_out(few, 1)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.floats(0, 1, exclude_max=True))
def test_queries_are_drawn_as_one_by_one(seed: int, products: int, point: float) -> None:
    random = np.random.default_rng(seed)
    count = random.integers(1, 9, products)
    start = np.concatenate([[0], np.cumsum(count)])
    weight, query = random.lognormal(0, 3, start[-1]), random.integers(0, 10**6, start[-1])
    total = _running(weight, start)
    for one in range(products):
        assert total[start[one] : start[one + 1]].tolist() == np.cumsum(weight[start[one] : start[one + 1]]).tolist()
    product = random.integers(0, products, 50)
    points = np.where(np.arange(50) % 3, random.random(50), point)
    edges = random.random(50) < 0.3  # where a stretch ends, as nearly as it can be said
    points[edges] = np.minimum(total[start[product]] / total[start[product + 1] - 1], 1 - 2**-53)[edges]
    drawn = Positives(start, query, total).drawn(product, points)
    for p, where, found in zip(product.tolist(), points.tolist(), drawn.tolist(), strict=True):
        own = slice(start[p], start[p + 1])
        assert found == query[own][chosen(weight[own], where)]


# ---- loaders ---------------------------------------------------------------------------------------------------------

Flips = dict[int, int | None]  # before this step is asked for: `until`, or None for content again


def steps_of(loader: TupleLoader, data: TupleDataModule, known: Known, flips: Flips) -> Iterator[TupleBatch]:
    batches = iter(loader)
    for step in range(loader.progress()[1], len(loader)):
        if step in flips:
            until = flips[step]
            data.leave_out(known if until is not None else None, until or 0)
        yield next(batches)
    assert next(batches, None) is None


def check_flips(straight: list[TupleBatch], found: list[TupleBatch], flips: Flips, first: int = 0) -> list[int]:
    """Each batch is the straight one, with content where it is needed; which ones have none."""
    until = 0
    left: list[int] = []
    for step, (a, b) in enumerate(zip(straight[first:], found, strict=True), first):
        until = (flips[step] or 0) if step in flips else until
        assert b.product.shown or step < until
        assert same(a if b.product.shown else without_content(a), b)
        left += [] if b.product.shown else [step]
    return left


@pytest.fixture(scope="module")
def known(tables: Tables) -> Known:
    return known_of(damaged(tables))


@pytest.fixture(scope="module")
def straight(tables: Tables) -> list[TupleBatch]:
    return list(many(tables).train_dataloader())


def many(tables: Tables, **options: Any) -> TupleDataModule:
    return damaged(tables, batch_size=8, streams=4, hard_negatives=1, photo_cache_mib=0, **options)


@settings(max_examples=15, deadline=None)
@given(st.dictionaries(st.integers(0, 9), st.none() | st.integers(0, 14), max_size=5), st.integers(0, 9))
def test_any_flips_leave_the_epoch_as_it_is(
    tables: Tables, straight: list[TupleBatch], known: Known, flips: Flips, first: int
) -> None:
    data = many(tables)
    read = list[int]()
    loader = data.train_dataloader()
    loader.progress = lambda: (0, first)
    whole = data.shards.read
    data.shards.read = lambda id, photo=True: read.append(id) or whole(id, photo)  # type: ignore[method-assign]
    flips = {step: until for step, until in flips.items() if step >= first}
    left = check_flips(straight, list(steps_of(loader, data, known, flips)), flips, first)
    until, expected = 0, list[int]()
    for step in range(first, len(loader)):
        until = (flips[step] or 0) if step in flips else until
        expected += [step] if step < until else []
    assert left == expected  # without workers nothing is asked for ahead
    asked = [step for step in range(first, len(loader)) if step not in left]
    assert len(read) >= sum(len(straight[step].product.id) for step in asked)
    assert bool(read) == bool(asked)


SCRIPTS: list[Flips] = [
    {0: 100}, {0: 4}, {3: 100}, {2: 6, 8: 10}, {0: 9, 4: None}, {0: 5, 2: 8, 6: None, 7: 100}, {1: 3, 2: 9},
    {0: 9, 2: 5, 3: 7},
]  # fmt: skip


@pytest.mark.parametrize("flips", SCRIPTS, ids=str)
def test_workers_may_have_been_asked_before(
    tables: Tables, straight: list[TupleBatch], known: Known, flips: Flips
) -> None:
    data = many(tables, workers=2)
    loader = data.train_dataloader()
    left = check_flips(straight, list(steps_of(loader, data, known, flips)), flips)
    assert left
    data.leave_out(None, 0)
    again = list(loader)  # the next epoch, with the same workers
    assert all(same(a, b) for a, b in zip(straight, again, strict=True))
    data.leave_out(known, 100)
    assert not any(batch.product.shown for batch in loader)
    loader.close()


def test_content_is_asked_for_before_its_step(tables: Tables) -> None:
    data = many(tables, workers=1)
    data.leave_out(known_of(data), 6)
    loader = data.train_dataloader()
    batches = iter(loader)
    assert not next(batches).product.shown
    assert [asked.step for asked in loader._shares.asked] == [6, 7]
    assert [batch.product.shown for batch in batches] == [False] * 5 + [True] * (len(loader) - 6)
    loader.close()


def test_without_content_no_worker_starts(tables: Tables) -> None:
    data = many(tables, workers=2)
    data.leave_out(known_of(data), 100)
    loader = data.train_dataloader()
    assert not any(batch.product.shown for batch in loader)
    assert loader._open is None


@pytest.mark.parametrize("ranks", [2, 4])
def test_they_are_shared_by_ranks(tables: Tables, straight: list[TupleBatch], ranks: int) -> None:
    data = many(tables)
    data.leave_out(known_of(data), 3)
    place, left_out = (data.plan, data.slots, data.reader, lambda: (0, 0)), data._left_out
    of_ranks = [TupleLoader(*place, rank=r, ranks=ranks, max_broken=1, left_out=left_out) for r in range(ranks)]
    for step, parts in enumerate(zip(*of_ranks, strict=True)):
        assert {part.product.shown for part in parts} == {step >= 3}
        b = len(parts[0])
        for rows in (slice(b), slice(b, None)):
            ids = torch.cat([part.product.id[rows] for part in parts])
            assert ids.tolist() == straight[step].product.id[slice(8) if rows.stop else slice(8, None)].tolist()
        assert torch.equal(torch.cat([part.query.id for part in parts]), straight[step].query.id)


def test_steps_of_the_optimizer_are_counted_in_batches(tables: Tables) -> None:
    """The epoch began at optimizer step 3, and takes two batches for each: until 5 are four."""
    data = many(tables)
    data.leave_out(known_of(data), 5)
    loader = data.train_dataloader()
    loader.optimizer = lambda: (3, 2)
    assert [batch.product.shown for batch in loader] == [False] * 4 + [True] * (len(loader) - 4)


def test_shards_from_elsewhere_are_not_fetched(tables: Tables) -> None:
    store = Elsewhere(tables.path)
    data = many(tables)
    known = known_of(data)
    data.reader = Reader(Shards.open(store), data.look, 0.5, 0, data.pairs)
    store.fetched.clear()
    data.leave_out(known, 100)
    assert not any(batch.product.shown for batch in data.train_dataloader())
    assert not any(store.fetched)
    data.leave_out(known, len(data.train_dataloader()) - 1)
    assert [batch.product.shown for batch in data.train_dataloader()][-1]
    assert any(store.fetched)


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_the_corpus_without_content(tables: Tables, workers: int) -> None:
    data = damaged(tables, "validate", workers=workers, val_corpus="judged+9")
    loaders: list[Callable[[], Any]] = [lambda: data.val_dataloader()[1], lambda: data.test_dataloader()[0]]
    known = known_of(data)
    for make in loaders:
        loader = make()
        read, counts = list(loader), loader.failures.reasons
        begun = iter(loader)
        next(begun)
        data.leave_out_of_evaluation(known)
        assert next(begun).shown, "an evaluation that has begun keeps what it has"
        del begun
        assert all(same(bare(a), b) for a, b in zip(read, loader, strict=True))
        assert loader.failures.reasons == {
            "unread before": counts["wrong member"],
            "no photo before": counts["not a photo"],
        }
        assert data.products(np.arange(3)).shown
        data.leave_out_of_evaluation(None)
        assert all(same(a, b) for a, b in zip(read, loader, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_any_products_in_batches(tables: Tables, workers: int) -> None:
    data = damaged(tables, "test", workers=workers)
    ids = np.random.default_rng(0).permutation(PRODUCTS)[:70]
    with pytest.warns(UserWarning, match=rf"products: \d+ of {PRODUCTS} products failed"):
        batches = list(data.product_batches(ids))
    assert [len(batch.id) for batch in batches] == [16] * 4 + [6]
    assert torch.cat([batch.id for batch in batches]).tolist() == ids.tolist()
    lost = torch.cat([batch.id[~batch.valid] for batch in batches]).tolist()
    assert lost == [id for id in ids.tolist() if id % 8 == 0]
    whole = data.products(ids)
    for name in ("text", "photo", "present", "draw"):
        rows = [row for batch in batches for row in getattr(batch, name)]
        assert all(same(a, b) if name != "text" else a == b for a, b in zip(rows, getattr(whole, name), strict=True))
    assert list(data.product_batches(ids[:0])) == []
    data.max_broken = 0.01
    with pytest.raises(ValueError, match=rf"products: \d+ of {PRODUCTS} products failed .*data.max_broken=0.01"):
        list(data.product_batches(ids))


def test_what_is_lost_counts_in_each_pass(tables: Tables, known: Known) -> None:
    data = many(tables)
    read = data.train_dataloader()
    list(read)
    data.leave_out(known, 4)
    for _ in range(2):
        loader = data.train_dataloader()
        list(loader)
        found = loader.failures.reasons
        assert min(found.values()) > 0
        assert found["unread before"] + found["wrong member"] == read.failures.reasons["wrong member"]
        assert found["no photo before"] + found["not a photo"] == read.failures.reasons["not a photo"]
    data.leave_out(known, 100)
    data.max_broken = 0.1
    with pytest.raises(ValueError, match=r"\d unread before, .*over the limit data.max_broken=0.1"):
        list(data.train_dataloader())


def test_what_a_product_looks_like_is_said_in_json(tables: Tables) -> None:
    data = module(tables, "test", max_broken=1.0, text_fields=["title", "brand"], modalities=["text"])
    expected = {"text_fields": ["title", "brand"], "image_size": list(SIZE), "modalities": ["text"]}
    assert data.shows["decoding"]["decode_photo"] == 1
    assert {name: value for name, value in data.shows.items() if name != "decoding"} == expected
    assert json.loads(json.dumps(data.shows)) == data.shows
    assert data.queries() == QUERIES
