"""Batches against the tables that the shards were made from."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.negatives import Candidates
from datamodules.plan import draws
from datamodules.shards import Shards
from datamodules.stream.batches import Request
from datamodules.stream.files import OpenFile
from datamodules.stream.substitutes import TRIES, substitutes
from datamodules.tuples import TupleDataModule
from tests.datamodules.damage import copied, overwrite
from tests.datamodules.drawn import SIZE, Tables, draw_shards, module, same, tuples_of

GAIN = {"E": 1.0, "S": 0.1, "I": 0.0}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    return draw_shards(tmp_path_factory.mktemp("catalogue"))


def test_tuples_say_what_the_tables_say(tables: Tables) -> None:
    data = module(tables, text_fields=["title", "brand"])
    product_ids, query_ids = data.product_ids(), data.shards.queries.query_id
    seen: list[str] = []
    for batch in data.train_dataloader():
        for row, (q, p) in enumerate(zip(batch.query.id.tolist(), batch.product.id.tolist(), strict=True)):
            product, query = product_ids[p], str(query_ids[q])
            seen.append(product)
            assert query in tables.positives(product)
            assert batch.query.text[row] == tables.query[query]
            text = " ".join(part for part in (tables.title[product], tables.brand[product]) if part)
            assert batch.product.text[row] == text
            colour = tables.colour[product]
            assert batch.product.present[row].tolist() == [text != "", colour is not None]
            expected = torch.tensor(colour or (0, 0, 0), dtype=torch.uint8)
            assert (batch.product.photo[row] == expected[:, None, None]).all()
        assert (batch.query.valid & batch.product.valid).all()
    trainable = {p for p in tables.title if tables.positives(p)}
    assert len(seen) == len(set(seen) & trainable)
    assert len(seen) > len(trainable) - 16


def test_judged_lists_the_train_judgments_with_a_gain(tables: Tables) -> None:
    data = module(tables)
    product_ids, query_ids = data.product_ids(), data.shards.queries.query_id
    batch = next(iter(data.train_dataloader()))
    rows = [product_ids[p] for p in batch.product.id.tolist()]
    train = {(q, p): labels for (q, p), labels in tables.label.items() if tables.trains(q)}
    expected = {
        "relevance": {(q, p): GAIN[label] for (q, p), (label, _) in train.items() if p in rows and label != "I"},
        "desirability": {(q, p): wish for (q, p), (_, wish) in train.items() if p in rows and wish},
    }
    assert list(batch.judged) == list(expected)
    for column, judged in batch.judged.items():
        keys = [(str(query_ids[q]), rows[i]) for q, i in zip(judged.query_id, judged.product.tolist(), strict=True)]
        assert dict(zip(keys, judged.gain.tolist(), strict=True)) == pytest.approx(expected[column])
        assert judged.positive.tolist() == [expected[column][key] >= 1 for key in keys]
    own = set(zip(batch.query.id.tolist(), range(16), strict=True))
    relevance = batch.judged["relevance"]
    listed = zip(relevance.query_id.tolist(), relevance.product.tolist(), relevance.positive.tolist(), strict=True)
    assert own <= {(q, row) for q, row, positive in listed if positive}


def test_an_epoch_of_pairs_shows_each_product_as_often_as_it_has_positives(tables: Tables) -> None:
    data = module(tables, epoch="pairs", batch_size=8, damping=0.0)
    assert data.plan.steps == sum(len(tables.positives(p)) for p in tables.title) // 8
    shown = Counter((p, q) for batch in data.train_dataloader() for q, p, _ in tuples_of(batch))
    assert set(shown.values()) == {1}  # all gains are 1 and nothing is damped, so each pair has its turn
    positives = {(p, q) for p, id in enumerate(data.product_ids()) for q in query_rows(data, tables.positives(id))}
    assert len(positives) - 8 < len(set(shown) & positives) == len(shown)


def query_rows(data: TupleDataModule, ids: list[str]) -> list[int]:
    rows = {str(id): row for row, id in enumerate(data.shards.queries.query_id)}
    return [rows[id] for id in ids]


def test_queries_are_drawn_by_damped_frequency(tables: Tables) -> None:
    """Over many epochs: weight gain x frequency^-2, the frequency counted in the tables."""
    data = module(tables, damping=2.0, modalities=["text"])
    frequency = Counter(q for p in tables.title for q in tables.positives(p))
    product = max(tables.title, key=lambda p: len(tables.positives(p)))
    weight = {q: frequency[q] ** -2.0 for q in tables.positives(product)}
    id = data.product_ids().index(product)
    sample = data.shards.read(id)
    drawn = Counter(
        str(data.shards.queries.query_id[data.reader._query(sample, (i + 0.5) / 5000)]) for i in range(5000)
    )
    assert {q: n / 5000 for q, n in drawn.items()} == pytest.approx(
        {q: w / sum(weight.values()) for q, w in weight.items()}, abs=1e-3
    )


@pytest.mark.parametrize(("shown", "column"), [("text", 0), ("image", 1)])
def test_a_modality_that_is_off_is_absent_everywhere(tables: Tables, shown: str, column: int) -> None:
    data = module(tables, modalities=[shown])
    whole = module(tables)
    for batch, full in zip(data.train_dataloader(), whole.train_dataloader(), strict=True):
        assert not batch.product.present[:, 1 - column].any()
        assert torch.equal(batch.product.present[:, column], full.product.present[:, column])
        assert shown == "image" or not batch.product.photo.any()
        assert shown == "text" or set(batch.product.text) == {""}


def test_evaluation_batches_hold_what_the_tables_say(tables: Tables) -> None:
    data = module(tables, "test")
    assert data.test_loaders == ["corpus", "queries/val", "queries/test"]
    queries = [data.query_loader("val"), data.query_loader("test")]
    for split, loader in zip(("val", "test"), queries, strict=True):
        ids = []
        for batch in loader:
            ids += [str(data.shards.queries.query_id[id]) for id in batch.id]
            assert batch.text == [tables.query[q] for q in ids[-len(batch.id) :]] == data.query_texts(batch.id.numpy())
            assert batch.valid.all()
        assert sorted(ids) == sorted(q for q in tables.query if tables.split[q] == split)
    seen = []
    for products in data.corpus_loader():
        rows = [data.product_ids()[id] for id in products.id]
        assert products.text == [tables.title[p] for p in rows]
        assert products.present.tolist() == [[tables.title[p] != "", tables.colour[p] is not None] for p in rows]
        assert products.valid.all()
        seen += rows
    assert seen == data.product_ids()
    assert sorted(seen) == sorted(tables.title)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cached_photo_is_the_decoded_one(tables: Tables, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = module(tables, workers=workers).train_dataloader()
    first, second = list(loader), list(loader)
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    data = module(tables)
    filled = list(data.train_dataloader())
    monkeypatch.setattr("datamodules.stream.batches.decode_photo", None)  # nothing is left to decode
    assert all(same(a, b) for a, b in zip(filled, data.train_dataloader(), strict=True))


def test_the_cache_keeps_what_fits(tables: Tables) -> None:
    data = module(tables, image_size=(128, 128), photo_cache_mib=1)
    assert data.reader.cache.rows == 2**20 // (3 * 128 * 128)
    assert same(next(iter(data.train_dataloader())), next(iter(data.train_dataloader())))


def test_a_reader_reads_the_same_in_another_process(tables: Tables) -> None:
    data, ids = module(tables), np.arange(20)
    assert same(data.reader.products(ids, ids)[0], pickle.loads(pickle.dumps(data.reader)).products(ids, ids)[0])


def test_substitutes_are_others_and_depend_on_seed_epoch_product_and_slot_alone() -> None:
    trainable = np.arange(0, 200, 2)
    first = list(substitutes(trainable, 1, 2, 10, 0))
    assert first == list(substitutes(trainable, 1, 2, 10, 0))
    assert TRIES - 5 < len(first) <= TRIES
    assert set(first) <= set(trainable) - {10}
    assert len(set(first)) > 30
    for other in ((2, 2, 10, 0), (1, 3, 10, 0), (1, 2, 12, 0), (1, 2, 10, 1)):
        assert list(substitutes(trainable, *other)) != first
    assert list(substitutes(np.array([10]), 1, 2, 10, 0)) == []


@pytest.fixture
def damaged(tables: Tables, tmp_path: Path) -> tuple[TupleDataModule, list[int]]:
    """Shards in which three trainable products cannot be read, and these."""
    path = copied(tables, tmp_path)
    lost = np.flatnonzero(Shards.open(path).index.trainable)[[0, 7, 40]].tolist()
    for id in lost:
        overwrite(path, id, b"")
    data = TupleDataModule(str(path), batch_size=16, image_size=SIZE, max_broken=0.1)
    data.setup("fit")
    return data, lost


def test_a_training_sample_that_cannot_be_read_is_replaced(
    damaged: tuple[TupleDataModule, list[int]], tables: Tables
) -> None:
    data, lost = damaged
    ids, one = data.slots.product, np.ones_like(data.slots.product)
    whole, none = module(tables).reader.tuples(Request(5, 3, ids, one * 0, one))
    batch, failed = data.reader.tuples(Request(5, 3, ids, one * 0, one))
    assert none == []
    assert [(one.reason, one.product_id) for one in failed] == [("wrong member", data.product_ids()[id]) for id in lost]
    got = batch.product.id.tolist()
    assert [id for id in ids.tolist() if id not in lost] == [a for a, b in zip(got, ids, strict=True) if a == b]
    assert batch.product.draw.tolist() == draws(5, 3, batch.product.id.numpy()).tolist()
    place = {id: row for row, id in enumerate(ids.tolist())}
    names, queries = data.product_ids(), data.query_ids(batch.query.id.numpy())
    for row, id in enumerate(got):
        # a tuple of its own: what the substitute shows in its own place, as an epoch of products has one slot of each
        expected = tuples_of(whole)[place[id]]
        assert tuples_of(batch)[row] == expected
        assert batch.product.text[row] == whole.product.text[place[id]]
        assert queries[row] in tables.positives(names[id])
        assert (id != ids[row]) == (int(ids[row]) in lost)


def test_an_epoch_of_pairs_replaces_each_slot(damaged: tuple[TupleDataModule, list[int]], tables: Tables) -> None:
    data, lost = damaged
    slots = np.arange(20)
    request = Request(0, 0, np.full(20, lost[0]), slots, slots * 0 + 20)
    batch, failed = data.reader.tuples(request)
    assert len(failed) == 20
    assert len(set(batch.product.id.tolist())) > 10
    assert not set(batch.product.id.tolist()) & set(lost)
    for query, product in zip(data.query_ids(batch.query.id.numpy()), batch.product.id.tolist(), strict=True):
        assert query in tables.positives(data.product_ids()[product])


def test_in_evaluation_it_stays_with_neither_text_nor_photo(damaged: tuple[TupleDataModule, list[int]]) -> None:
    data, lost = damaged
    ids = np.arange(150)
    batch, failed = data.reader.products(ids, ids)
    assert batch.id.tolist() == ids.tolist()
    assert [one.product_id for one in failed] == [data.product_ids()[id] for id in lost]
    for id in lost:
        assert batch.text[id] == ""
        assert not batch.present[id].any()
        assert not batch.photo[id].any()
    others = np.setdiff1d(ids, lost)
    assert (batch.present[others, 1].numpy() == data.has_photo()[others]).all()


def test_where_nothing_can_be_read_there_is_no_substitute(tables: Tables, tmp_path: Path) -> None:
    path = copied(tables, tmp_path)
    for id in range(150):
        overwrite(path, id, b"")
    data = TupleDataModule(str(path), batch_size=16, image_size=SIZE, max_broken=1.0)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"none of 64 products that could take the place of product \d+ can be read"):
        next(iter(data.train_dataloader()))


def test_where_there_is_no_other_none_takes_its_place(tables: Tables, tmp_path: Path) -> None:
    """Of the only trainable product; of a negative where all others are taken."""
    path = copied(tables, tmp_path)
    first, second = np.flatnonzero(Shards.open(path).index.trainable)[:2].tolist()
    overwrite(path, first, b"")
    data = TupleDataModule(str(path), batch_size=16, image_size=SIZE, max_broken=1.0, hard_negatives=1)
    data.setup("fit")
    said = f"product {first} cannot be read, and there is no other that could take its place"
    data.reader.__dict__["trainable"] = np.array([first])
    zero, one = np.zeros(1, np.int64), np.ones(1, np.int64)
    with pytest.raises(ValueError, match=said):
        data.reader.tuples(Request(0, 0, np.array([first]), zero, one))
    everyone = np.repeat(np.arange(len(data.shards.queries)), 150), np.tile(np.arange(150), len(data.shards.queries))
    kept = everyone[1] != first
    positives = tuple(ids[kept] for ids in everyone)
    data.reader.__dict__["candidates"] = Candidates.of(len(data.shards.queries), 150, positives, [])
    with pytest.raises(ValueError, match=said):
        data.reader.tuples(Request(0, 0, np.array([second]), zero, one))


def test_a_photo_that_is_kept_is_not_read_again(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    data, asked = module(tables), list[bool]()
    read = data.shards.read
    monkeypatch.setattr(data.shards, "read", lambda id, photo: asked.append(photo) or read(id, photo))
    ids = np.flatnonzero(data.has_photo())
    first, second = (data.reader.products(ids, ids)[0] for _ in range(2))
    assert same(first, second)
    assert asked == [True] * len(ids) + [False] * len(ids)


@pytest.mark.parametrize("shown", ["with photos", "some photos kept", "text only"])
def test_what_is_read_has_been_announced(tables: Tables, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same places, and before the first of them is read: else a disk would do too little, or too much."""
    monkeypatch.setattr("datamodules.shards.HEAD", 1024)
    data = module(tables, modalities=["text"] if shown == "text only" else ["text", "image"])
    places: list[tuple[str, int, int]] = []
    ids = np.arange(100)[::-1].copy()
    photos = data.has_photo()[ids] & (shown != "text only")
    if shown == "some photos kept":
        data.reader.products(ids[:30], ids[:30])
        photos[:30] = False

    def noting(name: str) -> None:
        method = getattr(OpenFile, name)

        def noted(self: OpenFile, size: int, offset: int) -> bytes | None:
            places.append((name, size, offset))
            return method(self, size, offset)

        monkeypatch.setattr(OpenFile, name, noted)

    noting("expect")
    noting("read")
    data.reader.products(ids, ids)
    assert [name for name, _, _ in places] == ["expect"] * 100 + ["read"] * 100
    assert [place[1:] for place in places[:100]] == [place[1:] for place in places[100:]]
    assert [size > 1024 for _, size, _ in places[:100]] == photos.tolist()
