"""The stream against the tables it was made from, and against Lightning: order, ranks, workers, resume."""

import csv
import multiprocessing
import shutil
import warnings
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from datamodules.catalogue import read_catalogue
from datamodules.loaders import Share, TupleLoader
from datamodules.shards import Shards
from datamodules.tuples import TupleDataModule
from datamodules.writer import write_shards
from mmfusion.batch import ProductBatch, QueryBatch, TupleBatch
from tests.ddp import run_ranks

PRODUCTS, QUERIES, SIZE = 150, 40, (5, 4)
GAIN = {"E": 1.0, "S": 0.1, "I": 0.0}


@dataclass
class Tables:
    """What the catalogue says, by the user's ids; `colour` is the photo's, None without one."""

    path: Path
    title: dict[str, str]
    brand: dict[str, str]
    colour: dict[str, tuple[int, int, int] | None]
    query: dict[str, str]
    split: dict[str, str]
    label: dict[tuple[str, str], tuple[str, float | None]]  # (query, product) -> relevance, desirability

    def positives(self, product: str) -> list[str]:
        return [q for (q, p), (label, _) in self.label.items() if p == product and label == "E" and self.trains(q)]

    def trains(self, query: str) -> bool:
        return self.split[query] == "train"


def draw_tables(path: Path) -> Tables:
    random = np.random.default_rng(0)
    ids = [f"p{i}" for i in range(PRODUCTS)]
    queries = [f"q{i}" for i in range(QUERIES)]
    pairs = [(q, p) for q in queries for p in ids if random.random() < 0.15]
    return Tables(
        path,
        title={p: "" if i % 10 == 3 else f"title {i}" for i, p in enumerate(ids)},
        brand={p: "" if i % 2 else f"brand {i}" for i, p in enumerate(ids)},
        colour={p: None if i % 7 == 5 else (i, 255 - i, (i * 7) % 256) for i, p in enumerate(ids)},
        query={q: f"words {q}" for q in queries},
        split={q: ("train", "train", "val", "test")[i % 4] for i, q in enumerate(queries)},
        label={pair: ("ESI"[random.integers(3)], [None, 0.0, 2.0][random.integers(3)]) for pair in pairs},
    )


def write_table(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """The tables, with their shards in `path`."""
    folder = tmp_path_factory.mktemp("catalogue")
    made = draw_tables(folder / "shards")
    (folder / "images").mkdir()
    for p, colour in made.colour.items():
        if colour:
            Image.new("RGB", SIZE[::-1], colour).save(folder / "images" / f"{p}.png")
    rows = [[p, made.title[p], made.brand[p], f"{p}.png" if made.colour[p] else ""] for p in made.title]
    write_table(folder / "products.csv", ["product_id", "title", "brand", "image"], rows)
    rows = [[q, made.query[q], made.split[q]] for q in made.query]
    write_table(folder / "queries.csv", ["query_id", "query", "split"], rows)
    rows = [[q, p, label, "" if wish is None else wish] for (q, p), (label, wish) in made.label.items()]
    write_table(folder / "judgments.csv", ["query_id", "product_id", "label", "desirability"], rows)
    write_shards(read_catalogue(folder), made.path, shard_size=20)
    return made


def module(tables: Tables, stage: str = "fit", **options: Any) -> TupleDataModule:
    data = TupleDataModule(str(tables.path), **{"batch_size": 16, "image_size": SIZE, "eval_batch_size": 16, **options})
    data.setup(stage)
    return data


def of_rank(data: TupleDataModule, rank: int, ranks: int) -> TupleLoader:
    return TupleLoader(data.plan, data.slots, data.reader, lambda: (0, 0), rank, ranks)


def tuples_of(batch: TupleBatch) -> list[tuple[int, int, int]]:
    return list(zip(batch.query.id.tolist(), batch.product.id.tolist(), batch.product.draw.tolist(), strict=True))


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
        assert batch.query.valid.all() and batch.product.valid.all()
    trainable = {p for p in tables.title if tables.positives(p)}
    assert len(seen) == len(set(seen)) and set(seen) <= trainable
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


def same(a: Any, b: Any) -> bool:
    """Whether two batches are equal in every field."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b if isinstance(a, list) else all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_do_not_depend_on_workers(tables: Tables, workers: int) -> None:
    alone = list(module(tables).train_dataloader())
    helped = list(module(tables, workers=workers, photo_cache_mib=0).train_dataloader())
    assert len(alone) == len(helped) > 3
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cached_photo_is_the_decoded_one(tables: Tables, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = module(tables, workers=workers).train_dataloader()
    first, second = list(loader), list(loader)
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    data = module(tables)
    filled = list(data.train_dataloader())
    monkeypatch.setattr("datamodules.batches.decode_photo", None)  # nothing is left to decode
    assert all(same(a, b) for a, b in zip(filled, data.train_dataloader(), strict=True))


def test_the_cache_keeps_what_fits(tables: Tables) -> None:
    data = module(tables, image_size=(128, 128), photo_cache_mib=1)
    assert data.reader.cache.rows == 2**20 // (3 * 128 * 128)
    assert same(next(iter(data.train_dataloader())), next(iter(data.train_dataloader())))


@pytest.mark.parametrize("epoch", ["products", "pairs"])
def test_steps_do_not_depend_on_ranks(tables: Tables, epoch: str) -> None:
    data = module(tables, epoch=epoch)
    whole = [tuples_of(batch) for batch in data.train_dataloader()]
    for ranks in (2, 4):
        for step, batches in enumerate(zip(*(of_rank(data, rank, ranks) for rank in range(ranks)), strict=True)):
            assert [len(batch) for batch in batches] == [16 // ranks] * ranks
            assert [row for batch in batches for row in tuples_of(batch)] == whole[step]


def test_an_epoch_of_pairs_shows_each_product_as_often_as_it_has_positives(tables: Tables) -> None:
    data = module(tables, epoch="pairs", batch_size=8, damping=0.0)
    assert data.plan.steps == sum(len(tables.positives(p)) for p in tables.title) // 8
    shown = Counter((p, q) for batch in data.train_dataloader() for q, p, _ in tuples_of(batch))
    assert set(shown.values()) == {1}  # all gains are 1 and nothing is damped, so each pair has its turn
    positives = {(p, q) for p, id in enumerate(data.product_ids()) for q in query_rows(data, tables.positives(id))}
    assert set(shown) <= positives and len(positives) - len(shown) < 8


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


def test_evaluation_batches_hold_what_the_tables_say(tables: Tables) -> None:
    data = module(tables, "test")
    assert data.test_loaders == ["corpus", "queries/val", "queries/test"]
    corpus, *queries = data.test_dataloader()
    for split, loader in zip(("val", "test"), queries, strict=True):
        ids = []
        for batch in loader:
            ids += [str(data.shards.queries.query_id[id]) for id in batch.id]
            assert batch.text == [tables.query[q] for q in ids[-len(batch.id) :]] == data.query_texts(batch.id.numpy())
            assert batch.valid.all()
        assert sorted(ids) == sorted(q for q in tables.query if tables.split[q] == split)
    seen = []
    for batch in corpus:
        rows = [data.product_ids()[id] for id in batch.id]
        assert batch.text == [tables.title[p] for p in rows]
        assert batch.present.tolist() == [[tables.title[p] != "", tables.colour[p] is not None] for p in rows]
        assert batch.valid.all()
        seen += rows
    assert seen == data.product_ids() and set(seen) == set(tables.title)


def test_evaluation_draws_are_fixed(tables: Tables) -> None:
    data = module(tables)
    corpus = list(data.corpus_loader())
    helped = list(module(tables, workers=2, photo_cache_mib=0).corpus_loader())
    assert all(same(a, b) for a, b in zip(corpus, helped, strict=True))
    draws = {draw for batch in corpus for draw in batch.draw.tolist()}
    assert len(draws) == PRODUCTS
    assert not draws & {draw for batch in data.train_dataloader() for draw in batch.product.draw.tolist()}
    assert same(data.products(np.arange(16)), corpus[0])


def test_a_validation_corpus_of_judged_products_and_some_others(tables: Tables) -> None:
    data = module(tables, "validate", val_corpus="judged+7")
    judged = {p for (q, p) in tables.label if tables.split[q] == "val"}
    found = [data.product_ids()[id] for batch in data.val_dataloader()[1] for id in batch.id]
    assert judged < set(found) and len(found) == len(set(found)) == len(judged) + 7
    assert len(module(tables, "validate", val_corpus="judged+100000").corpus_ids("judged+100000")) == PRODUCTS
    assert sum(len(batch.id) for batch in data.test_dataloader()[0]) == PRODUCTS


def test_texts_are_those_of_training(tables: Tables) -> None:
    titles = [tables.title[p] for p in tables.title if tables.positives(p)]
    queries = [tables.query[q] for q in tables.query if tables.trains(q)]
    assert sorted(module(tables).texts()) == sorted(titles + queries)


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
    data = TupleDataModule(str(path), 16, image_size=SIZE, workers=workers, max_broken=0.1)
    data.setup("fit")
    photos = data.shards.index.photo
    with pytest.warns(UserWarning, match=r"epoch 0: 3 photos of 80 products .*\(3 not a photo\).*00000.tar \(3\)"):
        batches = list(data.train_dataloader())
    absent = [p for batch in batches for p in batch.product.id[~batch.product.present[:, 1]].tolist() if photos[p]]
    assert len(absent) == 3
    with pytest.warns(UserWarning, match=r"corpus: 3 photos of 150 products cannot be decoded"):
        list(data.corpus_loader())


def test_too_many_broken_photos_stop_the_epoch(tables: Tables, tmp_path: Path) -> None:
    data = TupleDataModule(str(spoiled(tables, tmp_path, photos=3)), 16, image_size=SIZE, max_broken=0.02)
    data.setup("fit")
    with pytest.raises(
        ValueError, match=r"2 photos of 80 products .* most in shards 00000.tar .* data.max_broken=0.02"
    ):
        list(data.train_dataloader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_fields": ["titel"]}, r"text_fields is \['titel'\].* has title, brand"),
        ({"text_fields": []}, "text_fields is"),
        ({"batch_size": 100}, "batch of 100 .* 8 streams.*data.batch_size"),
        ({"batch_size": 4096}, "fewer than one global batch of 4096"),
        ({"val_corpus": "some"}, r"val_corpus is 'some'; expected all, or judged\+N"),
        ({"test_splits": ["dev"]}, "names 'dev'; .* has the splits train, val, test"),
        ({"modalities": []}, r"modalities is \[\]; expected text, image or both"),
        ({"image_size": 0}, "image_size is 0; expected at least 1"),
        ({"workers": -1}, "workers is -1; expected at least 0"),
        ({"max_broken": 2.0}, "max_broken is 2.0; expected a fraction"),
    ],
)
def test_options_that_do_not_suit_are_named(tables: Tables, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(tables, **options)


def test_a_folder_without_shards_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match="make data"):
        TupleDataModule(str(tmp_path)).setup("fit")


class Recorder(LightningModule):
    """Notes what it is given, and does what real modules do: asks for the number of steps, validates, draws numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, int, list[tuple[int, int, int]]]] = []
        self.tested: dict[int, list[int]] = {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches > 0  # makes the loaders before a checkpoint is restored
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: TupleBatch, batch_idx: int) -> torch.Tensor:
        self.seen.append((self.trainer.current_epoch, batch_idx, tuples_of(batch)))
        return self.weight * len(batch)

    def validation_step(self, batch: QueryBatch | ProductBatch, batch_idx: int, dataloader_idx: int) -> None:
        expected = (QueryBatch, ProductBatch)[dataloader_idx]
        assert isinstance(batch, expected)

    def test_step(self, batch: QueryBatch | ProductBatch, batch_idx: int, dataloader_idx: int) -> None:
        self.tested.setdefault(dataloader_idx, []).extend(batch.id[batch.valid].tolist())


class SaveEverywhere(Callback):
    """A checkpoint in every hook in which Lightning saves, named by the optimizer steps done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _save(self, trainer: Trainer, hook: str) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step:03d}-{hook}.ckpt")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "batch")

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "epoch")


def trainer(callbacks: list[Callback], devices: int = 1, **limits: int) -> Trainer:
    return Trainer(
        accelerator="cpu",
        strategy="ddp" if devices > 1 else "auto",
        devices=devices,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=0.5,
        num_sanity_val_steps=1,
        use_distributed_sampler=False,
        callbacks=callbacks,
        **limits,
    )


class Straight(NamedTuple):
    """A run that nothing interrupted, with a checkpoint of every moment at which Lightning saves."""

    limits: dict[str, int]
    seen: list[Any]
    folder: Path


def fit(path: Path, trainer: Trainer, ckpt: Path | None = None, **options: Any) -> Recorder:
    recorder = Recorder()
    data = TupleDataModule(str(path), **{"batch_size": 16, "image_size": SIZE, "eval_batch_size": 16, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice about logging intervals and the like
        trainer.fit(recorder, data, ckpt_path=ckpt, weights_only=True)
    return recorder


def resumed(tables: Tables, straight: Straight, name: str, **options: Any) -> list[Any]:
    return fit(tables.path, trainer([], **straight.limits), straight.folder / f"{name}.ckpt", **options).seen


def run_straight(tables: Tables, folder: Path, limits: dict[str, int], **options: Any) -> Straight:
    return Straight(limits, fit(tables.path, trainer([SaveEverywhere(folder)], **limits), **options).seen, folder)


@pytest.fixture(scope="module")
def epochs(tables: Tables, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    return run_straight(tables, tmp_path_factory.mktemp("epochs"), {"max_epochs": 3})


@pytest.fixture(scope="module")
def steps(tables: Tables, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    return run_straight(tables, tmp_path_factory.mktemp("steps"), {"max_epochs": -1, "max_steps": 12})


def test_epochs_differ_and_batches_are_numbered(epochs: Straight, steps: Straight, tables: Tables) -> None:
    loader = module(tables).train_dataloader()
    assert len(epochs.seen) == 3 * len(loader)
    assert [(epoch, index) for epoch, index, _ in epochs.seen] == [
        divmod(i, len(loader)) for i in range(len(epochs.seen))
    ]
    assert epochs.seen[0][2] != epochs.seen[len(loader)][2]
    assert [rows for epoch, _, rows in epochs.seen if epoch == 0] == [tuples_of(batch) for batch in loader]
    assert steps.seen == epochs.seen[:12]


@pytest.mark.parametrize("hook", ["batch", "validation", "epoch"])
@pytest.mark.parametrize("ends", ["epochs", "steps"])
def test_resume_sees_exactly_the_rest(ends: str, tables: Tables, hook: str, request: pytest.FixtureRequest) -> None:
    straight: Straight = request.getfixturevalue(ends)
    checkpoints = sorted(path.stem for path in straight.folder.glob(f"*-{hook}.ckpt"))
    assert len(checkpoints) >= 2
    for name in checkpoints:
        assert resumed(tables, straight, name) == straight.seen[int(name[:3]) :], name


def test_resume_with_other_workers(epochs: Straight, tables: Tables, tmp_path: Path) -> None:
    assert resumed(tables, epochs, "003-batch", workers=2) == epochs.seen[3:]
    helped = run_straight(tables, tmp_path, epochs.limits, workers=2)
    assert helped.seen == epochs.seen
    assert resumed(tables, helped, "008-batch") == epochs.seen[8:]
    assert not multiprocessing.active_children()


def _two_ranks(rank: int, world: int, path: Path, ckpt: Path | None) -> tuple[list[Any], dict[int, list[int]]]:
    used = trainer([], world, max_epochs=3)
    recorder = fit(path, used, ckpt, workers=1)
    used.test(recorder, used.datamodule, verbose=False)
    return recorder.seen, recorder.tested


@pytest.mark.parametrize("done", [0, 3])
def test_two_ranks_see_the_batches_of_one(epochs: Straight, tables: Tables, done: int) -> None:
    ckpt = epochs.folder / f"{done:03d}-batch.ckpt" if done else None
    (first, tested), (second, tested_too) = run_ranks(_two_ranks, 2, tables.path, ckpt)
    together = [(*a[:2], a[2] + b[2]) for a, b in zip(first, second, strict=True)]
    assert together == epochs.seen[done:]
    assert sorted(tested[0] + tested_too[0]) == list(range(PRODUCTS))
    for loader, split in ((1, "val"), (2, "test")):
        queries = module(tables).shards.queries.of(split)
        assert sorted(tested[loader] + tested_too[loader]) == queries.tolist()


def test_resume_in_another_order_is_refused(epochs: Straight, tables: Tables) -> None:
    for options, message in (({"seed": 5}, "data.seed=0, this run has 5"), ({"window": 9}, "data.window=16384")):
        with pytest.raises(ValueError, match=message):
            resumed(tables, epochs, "003-batch", **options)
