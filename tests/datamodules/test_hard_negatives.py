"""Hard negatives and a teacher's scores in the stream, against the tables that they come from."""

import hashlib
import pickle
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from datamodules.pair_tables import write_pair_table
from datamodules.plan import draws
from datamodules.shards import Shards
from datamodules.stream import loaders, workers
from datamodules.stream.batches import Reader, Request, joined
from datamodules.stream.blocks import PhotoBlocks
from datamodules.stream.loaders import TupleLoader
from datamodules.tuples import TupleDataModule
from mmfusion.batch import Judged, TupleBatch
from tests.datamodules.damage import Elsewhere, copied, overwrite
from tests.datamodules.drawn import PRODUCTS, QUERIES, SIZE, Tables, draw_shards, draw_tables, module, same, write_drawn
from tests.datamodules.faulty import serving
from tests.datamodules.slow_negatives import slow_draw

GAIN = {"E": 1.0, "S": 0.1, "I": 0.0}
BOTH: dict[str, Any] = {"hard_negatives": 3, "hard_from": ["mined", "judged"], "scores": ["teacher"]}

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Dense(NamedTuple):
    """The tables by dense ids. `labels` of train queries; `mined` and `teacher` as they are beside the shards."""

    tables: Tables
    products: list[str]
    labels: dict[tuple[int, int], str]
    wishes: dict[tuple[int, int], float | None]
    mined: set[tuple[int, int]]
    teacher: dict[tuple[int, int], float]

    def labelled(self, *labels: str) -> set[tuple[int, int]]:
        return {pair for pair, label in self.labels.items() if label in labels}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Dense:
    """Mined are of every query some products, its positives among them, but none of the first two train queries."""
    tables, random = draw_shards(tmp_path_factory.mktemp("catalogue")), np.random.default_rng(1)
    shards = Shards.open(tables.path)
    query = {str(id): row for row, id in enumerate(shards.queries.query_id)}
    product = {str(id): row for row, id in enumerate(shards.index.product_id)}
    train = {pair: label for pair, label in tables.label.items() if tables.trains(pair[0])}
    pairs = [(q, p) for q in range(QUERIES) for p in range(PRODUCTS)]
    few = set(shards.queries.of("train")[:2].tolist())
    mined = {pair for pair in pairs if random.random() < 0.02 and pair[0] not in few}
    teacher = {pair: random.normal() for pair in pairs if random.random() < 0.1}
    for name, kind, rows in (("mined", "negatives", dict.fromkeys(mined, 1.0)), ("teacher", "scores", teacher)):
        ids = np.array(list(rows)).T
        write_pair_table(tables.path, name, kind, *ids, np.array(list(rows.values())), {})  # type: ignore[arg-type]
    ids = [(query[q], product[p]) for q, p in train]
    labels, wishes = zip(*train.values(), strict=True)
    assert len(mined & {pair for pair, label in zip(ids, labels, strict=True) if label == "E"}) > 0
    return Dense(
        tables, list(product), dict(zip(ids, labels, strict=True)), dict(zip(ids, wishes, strict=True)), mined, teacher
    )


def entries(judged: Judged) -> dict[tuple[int, int], tuple[float, bool]]:
    """By (row, query)."""
    assert (judged.product.diff() >= 0).all(), "rows ascend"
    rows = zip(judged.product.tolist(), judged.query_id.tolist(), strict=True)
    found = dict(zip(rows, zip(judged.gain.tolist(), judged.positive.tolist(), strict=True), strict=True))
    assert len(found) == len(judged.gain)
    return found


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({"hard_negatives": 3}, "I"),
        ({"hard_negatives": 4, "hard_max_gain": 0.1}, "IS"),
        ({"hard_negatives": 2, "hard_max_gain": 5.0}, "IS"),  # never what is positive
        (BOTH, "I"),
        ({"hard_negatives": 12, "hard_from": ["judged", "mined"]}, "I"),  # more than most have
        ({"hard_negatives": 2, "hard_from": ["mined"]}, ""),
        ({"hard_negatives": 2, "hard_from": []}, ""),
    ],
    ids=str,
)
def test_negatives_are_those_of_the_slow_drawing(dense: Dense, options: dict[str, Any], labels: str) -> None:
    data, k = module(dense.tables, seed=3, **options), options["hard_negatives"]
    known = {"judged": dense.labelled(*labels), "mined": dense.mined}
    sources = [known[name] for name in options.get("hard_from", ["judged"])]
    positives, seen = dense.labelled("E"), list[int]()
    loader = data.train_dataloader()
    loader.progress = lambda: (2, 0)
    for batch in loader:
        b = len(batch)
        assert len(batch.hard) == b * k == len(batch.product.id) - b
        for i, (q, p) in enumerate(zip(batch.query.id.tolist(), batch.product.id.tolist(), strict=False)):
            rows = slice(b + i * k, b + (i + 1) * k)
            found = list(zip(batch.product.id[rows].tolist(), batch.hard[i * k :][:k].tolist(), strict=True))
            assert found == slow_draw((3, 2), q, p, k, positives, sources, PRODUCTS)
            ids = {id for id, _ in found}
            assert len(ids) == k
            assert not {(q, id) for id in ids} & positives
            assert p not in ids
            seen += [source for _, source in found]
    assert data.hard_sources == ["random", *options.get("hard_from", ["judged"])]
    assert set(seen) <= set(range(len(data.hard_sources)))
    assert (set(seen) == {0}) == (options.get("hard_from") == [])


@pytest.mark.parametrize("workers", [0, 2])
def test_every_row_says_what_the_tables_say(dense: Dense, workers: int) -> None:
    tables = dense.tables
    for batch in module(tables, workers=workers, text_fields=["title", "brand"], **BOTH).train_dataloader():
        ids = batch.product.id.tolist()
        assert len(ids) == 4 * len(batch) == len(batch.product.text) == len(batch.product.photo)
        for row, product in enumerate(dense.products[id] for id in ids):
            text = " ".join(part for part in (tables.title[product], tables.brand[product]) if part)
            colour = tables.colour[product]
            assert batch.product.text[row] == text
            assert batch.product.present[row].tolist() == [text != "", colour is not None]
            expected = torch.tensor(colour or (0, 0, 0), dtype=torch.uint8)
            assert (batch.product.photo[row] == expected[:, None, None]).all()
        assert batch.product.valid.all()
        assert batch.product.draw.tolist() == draws(0, 0, batch.product.id.numpy()).tolist()
        gains = {pair: GAIN[label] for pair, label in dense.labels.items()}
        for column, of in (("relevance", gains), ("desirability", dense.wishes)):
            expected_entries = {
                (row, q): (pytest.approx(gain), gain >= 1)
                for row, id in enumerate(ids)
                for (q, p), gain in of.items()
                if p == id and gain
            }
            assert entries(batch.judged[column]) == expected_entries
        assert list(batch.scores) == ["teacher"]
        assert entries(batch.scores["teacher"]) == {
            (row, q): (pytest.approx(score), False)
            for row, id in enumerate(ids)
            for (q, p), score in dense.teacher.items()
            if p == id
        }


class Seen(NamedTuple):
    """A tuple and its negatives as the model is given them; `listed` is (column, query, gain, positive) of each row."""

    query: int
    product: list[int]
    text: list[str]
    draw: list[int]
    photo: list[str]
    hard: list[int]
    listed: list[list[tuple[Any, ...]]]


def tuples(batch: TupleBatch) -> list[Seen]:
    b, k = len(batch), len(batch.hard) // len(batch)
    listed: list[list[tuple[Any, ...]]] = [[] for _ in batch.product.text]
    for column, of in {**batch.judged, **{f"score {name}": of for name, of in batch.scores.items()}}.items():
        for row, *said in zip(*(getattr(of, f.name).tolist() for f in fields(of)), strict=True):
            listed[row].append((column, *said))
    digests = [hashlib.sha256(photo.numpy().tobytes()).hexdigest() for photo in batch.product.photo]
    columns = (batch.product.id.tolist(), batch.product.text, batch.product.draw.tolist(), digests)
    found = []
    for i, query in enumerate(batch.query.id.tolist()):
        rows = [i, *range(b + i * k, b + (i + 1) * k)]
        id, text, draw, photo = ([column[row] for row in rows] for column in columns)
        hard = batch.hard[i * k : (i + 1) * k].tolist()
        found.append(Seen(query, id, text, draw, photo, hard, [listed[row] for row in rows]))
    return found


def of_rank(data: TupleDataModule, rank: int, ranks: int) -> TupleLoader:
    options = {"rank": rank, "ranks": ranks, "workers": data.workers, "max_broken": data.max_broken}
    return TupleLoader(data.plan, data.slots, data.reader, lambda: (0, 0), **options)


def steps_of_rank(data: TupleDataModule, at: tuple[int, int], rank: int, ranks: int) -> Iterator[TupleBatch]:
    loader = data.train_dataloader() if ranks == 1 else of_rank(data, rank, ranks)
    loader.progress = lambda: at
    yield from loader
    loader.close()


def steps(data: TupleDataModule, at: tuple[int, int], ranks: int = 1) -> list[list[Seen]]:
    parts = [steps_of_rank(data, at, rank, ranks) for rank in range(ranks)]
    return [[seen for batch in batches for seen in tuples(batch)] for batches in zip(*parts, strict=True)]


@pytest.fixture(scope="module")
def straight(dense: Dense) -> list[list[Seen]]:
    return steps(module(dense.tables, photo_cache_mib=0, **BOTH), (2, 0))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_step_is_the_same_on_any_ranks_and_workers(
    dense: Dense, straight: list[list[Seen]], ranks: int, workers: int
) -> None:
    data = module(dense.tables, workers=workers, **BOTH)
    assert steps(data, (2, 0), ranks) == straight
    assert steps(data, (2, 3), ranks) == straight[3:]
    assert len(straight) == 5


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_are_the_same_to_the_last_byte(dense: Dense, workers: int) -> None:
    alone = list(module(dense.tables, **BOTH).train_dataloader())
    helped = list(module(dense.tables, workers=workers, photo_cache_mib=0, **BOTH).train_dataloader())
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


def test_tuples_are_those_without_negatives(dense: Dense) -> None:
    for plain, more in zip(
        module(dense.tables).train_dataloader(), module(dense.tables, **BOTH).train_dataloader(), strict=True
    ):
        b = len(plain)
        assert same(plain.query, more.query)
        for name in (f.name for f in fields(plain.product) if f.name != "shown"):
            assert same(getattr(plain.product, name), getattr(more.product, name)[:b])
        for column, judged in plain.judged.items():
            own = more.judged[column].product < b
            assert all(
                torch.equal(getattr(judged, f.name), getattr(more.judged[column], f.name)[own]) for f in fields(judged)
            )
        assert plain.scores == {}
        assert plain.hard.shape == (0,)
        assert plain.hard.dtype == torch.int64


def test_epochs_and_seeds_draw_otherwise(dense: Dense) -> None:
    def drawn(seed: int, epoch: int) -> dict[tuple[int, int], list[int]]:
        data = module(dense.tables, seed=seed, hard_negatives=2, hard_max_gain=0.1)
        return {(seen.query, seen.product[0]): seen.product[1:] for step in steps(data, (epoch, 0)) for seen in step}

    first = drawn(0, 0)
    for other in (drawn(0, 1), drawn(1, 0)):
        both = first.keys() & other.keys()
        assert len(both) > 15
        assert np.mean([sorted(first[pair]) == sorted(other[pair]) for pair in both]) < 0.2


@pytest.mark.parametrize("options", [{"epoch": "pairs"}, {"batch_size": 40}, {"streams": 4}, {"window": 2}], ids=str)
def test_a_pair_has_its_negatives_whatever_the_order(
    dense: Dense, straight: list[list[Seen]], options: dict[str, Any]
) -> None:
    expected = {(seen.query, seen.product[0]): seen for step in straight for seen in step}
    other = steps(module(dense.tables, **options, **BOTH), (2, 0))
    found = {(seen.query, seen.product[0]): seen for step in other for seen in step}
    both = expected.keys() & found.keys()
    assert len(both) > 25
    assert all(expected[pair] == found[pair] for pair in both)


def test_parts_are_joined_by_hand(dense: Dense) -> None:
    """Parts of 1, 0 listed, 2 and 3 tuples: rows go to tuples first, and entries with them."""
    data = module(dense.tables, batch_size=8, hard_negatives=2, scores=["teacher"])
    batch = next(iter(data.train_dataloader()))
    k, cuts = 2, [0, 1, 3, 8]

    def listed(of: Judged, rows: list[int]) -> Judged:
        place = {row: new for new, row in enumerate(rows)}
        kept = sorted(
            (e for e in range(len(of.gain)) if int(of.product[e]) in place), key=lambda e: place[int(of.product[e])]
        )
        part = Judged(**{f.name: getattr(of, f.name)[kept] for f in fields(of)})
        return replace(part, product=torch.tensor([place[row] for row in part.product.tolist()], dtype=torch.int64))

    def part(start: int, end: int) -> TupleBatch:
        rows = [*range(start, end), *range(8 + start * k, 8 + end * k)]
        product = {f.name: getattr(batch.product, f.name) for f in fields(batch.product) if f.name != "shown"}
        chosen = {name: [of[row] for row in rows] if isinstance(of, list) else of[rows] for name, of in product.items()}
        query = type(batch.query)(batch.query.text[start:end], batch.query.id[start:end], batch.query.valid[start:end])
        return TupleBatch(
            query,
            type(batch.product)(**chosen),
            {column: listed(of, rows) for column, of in batch.judged.items()},
            {table: listed(of, rows) for table, of in batch.scores.items()},
            batch.hard[start * k : end * k],
        )

    parts = [part(start, end) for start, end in pairwise(cuts)]
    assert same(joined(parts), batch)
    assert same(joined(parts, batch.product.photo), batch)
    assert same(joined([batch]), batch)


@pytest.mark.parametrize("number", [0, 2])
def test_blocks_hold_negatives_too(dense: Dense, number: int) -> None:
    """A batch that is held stays as it is, and all are as those read into memory of their own."""
    options = {"photo_cache_mib": 0, "batch_size": 8, **BOTH}
    plain = module(dense.tables, **options).train_dataloader()
    plain._blocks = plain._shares.blocks = PhotoBlocks(0, (8 * 4, 3, *SIZE))
    expected = list(plain)
    loader = module(dense.tables, workers=number, **options).train_dataloader()
    assert loader._blocks.rows(0, 0, 99).shape == (8 * 4, 3, *SIZE)
    first = next(iter(loader))
    missed, take = list[bool](), loader._blocks.take

    def noted() -> int | None:
        block = take()
        missed.append(block is None)
        return block

    loader._blocks.take = noted  # type: ignore[method-assign]
    previous = None
    for batch, right in zip(loader, expected, strict=True):
        assert same(batch, right)
        previous = batch
    assert previous is not None
    assert same(first, expected[0])
    assert same(list(loader)[-1], expected[-1])
    assert sum(missed) <= len(missed) // 2  # all but those that the list held
    loader.close()


def test_workers_that_are_not_forked_draw_the_same(dense: Dense, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list(islice(module(dense.tables, **BOTH).train_dataloader(), 2))
    monkeypatch.setattr(workers, "CONTEXT", "spawn")
    monkeypatch.setattr(loaders, "FORKS", False)
    loader = module(dense.tables, workers=1, **BOTH).train_dataloader()
    assert all(same(one, other) for one, other in zip(islice(loader, 2), expected, strict=True))
    loader.close()
    reader = module(dense.tables, **BOTH).reader
    assert len(pickle.dumps(reader)) < 20_000


@pytest.fixture
def damaged(dense: Dense, tmp_path: Path) -> tuple[Path, list[int]]:
    """Shards of which five products cannot be read: some are drawn as negatives."""
    path = copied(dense.tables, tmp_path)
    lost = [3, 30, 60, 90, 120]
    for id in lost:
        overwrite(path, id, b"")
    return path, lost


def opened(path: Path | str, **options: Any) -> TupleDataModule:
    data = TupleDataModule(str(path), batch_size=16, image_size=SIZE, **options)
    data.setup("fit")
    return data


@pytest.mark.parametrize(("ranks", "number"), [(1, 0), (1, 2), (4, 0)])
def test_negatives_that_cannot_be_read_are_replaced_and_counted(
    dense: Dense, straight: list[list[Seen]], damaged: tuple[Path, list[int]], ranks: int, number: int
) -> None:
    path, lost = damaged
    data = opened(path, max_broken=1.0, workers=number, **BOTH)
    found = steps(data, (2, 0), ranks)
    assert found == steps(opened(path, max_broken=1.0, **BOTH), (2, 0))
    positives, replaced = dense.labelled("E"), 0
    for seen, whole in zip(chain(*found), chain(*straight), strict=True):
        assert not set(seen.product) & set(lost)
        assert len(set(seen.product)) == 4
        assert not {(seen.query, id) for id in seen.product[1:]} & positives
        if whole.product[0] in lost:
            continue
        assert seen.query == whole.query
        for j in range(3):
            if whole.product[1 + j] in lost:
                replaced += 1
                assert seen.hard[j] == 0
                assert seen.text[1 + j] == dense.tables.title[dense.products[seen.product[1 + j]]]
            else:
                assert (seen.product[1 + j], seen.hard[j]) == (whole.product[1 + j], whole.hard[j])
    assert replaced > 3


def test_what_failed_counts_of_all_products(
    dense: Dense, straight: list[list[Seen]], damaged: tuple[Path, list[int]]
) -> None:
    path, lost = damaged
    data = opened(path, max_broken=0.2, **BOTH)
    loader = data.train_dataloader()
    loader.progress = lambda: (2, 0)
    negatives = sum(
        id in lost for step in straight for seen in step for id in seen.product[1:] if seen.product[0] not in lost
    )
    own = sum(seen.product[0] in lost for step in straight for seen in step)
    list(loader)
    with pytest.warns(UserWarning, match=rf"epoch 2: \d+ of {5 * 16 * 4} products failed .*replaced by other products"):
        counts = data.failures()
    assert counts["wrong member"] >= negatives + own
    data.max_broken = 0.001
    with pytest.raises(ValueError, match=r"data.max_broken=0.001"):
        list(data.train_dataloader())


def test_a_lost_photo_of_a_negative_is_absent(dense: Dense, tmp_path: Path, straight: list[list[Seen]]) -> None:
    path = copied(dense.tables, tmp_path)
    index = Shards.open(path).index
    blind = next(id for step in straight for seen in step for id in seen.product[1:] if index.photo[id])
    tar = path / Shards.open(path).manifest.shards[index.shard[blind]].name
    content = bytearray(tar.read_bytes())
    start = content.index(b"\x89PNG", index.offset[blind])
    content[start : start + 8] = b"<html>  "
    tar.write_bytes(content)
    data = opened(path, max_broken=1.0, **BOTH)
    loader = data.train_dataloader()
    loader.progress = lambda: (2, 0)
    times = 0
    for batch in loader:
        rows = batch.product.id == blind
        assert not batch.product.present[rows, 1].any()
        assert not batch.product.photo[rows].any()
        times += int(rows.sum())
    with pytest.warns(UserWarning, match="taken without photo"):
        assert data.failures()["not a photo"] == times > 0


def test_shards_of_negatives_are_fetched(dense: Dense) -> None:
    store, data = Elsewhere(dense.tables.path), module(dense.tables, batch_size=8, streams=1, window=1, **BOTH)
    data.reader = Reader(Shards.open(store), data.look, 0.5, 0, data.pairs)
    data.reader.prepare()
    assert store.asked.count("pairs/mined.parquet") == store.asked.count("pairs/teacher.parquet") == 1
    store.fetched.clear()
    loader = TupleLoader(data.plan, data.slots, data.reader, lambda: (0, data.plan.steps - 1))
    (batch,) = loader
    fetched = {name for names in store.fetched for name in names}
    needed = {f"{number:05d}.tar" for number in data.shards.index.shard[batch.product.id.numpy()]}
    assert needed <= fetched
    assert len(needed) > 4


@pytest.mark.parametrize("number", [0, 2])
def test_from_a_server_the_stream_is_the_same(
    dense: Dense, straight: list[list[Seen]], tmp_path: Path, number: int
) -> None:
    with serving(dense.tables.path) as site:
        data = opened(site.url, cache=str(tmp_path / "cache"), workers=number, **BOTH)
        assert steps(data, (2, 0)) == straight
        assert site.counts["pairs/mined.parquet"] == site.counts["pairs/teacher.parquet"] == 1
        assert data.pair_tables_in_use() == module(dense.tables, **BOTH).pair_tables_in_use()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hard_negatives": -1}, "data.hard_negatives is -1; expected at least 0"),
        ({"hard_from": ["mined"]}, r"data.hard_from is \['mined'\], but data.hard_negatives is 0.*set both"),
        ({"hard_max_gain": 0.5}, "data.hard_max_gain is 0.5, but data.hard_negatives is 0"),
        ({"hard_negatives": 1, "hard_max_gain": -0.5}, "data.hard_max_gain is -0.5; expected a gain of at least 0"),
        ({"hard_negatives": 1, "hard_max_gain": float("nan")}, "data.hard_max_gain is nan; expected a gain of"),
        ({"hard_negatives": 1, "hard_from": ["mined"], "hard_max_gain": 0.5}, "which judgments 'judged' takes"),
        ({"hard_negatives": 1, "hard_from": ["mind"]}, r"data.hard_from names 'mind'; did you mean 'mined'\?"),
        ({"hard_negatives": 1, "hard_from": ["teacher"]}, "that is a table of scores; .* of which .* has mined"),
        ({"hard_negatives": 1, "hard_from": ["mined", "mined"]}, "data.hard_from names 'mined' twice"),
        ({"scores": ["taecher"]}, r"data.scores names 'taecher'; did you mean 'teacher'\?"),
        ({"scores": ["teacher", "teacher"]}, "data.scores names 'teacher' twice"),
        ({"hard_negatives": 149}, r"is 149, but query 'q\d+' has only \d+ of 150 products that are not its positives"),
    ],
    ids=str,
)
def test_options_that_do_not_suit_are_named(dense: Dense, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(dense.tables, **options)


def test_a_source_of_which_nothing_is_drawn_is_named(dense: Dense, tmp_path: Path) -> None:
    """Judged E and S alone, as fashion's train queries; tables of positives, of other splits, of no rows."""
    made = draw_tables(tmp_path / "shards")
    label = {pair: ("S" if label == "I" else label, None) for pair, (label, _) in made.label.items()}
    tables = write_drawn(replace(made, label=label), tmp_path)
    with pytest.raises(
        ValueError,
        match=r"data.hard_from names 'judged'.*at most data.hard_max_gain=0 in relevance: set that to 0.1, mine a "
        r"table and name it \(make mine\), or set data.hard_from=\[\]",
    ):
        module(tables, hard_negatives=1)
    module(tables, hard_negatives=1, hard_max_gain=0.1)
    module(tables, hard_negatives=1, hard_from=[])
    shards = Shards.open(tables.path)
    train = shards.judgments("train")
    positive = train.gain["relevance"] >= 1
    val = shards.queries.of("val")
    rows = {
        "positives": (train.query[positive], train.product[positive]),
        "val": (val, np.arange(len(val))),
        "none": (val[:0], val[:0]),
    }
    for name, (query, product) in rows.items():
        write_pair_table(tables.path, name, "negatives", query, product, np.zeros(len(query)), {})
        with pytest.raises(ValueError, match=rf"names '{name}', but none of its {len(query):,} pairs is of a train"):
            module(tables, hard_negatives=1, hard_from=[name])
    query, product = np.append(rows["val"][0], train.query[~positive][0]), np.append(rows["val"][1], 149)
    pair = (train.query == query[-1]) & (train.product == 149)
    assert not (pair & positive).any()
    write_pair_table(tables.path, "one", "negatives", query, product, np.zeros(len(query)), {})
    module(tables, hard_negatives=1, hard_from=["one"])


def test_as_many_as_there_are(dense: Dense) -> None:
    """Of the query with most positives, all others are negatives."""
    positives = np.bincount([q for q, _ in dense.labelled("E")])
    least = int(PRODUCTS - positives.max())
    data = module(dense.tables, hard_negatives=least, modalities=["text"])
    query = int(positives.argmax())
    product = next(p for p in data.slots.product.tolist() if {q for q, of in dense.labelled("E") if of == p} == {query})
    batch, _ = data.reader.tuples(Request(0, 0, np.array([product]), np.array([0]), np.array([1])))
    assert batch.query.id.tolist() == [query]
    expected = {p for p in range(PRODUCTS) if (query, p) not in dense.labelled("E")}
    assert len(batch.product.id) == 1 + least == 1 + len(expected)
    assert set(batch.product.id[1:].tolist()) == expected


def test_evaluation_needs_no_table(dense: Dense, tmp_path: Path) -> None:
    """A run is evaluated on other data, which nobody has mined."""
    path = copied(dense.tables, tmp_path)
    for name in ("mined", "teacher"):
        (path / "pairs" / f"{name}.parquet").unlink()
    data = TupleDataModule(str(path), image_size=SIZE, batch_size=16, **BOTH)
    data.setup("test")
    assert sum(len(batch.id) for batch in data.test_dataloader()[0]) == PRODUCTS
    assert data.pair_tables_in_use() == {}
    assert data.hard_sources == ["random", "mined", "judged"]
    with pytest.raises(ValueError, match=r"mined.parquet is missing.*data.hard_from names it"):
        data.setup("fit")


def test_tables_in_use_are_named_with_their_content(dense: Dense) -> None:
    listed = Shards.open(dense.tables.path).manifest.pairs
    both = {name: listed[name].sha256 for name in ("mined", "teacher")}
    assert module(dense.tables, **BOTH).pair_tables_in_use() == both
    assert module(dense.tables, hard_negatives=1).pair_tables_in_use() == {}
    assert module(dense.tables, scores=["teacher"]).pair_tables_in_use() == {"teacher": both["teacher"]}
    assert module(dense.tables).hard_sources == []


def test_what_losses_are_checked_against(dense: Dense) -> None:
    data = module(dense.tables, scores=["teacher"], hard_negatives=1, hard_max_gain=0.1)
    assert (data.score_tables, data.hard_max_gain) == (["teacher"], 0.1)
    batch = next(iter(data.train_dataloader()))
    assert (list(batch.scores), list(batch.judged)) == (data.score_tables, list(data.gains))
    assert (module(dense.tables).score_tables, module(dense.tables).hard_max_gain) == ([], 0.0)


def test_scores_without_negatives(dense: Dense) -> None:
    batch = next(iter(module(dense.tables, scores=["teacher"]).train_dataloader()))
    expected = {(row, q) for row, id in enumerate(batch.product.id.tolist()) for q, p in dense.teacher if p == id}
    assert entries(batch.scores["teacher"]).keys() == expected
    assert not len(batch.hard)


def test_a_batch_moves_whole(dense: Dense) -> None:
    batch = next(iter(module(dense.tables, **BOTH).train_dataloader()))
    moved = batch.to("meta")
    tensors = [moved.hard, moved.product.photo, moved.scores["teacher"].gain, moved.judged["relevance"].product]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert [len(tensor) for tensor in tensors] == [
        48,
        64,
        len(batch.scores["teacher"].gain),
        len(batch.judged["relevance"].gain),
    ]
    assert len(moved) == 16
    assert same(batch.to("cpu"), batch)


def test_train_queries_can_be_evaluated(dense: Dense) -> None:
    """As mining does: every train query against the whole corpus."""
    data = module(dense.tables, "test", test_splits=["train"])
    assert data.test_loaders == ["corpus", "queries/train"]
    corpus, queries = data.test_dataloader()
    ids = [id for batch in queries for id in batch.id[batch.valid].tolist()]
    assert ids == data.shards.queries.of("train").tolist()
    assert sum(len(batch.id) for batch in corpus) == PRODUCTS
    judged = data.judgments("train")
    pairs = dict(
        zip(zip(judged.query.tolist(), judged.product.tolist(), strict=True), judged.gain["relevance"], strict=True)
    )
    assert pairs == {pair: GAIN[label] for pair, label in dense.labels.items()}
