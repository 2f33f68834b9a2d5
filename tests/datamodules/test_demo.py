"""The demo catalogue: what the docstring promises about its optimum, its labels and its splits."""

import json
import math
from collections.abc import Collection
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datamodules.demo import ATTRIBUTES, TIERS, DemoCatalogue, Query, draw_demo
from datamodules.drawing import CONTRASTS, PATTERNS, SHAPES, draw_photo
from datamodules.shards import Shards

GAIN = {"E": 1.0, "S": 0.1, "C": 0.01, "I": 0.0}
SHOWN = ("shape", "colour", "pattern", "contrast")  # by a photo


@pytest.fixture(scope="module")
def demo() -> DemoCatalogue:
    """The default's plan; drawing is what takes time."""
    return DemoCatalogue.plan(0, products=4000, train_queries=3000, test_queries=150)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    out = tmp_path_factory.mktemp("demo") / "shards"
    draw_demo(out, products=300, train_queries=200, test_queries=20)
    return Shards.open(out)


def known(demo: DemoCatalogue, name: str, sees: Collection[str]) -> np.ndarray:
    seen = np.zeros(len(demo.photo), bool)
    if "title" in sees:
        seen |= demo.stated[name]
    if "photo" in sees and name in SHOWN:
        seen |= demo.photo
    return seen


def expected_gain(demo: DemoCatalogue, query: Query, sees: Collection[str]) -> np.ndarray:
    """Per product, the mean gain over what its unseen attributes may be (uniform, independent): the best score."""
    match = {
        name: np.where(known(demo, name, sees), demo.value[name] == value, 1 / len(ATTRIBUTES[name]))
        for name, value in query.wants.items()
    }
    gain = math.prod(match.values()) * np.ones(len(demo.photo))
    for miss, matches in match.items():
        others = math.prod(match[name] for name in match if name != miss)
        gain += GAIN["C" if miss == "shape" else "S"] * (1 - matches) * others
    return gain


def ndcg(score: np.ndarray, gain: np.ndarray, k: int = 10) -> float:
    discount = 1 / np.log2(np.arange(k) + 2)
    best = np.argsort(-score, kind="stable")[:k]
    return float((gain[best] * discount).sum() / (np.sort(gain)[::-1][:k] * discount).sum())


def oracle(demo: DemoCatalogue, *sees: str) -> float:
    test = [query for query in demo.queries if query.split == "test"]
    gains = [np.array([GAIN[label] for label in demo.labels(query.wants)]) for query in test]
    return float(np.mean([ndcg(expected_gain(demo, q, sees), gain) for q, gain in zip(test, gains, strict=True)]))


def test_both_views_together_settle_what_neither_can_alone(demo: DemoCatalogue) -> None:
    assert oracle(demo, "title", "photo") == pytest.approx(1)
    assert oracle(demo, "title") == pytest.approx(0.65, abs=0.03)
    assert oracle(demo, "photo") == pytest.approx(0.27, abs=0.03)


def test_everything_is_shown_or_stated(demo: DemoCatalogue) -> None:
    for name in ATTRIBUTES:
        assert known(demo, name, ("title", "photo")).all()
    for row, title in enumerate(demo.titles):
        words = title.split()
        for name, values in ATTRIBUTES.items():
            assert (values[demo.value[name][row]] in words) == demo.stated[name][row]
            assert len(set(values) & set(words)) == demo.stated[name][row]


def test_splits_share_no_wants_and_no_text(demo: DemoCatalogue) -> None:
    counts, wants = dict[str, int](), dict[str, set]()
    for query in demo.queries:
        counts[query.split] = counts.get(query.split, 0) + 1
        wants.setdefault(query.split, set()).add(frozenset(query.wants.items()))
        named = {ATTRIBUTES[name][value] for name, value in query.wants.items()}
        assert set(query.text.split()) == named
    assert counts == {"train": 3000, "val": 150, "test": 150}
    assert len(set.union(*wants.values())) == sum(map(len, wants.values()))
    assert len({query.text for query in demo.queries}) == len(demo.queries)


def test_labels_by_hand() -> None:
    """Six products against "red wool square" (0 = the wanted value of each attribute)."""
    names = ("shape", "colour", "material")
    table = np.array([(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0), (0, 1, 1), (1, 1, 0)])
    value = {name: np.zeros(6, int) for name in ATTRIBUTES} | dict(zip(names, table.T, strict=True))
    value["brand"] = np.array([5, 5, 0, 0, 0, 0])
    value["contrast"] = np.array([0, 1, 1, 1, 1, 1])
    demo = DemoCatalogue(value, {}, np.ones(6, bool), [""] * 6, [])
    labels = demo.labels(dict.fromkeys(names, 0))
    assert labels.tolist() == ["E", "S", "S", "C", "I", "I"]
    assert TIERS[5] == 1
    assert TIERS[0] == 0
    # E, best tier and vivid: 1; S: a quarter of .2 + .8 * quality, which is .5 for the best tier, faded
    assert demo.desirability(labels).tolist() == pytest.approx([1, 0.25 * 0.6, 0.25 * 0.2, 0, 0, 0])


def test_shards_hold_what_was_planned(shards: Shards) -> None:
    demo = DemoCatalogue.plan(0, products=300, train_queries=200, test_queries=20)
    assert list(shards.manifest.labels) == ["relevance", "desirability"]
    assert shards.manifest.labels["desirability"].positive_from == 0.8
    for sample in map(shards.read, range(300)):
        row = int(sample.product_id[1:])
        assert sample.texts["title"] == demo.titles[row]
        assert (sample.photo is not None) == demo.photo[row]
    wants = pq.read_table(shards.path / "queries.parquet")["wants"].to_pylist()
    for query, wanted in zip(demo.queries, wants, strict=True):
        assert json.loads(wanted) == {name: ATTRIBUTES[name][value] for name, value in query.wants.items()}


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_judgments_are_complete_where_unlisted_means_irrelevant(shards: Shards, split: str) -> None:
    demo = DemoCatalogue.plan(0, products=300, train_queries=200, test_queries=20)
    judgments = shards.judgments(split)
    row_of = np.array([int(name[1:]) for name in shards.index.product_id])
    for id in shards.queries.of(split).tolist():
        labels = demo.labels(demo.queries[id].wants)
        of_query = judgments.query == id
        listed = row_of[judgments.product[of_query]]
        assert judgments.gain["relevance"][of_query].tolist() == [GAIN[label] for label in labels[listed]]
        np.testing.assert_allclose(judgments.gain["desirability"][of_query], demo.desirability(labels)[listed])
        must = labels == "E" if split == "train" else labels != "I"
        assert set(np.flatnonzero(must)) <= set(listed.tolist())
        assert split == "train" or not (labels[listed] == "I").any()


def test_the_same_seed_draws_the_same_bytes_and_is_not_drawn_twice(shards: Shards, tmp_path: Path) -> None:
    options = {"products": 300, "train_queries": 200, "test_queries": 20}
    assert draw_demo(tmp_path / "again", **options).hash == shards.manifest.hash
    before = (tmp_path / "again").stat().st_mtime_ns
    draw_demo(tmp_path / "again", **options)
    assert (tmp_path / "again").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds other shards"):
        draw_demo(tmp_path / "again", seed=1, **options)


def mean_colour(photo: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(photo)).convert("RGB"))[24:40, 24:40].mean((0, 1))


def test_photos_differ_but_show_their_attributes() -> None:
    rng = np.random.default_rng(0)
    photos = {draw_photo("circle", "red", "plain", "vivid", rng) for _ in range(20)}
    assert len(photos) == 20
    for photo in photos:
        red, green, blue = mean_colour(photo)
        assert red > 150
        assert max(green, blue) < 80
        assert Image.open(BytesIO(photo)).size == (64, 64)


def test_every_combination_can_be_drawn() -> None:
    """And two that differ in one attribute differ by much more than grain."""
    first: dict[str, np.ndarray] = {}
    for shape in SHAPES:
        for pattern in PATTERNS:
            for contrast in CONTRASTS:
                photo = draw_photo(shape, "blue", pattern, contrast, np.random.default_rng(5))
                first[f"{shape} {pattern} {contrast}"] = np.asarray(Image.open(BytesIO(photo)), np.float32)[::2, ::2]
    pixels = np.stack([*first.values()])
    distance = np.abs(pixels[:, None] - pixels[None]).mean((2, 3, 4)) + 100 * np.eye(len(pixels), dtype=np.float32)
    assert distance.min() > 3
