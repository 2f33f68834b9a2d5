"""The datamodule: its options, what it evaluates, and a trainer's order, ranks and resume."""

import io
import multiprocessing
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from datamodules.catalogue import read_catalogue
from datamodules.importing.writer import write_shards
from datamodules.pair_tables import write_pair_table
from datamodules.shards import Sample, Shards
from datamodules.stream import batches
from datamodules.stream.files import OpenFile
from datamodules.tuples import TupleDataModule
from mmfusion.batch import ProductBatch, QueryBatch, RetrievalData, TupleBatch
from tests.datamodules.damage import copied
from tests.datamodules.drawn import PRODUCTS, QUERIES, SIZE, Tables, draw_shards, module, tuples_of
from tests.datamodules.small import write_rows
from tests.ddp import run_ranks


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    return draw_shards(tmp_path_factory.mktemp("catalogue"))


def test_evaluation_loaders_are_named_in_order(tables: Tables) -> None:
    data = module(tables, "test")
    for names, loaders in (
        (data.val_loaders, data.val_dataloader()),
        (data.test_loaders, data.test_dataloader()),
        (
            module(tables, "test", test_splits=["test"]).test_loaders,
            module(tables, test_splits=["test"]).test_dataloader(),
        ),
    ):
        for name, loader in zip(names, loaders, strict=True):
            ids = torch.cat([batch.id for batch in loader]).tolist()
            expected = range(PRODUCTS) if name == "corpus" else data.shards.queries.of(name.removeprefix("queries/"))
            assert ids == list(expected)
    assert data.val_loaders == ["queries/val", "corpus"]
    assert data.test_loaders == ["corpus", "queries/val", "queries/test"]


def test_a_validation_corpus_of_judged_products_and_some_others(tables: Tables) -> None:
    data = module(tables, "validate", val_corpus="judged+7")
    judged = {p for (q, p) in tables.label if tables.split[q] == "val"}
    found = [data.product_ids()[id] for batch in data.val_dataloader()[1] for id in batch.id]
    assert judged < set(found)
    assert len(found) == len(set(found)) == len(judged) + 7
    assert len(module(tables, "validate", val_corpus="judged+100000").corpus_ids("judged+100000")) == PRODUCTS
    assert sum(len(batch.id) for batch in data.test_dataloader()[0]) == PRODUCTS


def test_texts_are_those_of_training(tables: Tables) -> None:
    titles = [tables.title[p] for p in tables.title if tables.positives(p)]
    queries = [tables.query[q] for q in tables.query if tables.trains(q)]
    assert sorted(module(tables).texts()) == sorted(titles + queries)


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
        self.seen: list[tuple[int, int, list[tuple[int, ...]]]] = []
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


def trainer(callbacks: list[Callback], devices: int = 1, **limits: Any) -> Trainer:
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


class NotingShards(Shards):
    """Notes which samples are read."""

    ids: list[int]

    def read(self, id: int, photo: bool = True) -> Sample:
        self.ids.append(id)
        return super().read(id, photo)


def test_resume_reads_and_decodes_nothing_of_what_is_done(
    epochs: Straight, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by samples nor by bytes: what is read is what the remaining steps show, and nothing else."""
    monkeypatch.setattr("datamodules.tuples.Shards", NotingShards)
    decoded, sizes = list[str](), list[int]()
    decode, read = batches.decode_photo, OpenFile.read
    monkeypatch.setattr(batches, "decode_photo", lambda *args: decoded.append(args[2]) or decode(*args))
    monkeypatch.setattr(OpenFile, "read", lambda file, *place: sizes.append(place[0]) or read(file, *place))
    limits = {**epochs.limits, "limit_val_batches": 0}
    for done in (0, 3, 8):
        NotingShards.ids, seen = [], epochs.seen[done:]
        decoded.clear()
        sizes.clear()
        ckpt = epochs.folder / f"{done:03d}-batch.ckpt" if done else None
        assert fit(tables.path, trainer([], **limits), ckpt, photo_cache_mib=0).seen == seen
        shown = [product for _, _, rows in seen for _, product, _ in rows]
        assert NotingShards.ids == shown
        index = Shards.open(tables.path).index
        assert decoded == [str(index.product_id[id]) for id in shown if index.photo[id]]
        assert sum(sizes) == index.size[shown].sum()


def test_resume_with_other_workers(epochs: Straight, tables: Tables, tmp_path: Path) -> None:
    assert resumed(tables, epochs, "003-batch", workers=2) == epochs.seen[3:]
    helped = run_straight(tables, tmp_path, epochs.limits, workers=2)
    assert helped.seen == epochs.seen
    assert resumed(tables, helped, "008-batch") == epochs.seen[8:]
    assert not multiprocessing.active_children()


def _two_ranks(
    rank: int, world: int, path: Path, ckpt: Path | None, options: dict[str, Any]
) -> tuple[list[Any], dict[int, list[int]]]:
    used = trainer([], world, max_epochs=3)
    recorder = fit(path, used, ckpt, workers=1, **options)
    used.test(recorder, used.datamodule, verbose=False)  # type: ignore[attr-defined]
    return recorder.seen, recorder.tested


@pytest.mark.parametrize("done", [0, 3])
def test_two_ranks_see_the_batches_of_one(epochs: Straight, tables: Tables, done: int) -> None:
    ckpt = epochs.folder / f"{done:03d}-batch.ckpt" if done else None
    (first, tested), (second, tested_too) = run_ranks(_two_ranks, 2, tables.path, ckpt, {})
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


@pytest.fixture(scope="module")
def mined(tables: Tables, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tables, Straight]:
    """The shards with a table of negatives, and a run with two per tuple."""
    folder = tmp_path_factory.mktemp("mined")
    beside = replace(tables, path=copied(tables, folder))
    write_mined(beside.path, 1.0)
    return beside, run_straight(beside, folder, {"max_epochs": 3}, **NEGATIVES)


NEGATIVES: dict[str, Any] = {"hard_negatives": 2, "hard_from": ["judged", "mined"]}


def write_mined(path: Path, score: float) -> None:
    query = np.repeat(np.arange(QUERIES), 4)
    product = (query * 7 + np.tile([0, 30, 60, 90], QUERIES)) % PRODUCTS
    write_pair_table(path, "mined", "negatives", query, product, np.full(len(query), score), {}, replace=True)


@pytest.mark.parametrize(("hook", "workers"), [("batch", 0), ("batch", 2), ("epoch", 1)])
def test_resume_draws_the_same_negatives(mined: tuple[Tables, Straight], hook: str, workers: int) -> None:
    tables, straight = mined
    assert {len(row) for _, _, rows in straight.seen for row in rows} == {3 + 2 * 2}
    for name in sorted(path.stem for path in straight.folder.glob(f"*-{hook}.ckpt"))[::3]:
        assert resumed(tables, straight, name, workers=workers, **NEGATIVES) == straight.seen[int(name[:3]) :], name


@pytest.mark.parametrize("done", [0, 3])
def test_two_ranks_draw_the_negatives_of_one(mined: tuple[Tables, Straight], done: int) -> None:
    tables, straight = mined
    ckpt = straight.folder / f"{done:03d}-batch.ckpt" if done else None
    (first, _), (second, _) = run_ranks(_two_ranks, 2, tables.path, ckpt, NEGATIVES)
    together = [(*a[:2], a[2] + b[2]) for a, b in zip(first, second, strict=True)]
    assert together == straight.seen[done:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hard_negatives": 3}, "data.hard_negatives=2, this run has 3"),
        (
            {"hard_from": ["mined", "judged"]},
            r"data.hard_from=\['judged', 'mined'\], this run has \['mined', 'judged'\]",
        ),
        ({"hard_max_gain": 0.1}, "data.hard_max_gain=0.0, this run has 0.1"),
        ({"hard_negatives": 0, "hard_from": ["judged"]}, "data.hard_negatives=2, this run has 0"),
    ],
    ids=str,
)
def test_resume_with_other_negatives_is_refused(
    mined: tuple[Tables, Straight], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resumed(*mined, "003-batch", **{**NEGATIVES, **options})


def test_resume_with_another_table_of_the_name_is_refused(mined: tuple[Tables, Straight]) -> None:
    tables, straight = mined
    write_mined(tables.path, 2.0)
    with pytest.raises(ValueError, match=r"with tables of pairs \(sha256\) {'mined': '[0-9a-f]{64}'}, this run has"):
        resumed(tables, straight, "003-batch", **NEGATIVES)
    write_mined(tables.path, 1.0)
    assert resumed(tables, straight, "003-batch", **NEGATIVES) == straight.seen[3:]


def test_a_checkpoint_from_before_there_were_negatives_goes_on_without(
    epochs: Straight, tables: Tables, tmp_path: Path
) -> None:
    checkpoint = torch.load(epochs.folder / "003-batch.ckpt", weights_only=True)
    state = checkpoint["TupleDataModule"]
    for name in ("hard_negatives", "hard_from", "hard_max_gain", "pair_tables"):
        del state[name]
    torch.save(checkpoint, tmp_path / "before.ckpt")
    before = Straight(epochs.limits, [], tmp_path)
    assert resumed(tables, before, "before") == epochs.seen[3:]
    with pytest.raises(ValueError, match=r"data\.hard_negatives=0, this run has 1"):
        resumed(tables, before, "before", hard_negatives=1)


def test_what_evaluation_asks_besides_batches(tables: Tables) -> None:
    data = module(tables, "test", text_fields=["title", "brand"], modalities=["image"])
    products, queries = data.product_ids(), data.query_ids(np.arange(QUERIES))
    assert isinstance(data, RetrievalData)
    assert queries == data.shards.queries.query_id.tolist()
    assert data.query_ids(np.array([7, 3])) == [queries[7], queries[3]]
    assert sorted(data.train_queries()) == sorted(text for q, text in tables.query.items() if tables.trains(q))
    assert data.has_photo().tolist() == [tables.colour[p] is not None for p in products]
    assert data.train_positives().tolist() == [len(tables.positives(p)) for p in products]
    assert data.product_columns() == ["title", "brand"]
    assert data.product_column("brand").tolist() == [tables.brand[p] for p in products]
    assert data.product_texts() == [" ".join(filter(None, (tables.title[p], tables.brand[p]))) for p in products]
    assert data.product_texts() == [data.reader.text(data.shards.read(id).texts) for id in range(PRODUCTS)]
    assert data.query_columns() == []


def test_the_shards_are_read_twice_at_most(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    data, read = module(tables, "test"), list[list[str]]()
    texts = data.shards.texts
    monkeypatch.setattr(data.shards, "texts", lambda fields: read.append(list(fields)) or texts(fields))
    for _ in range(2):
        assert data.product_texts() == data.product_column("title").tolist()
        assert data.product_column("brand") is data.product_column("brand")
    assert read == [["title"], ["brand"]]


def test_texts_of_what_cannot_be_read_are_empty_and_told_of(tables: Tables, tmp_path: Path) -> None:
    path = copied(tables, tmp_path)
    (path / "00004.tar").unlink()
    lost = np.flatnonzero(Shards.open(path).index.shard == 4)
    whole = module(tables, "test", text_fields=["title", "brand"])
    data = TupleDataModule(str(path), text_fields=["title", "brand"], image_size=SIZE, max_broken=0.2)
    with pytest.warns(UserWarning, match=r"\(1 missing shard\), with 19 of 150 products: 00004.tar"):
        data.setup("test")
    asked: dict[str, Callable[[TupleDataModule], list[Any]]] = {
        "texts": lambda module: module.product_texts(),
        "thumbnails": lambda module: module.thumbnails(np.arange(PRODUCTS), 8),
        "products": lambda module: module.products(np.arange(PRODUCTS)).text,
    }
    for what, ask in asked.items():
        with pytest.warns(UserWarning, match=rf"{what}: 19 of 150 products failed \(19 missing shard\)"):
            found = ask(data)
        expected = ask(whole)
        assert not any(found[id] for id in lost)
        assert [id for id in range(PRODUCTS) if found[id] != expected[id]] == [id for id in lost if expected[id]]
    trained = np.intersect1d(lost, np.flatnonzero(data.shards.index.trainable))
    with pytest.warns(UserWarning, match=rf"texts of trainable products: {len(trained)} of"):
        texts = list(data.texts())
    assert len(texts) == len(list(whole.texts()))


def test_a_column_that_is_not_there_is_named(tables: Tables) -> None:
    data = module(tables, "test")
    with pytest.raises(ValueError, match=r"no column 'brnad'; did you mean 'brand'\? the products of .* title, brand"):
        data.product_column("brnad")
    with pytest.raises(ValueError, match=r"no column 'brand'; the queries of .*shards have none"):
        data.query_column("brand")


def photo(size: tuple[int, int], kind: str, orientation: int = 1, colour: tuple[int, ...] = (200, 30, 60)) -> bytes:
    """One colour, but white in the top left quarter; a fourth value of a colour is its opacity."""
    image = Image.new("RGBA" if len(colour) > 3 else "RGB", size, colour)
    image.paste((255, 255, 255), (0, 0, size[0] // 2, size[1] // 2))
    exif, content = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(content, kind, exif=exif, **({"comment": b"c" * 60_000} if kind == "JPEG" else {}))
    return content.getvalue()


PHOTOS = {  # with the (width, height) and the corner, as (right, bottom), of the white quarter in a thumbnail of 32
    "wide.jpg": (photo((120, 60), "JPEG"), (32, 16), (0, 0)),
    "tall.png": (photo((50, 200), "PNG"), (8, 32), (0, 0)),
    "on_its_side.jpg": (photo((120, 60), "JPEG", orientation=6), (16, 32), (1, 0)),
    "upside_down.png": (photo((64, 64), "PNG", orientation=3), (32, 32), (1, 1)),
    "small.png": (photo((10, 4), "PNG"), (10, 4), (0, 0)),
    "thread.png": (photo((2, 900), "PNG"), (1, 32), (0, 0)),
    "clear.webp": (photo((60, 60), "WEBP", colour=(0, 0, 0, 0)), (32, 32), None),
}


@pytest.fixture
def photos(tmp_path: Path) -> TupleDataModule:
    """Products named by their photos, "broken.png" (damaged after the import) and "none" without one."""
    (tmp_path / "images").mkdir()
    broken = photo((30, 30), "PNG")
    contents = {name: content for name, (content, _, _) in PHOTOS.items()} | {"broken.png": broken}
    for name, content in contents.items():
        (tmp_path / "images" / name).write_bytes(content)
    rows = [[name, name, name if name in contents else ""] for name in [*contents, "none"]]
    write_rows(tmp_path / "products.csv", ["product_id", "title", "image"], rows)
    write_rows(tmp_path / "queries.csv", ["query_id", "query", "split"], [["q", "all", "train"]])
    write_rows(tmp_path / "judgments.csv", ["query_id", "product_id", "label"], [["q", name, "E"] for name, *_ in rows])
    write_shards(read_catalogue(tmp_path), tmp_path / "shards", shard_size=100)
    tar = tmp_path / "shards" / "00000.tar"
    tar.write_bytes(tar.read_bytes().replace(broken, b"x" * len(broken)))
    data = TupleDataModule(str(tmp_path / "shards"))
    data.setup("test")
    return data


def test_thumbnails_are_small_upright_photos_on_white(photos: TupleDataModule) -> None:
    names = photos.product_ids()
    with pytest.warns(UserWarning, match=r"thumbnails: 1 of 9 products failed \(1 not a photo\).*'broken.png'"):
        found = dict(zip(names, photos.thumbnails(np.arange(len(names)), 32), strict=True))
    assert found.pop("none") is None
    assert found.pop("broken.png") is None
    assert photos.has_photo()[names.index("broken.png")]
    for name, content in found.items():
        _, size, white = PHOTOS[name]
        assert content is not None
        assert len(content) < 2000
        image = Image.open(io.BytesIO(content))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", size), name
        for corner in ((0, 0), (1, 0), (0, 1), (1, 1)) if min(size) > 1 else ():
            seen = image.getpixel((corner[0] * (size[0] - 1), corner[1] * (size[1] - 1)))
            expected = (255, 255, 255) if white in (corner, None) else (200, 30, 60)
            assert np.abs(np.subtract(seen, expected)).max() < 30, (name, corner)
    turned = np.array([names.index("tall.png"), names.index("none"), names.index("wide.jpg")])
    assert photos.thumbnails(turned, 32) == [found["tall.png"], None, found["wide.jpg"]]
