"""The plan against its promises: a stated order, the same for every number of ranks, seen once, well shuffled."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.plan import Plan, Slots, chosen, draws, hashed, points, splitmix64, uniform

ROOT = Path(__file__).parents[2]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any catalogue that has at least one batch: shards of any size, empty ones too."""
    streams = draw(st.sampled_from([4, 8]))
    batch = streams * draw(st.integers(1, 6))
    slots = np.array(draw(st.lists(st.integers(0, 60), min_size=1, max_size=12)))
    slots[draw(st.integers(0, len(slots) - 1))] += batch
    return Plan(slots, draw(st.integers(0, 2**40)), batch, streams, window=draw(st.integers(1, 100)))


def seen(plan: Plan, epoch: int, rank: int = 0, ranks: int = 1) -> list[np.ndarray]:
    return [plan.batch(epoch, step, rank, ranks) for step in range(plan.steps)]


def test_splitmix64_gives_the_published_sequence() -> None:
    states = np.uint64(1234567) + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_hashes_are_uniform_and_differ_by_every_key() -> None:
    numbers = uniform(hashed(3, -1, np.arange(100_000)))
    assert np.histogram(numbers, 10, (0, 1))[0] == pytest.approx(10_000, abs=500)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.01
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, -1, 0)]
    assert len({int(hashed(*key)[0]) for key in keys}) == len(keys)


def test_draws_depend_on_seed_epoch_and_product_alone() -> None:
    ids = np.array([5, 900, 7])
    assert draws(1, 2, ids)[::-1].tolist() == draws(1, 2, ids[::-1].copy()).tolist()
    assert (draws(1, 2, ids) >= 0).all()
    others = np.concatenate([draws(1, 2, ids), draws(1, 3, ids), draws(2, 2, ids)])
    assert len(np.unique(others)) == 9


@settings(max_examples=40, deadline=None)
@given(plans(), st.integers(0, 1000))
def test_steps_do_not_depend_on_ranks(plan: Plan, epoch: int) -> None:
    whole = seen(plan, epoch)
    for ranks in (2, 4):
        parts = [seen(plan, epoch, rank, ranks) for rank in range(ranks)]
        assert all(len(batch) == plan.size // ranks for part in parts for batch in part)
        together = [np.concatenate(batches) for batches in zip(*parts, strict=True)]
        assert all((a == b).all() for a, b in zip(whole, together, strict=True))


@settings(max_examples=40, deadline=None)
@given(plans(), st.integers(0, 1000))
def test_an_epoch_sees_each_slot_at_most_once_and_misses_less_than_a_batch(plan: Plan, epoch: int) -> None:
    positions = np.concatenate(seen(plan, epoch))
    total = int(plan.slots.sum())
    assert len(np.unique(positions)) == len(positions)
    assert 0 <= positions.min() <= positions.max() < total
    assert total - plan.size < len(positions) <= total


@st.composite
def parted(draw: st.DrawFn) -> tuple[Plan, int]:
    """A plan and a number of ranks that can share it, powers of two or not."""
    streams = draw(st.sampled_from([1, 2, 3, 6, 8, 12]))
    batch = streams * draw(st.integers(1, 4))
    slots = np.array(draw(st.lists(st.integers(0, 50), min_size=1, max_size=9)))
    slots[0] += batch
    plan = Plan(slots, draw(st.integers(0, 2**40)), batch, streams, window=draw(st.integers(1, 100)))
    return plan, draw(st.sampled_from([ranks for ranks in range(1, streams + 1) if streams % ranks == 0]))


@settings(max_examples=60, deadline=None)
@given(parted(), st.integers(0, 1000))
def test_ranks_never_overlap_and_have_equally_many_full_batches(case: tuple[Plan, int], epoch: int) -> None:
    plan, ranks = case
    parts = [seen(plan, epoch, rank, ranks) for rank in range(ranks)]
    assert {len(part) for part in parts} == {plan.steps}
    assert {len(batch) for part in parts for batch in part} == {plan.size // ranks}
    every = np.concatenate([batch for part in parts for batch in part])
    assert len(np.unique(every)) == len(every) > plan.slots.sum() - plan.size


def digest(slots: list[int], seed: int, epoch: int) -> str:
    """Of the order of one epoch, and of its draws."""
    plan = Plan(np.array(slots), seed, batch=24, streams=8, window=50)
    order = np.concatenate(seen(plan, epoch))
    return hashlib.sha256(order.astype("<i8").tobytes() + draws(seed, epoch, order).astype("<i8").tobytes()).hexdigest()


def test_the_order_is_the_same_in_every_process_and_version() -> None:
    """Pinned: a run that was begun before an upgrade goes on in the same order after it."""
    pinned = "f4b84a4ff6c22b97ff35c103d76aaa58e2955694ed149cb027b86ea8105b9704"
    assert digest([70, 0, 33, 41, 90], 7, 3) == pinned
    code = "from tests.datamodules.test_plan import digest; print(digest([70, 0, 33, 41, 90], 7, 3))"
    for salt in ("0", "4242"):
        environment = {**os.environ, "PYTHONHASHSEED": salt, "PYTHONPATH": str(ROOT)}
        told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert told.stdout.strip() == pinned


@settings(max_examples=20, deadline=None)
@given(plans())
def test_a_plan_is_a_function_of_seed_and_epoch(plan: Plan) -> None:
    again = Plan(plan.slots, plan.seed, plan.size, plan.streams, plan.window)
    last = plan.steps - 1
    straight = [seen(plan, epoch)[-1] for epoch in range(3)]  # the second plan is asked for one step, out of order
    assert (again.batch(2, last) == straight[2]).all()
    assert (again.batch(0, last) == straight[0]).all()


def test_each_stream_gives_the_same_share_of_every_batch() -> None:
    plan = Plan(np.full(4, 100), seed=0, batch=32, streams=4, window=1)  # a run is a shard, and nothing moves in it
    assert plan.steps == 12
    for step, batch in enumerate(seen(plan, epoch=0)):
        runs = batch.reshape(4, 8)
        assert sorted(runs[:, 0] // 100) == [0, 1, 2, 3]
        assert (runs % 100 == step * 8 + np.arange(8)).all()


def test_two_epochs_and_two_seeds_differ() -> None:
    plan, other = (Plan(np.full(20, 50), seed, batch=64) for seed in (0, 1))
    assert (plan.batch(0, 0) != plan.batch(1, 0)).mean() > 0.9
    assert (plan.batch(0, 0) != other.batch(0, 0)).mean() > 0.9


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=3, max_size=12), st.integers(0, 2**40), st.integers(0, 1000))
def test_any_two_epochs_differ(slots: list[int], seed: int, epoch: int) -> None:
    plan = Plan(np.array([*slots, 30]), seed, batch=8, streams=4, window=20)
    first, second, much_later = (np.concatenate(seen(plan, e)) for e in (epoch, epoch + 1, epoch + 1000))
    for a, b in ((first, second), (first, much_later), (second, much_later)):
        assert (a != b).any()


def places(plan: Plan, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The step and the stream that show each position; the plan leaves none out."""
    order = np.stack(seen(plan, epoch))
    assert order.size == plan.slots.sum()
    step, stream = np.empty((2, order.size), np.int64)
    step[order] = np.arange(plan.steps)[:, None]
    stream[order.reshape(plan.steps, plan.streams, -1)] = np.arange(plan.streams)[:, None]
    return step, stream


def test_batches_of_two_epochs_have_no_more_in_common_than_by_chance() -> None:
    plan = Plan(np.full(100, 100), seed=0, batch=80)
    pairs = plan.steps * 80 * 79 // 2  # of samples that share a batch, in each epoch
    by_chance = pairs * pairs / (10_000 * 9999 / 2)
    step = [places(plan, epoch)[0] for epoch in range(4)]
    for one, other in ((0, 1), (1, 2), (2, 3), (0, 3)):
        together = np.bincount(step[one] * plan.steps + step[other])
        assert (together * (together - 1) // 2).sum() < 1.08 * by_chance  # a count near 3,100, of deviation 56


def test_neighbours_and_neighbouring_shards_are_spread_over_steps_and_streams() -> None:
    plan = Plan(np.full(200, 50), seed=3, batch=80)
    step, stream = (np.stack(rows) for rows in zip(*(places(plan, epoch) for epoch in range(6)), strict=True))
    for far in (1, 50):  # |U - V| of two independent places among n has mean n / 3
        assert np.abs(step[:, far:] - step[:, :-far]).mean() == pytest.approx(plan.steps / 3, rel=0.05)
    assert (stream[:, 50:] == stream[:, :-50]).mean() == pytest.approx(1 / 8, abs=0.03)
    assert (stream[1:] == stream[:-1]).mean() == pytest.approx(1 / 8, abs=0.03)  # of one sample in two epochs


def test_a_batch_draws_from_as_many_shards_as_by_chance() -> None:
    plan = Plan(np.full(100, 100), seed=1, batch=80)
    shards = [len(np.unique(batch // 100)) for batch in seen(plan, epoch=5)]
    assert np.mean(shards) == pytest.approx(100 * (1 - 0.99**80), rel=0.03)  # of 80 draws from 100 shards


def test_neighbours_in_the_catalogue_end_up_far_apart() -> None:
    window = 1000
    plan = Plan(np.full(10, 2000), seed=0, batch=64, streams=4, window=window)
    order = np.concatenate([batch.reshape(4, -1) for batch in seen(plan, epoch=0)], axis=1)
    place = np.full(20_000, -(10**9))
    for run in order:
        place[run] = np.arange(len(run))
    distance = np.abs(np.diff(place))
    distance = distance[distance < 10**6]  # of pairs that were both seen
    # |U - V| of two independent uniforms on a window has mean window / 3, and is below x with chance 2x / window.
    assert np.median(distance) == pytest.approx((1 - 0.5**0.5) * window, rel=0.1)
    assert (distance < 16).mean() == pytest.approx(2 * 16 / window, rel=0.3)
    # ... and reading stays local: no sample leaves its place by more than the window.
    line = plan._line(0)
    cuts = np.arange(5) * len(line) // 4
    for run, start, end in zip(order, cuts, cuts[1:], strict=False):
        laid = {position: i for i, position in enumerate(line[start:end])}
        assert max(abs(laid[position] - i) for i, position in enumerate(run)) <= window


def test_the_number_of_ranks_is_checked_without_shuffling(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(np.full(4, 100), seed=0, batch=32, streams=4)
    monkeypatch.setattr(plan, "_shuffled", lambda epoch: pytest.fail("an epoch was shuffled"))
    plan.check(2)
    with pytest.raises(ValueError, match="4 streams cannot be shared by 3 ranks"):
        plan.check(3)


def test_slots_of_products_and_of_pairs() -> None:
    shard, pairs = np.array([0, 0, 0, 2, 2]), np.array([0, 2, 1, 3, 0])
    products = Slots.of(shard, pairs, "products")
    assert products.per_shard(4).tolist() == [2, 0, 1, 0]
    assert [column.tolist() for column in products.at(np.array([2, 0]))] == [[3, 1], [0, 0], [1, 1]]
    every = Slots.of(shard, pairs, "pairs")
    assert every.per_shard(4).tolist() == [3, 0, 3, 0]
    product, number, count = every.at(np.arange(6))
    assert product.tolist() == [1, 1, 2, 3, 3, 3]
    assert number.tolist() == [0, 1, 0, 0, 1, 2]
    assert count.tolist() == [2, 2, 1, 3, 3, 3]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), min_size=1, max_size=60), st.integers(0, 1000))
def test_an_epoch_of_pairs_has_a_slot_for_each_pair(products: list[tuple[int, int]], epoch: int) -> None:
    """`products`: (shards between a product's and the one before, its pairs)."""
    shard, pairs = np.cumsum([gap for gap, _ in products]), np.array([count for _, count in products])
    shards, total = int(shard[-1]) + 1, int(pairs.sum())
    slots = Slots.of(shard, pairs, "pairs")
    assert slots.per_shard(shards).tolist() == np.bincount(shard, pairs, minlength=shards).tolist()
    product, number, count = slots.at(np.arange(total))
    assert (count == pairs[product]).all()
    every = [(p, n) for p in range(len(pairs)) for n in range(pairs[p])]
    assert list(zip(product.tolist(), number.tolist(), strict=True)) == every
    if total >= 8:  # and the plan shows each slot at most once, wherever empty shards and untrainable products lie
        plan = Plan(slots.per_shard(shards), seed=1, batch=8, streams=4, window=10)
        shown = slots.at(np.concatenate(seen(plan, epoch)))
        once = set(zip(shown[0].tolist(), shown[1].tolist(), strict=True))
        assert len(once) == plan.steps * 8 > total - 8
        assert once <= set(every)


def picks(weight: np.ndarray, draw: np.ndarray, count: int) -> np.ndarray:
    """(draw, pair): how often each pair is shown in the `count` slots of a product with that draw."""
    number = np.tile(np.arange(count), len(draw))
    where = points(np.repeat(draw, count), number, np.full_like(number, count))
    shown = np.array([chosen(weight, float(point)) for point in where]).reshape(-1, count)
    return np.stack([np.bincount(row, minlength=len(weight)) for row in shown])


def test_one_slot_draws_a_pair_in_proportion_to_its_weight() -> None:
    shown = picks(np.array([1.0, 0.0, 3.0, 4.0]), draws(0, 0, np.arange(8000)), count=1)
    assert shown.sum(axis=0) == pytest.approx([1000, 0, 3000, 4000], abs=150)


def test_slots_of_a_product_show_its_pairs_in_proportion_rounded_up_or_down() -> None:
    weight = np.array([1.0, 0.5, 2.5])
    expected = 3 * weight / weight.sum()
    shown = picks(weight, draws(0, 0, np.arange(2000)), count=3)
    assert ((np.floor(expected) <= shown) & (shown <= np.ceil(expected))).all()
    assert shown.mean(axis=0) == pytest.approx(expected, abs=0.04)
    assert (picks(np.ones(5), np.array([17, 4]), count=5) == 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 100, "streams": 8}, "batch of 100 .* 8 streams.*96"),
        ({"batch": 256, "streams": 8}, "200 training samples .* batch of 256.*at most 200"),
        ({"batch": 0, "streams": 8}, "batch is 0"),
        ({"batch": 64, "streams": 8, "window": 0}, "window is 0"),
    ],
)
def test_options_that_do_not_suit_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(np.array([120, 80]), seed=0, **options)


def test_ranks_that_do_not_divide_the_streams_are_named() -> None:
    with pytest.raises(ValueError, match="8 streams cannot be shared by 3 ranks"):
        Plan(np.array([120, 80]), seed=0, batch=64).batch(0, 0, rank=0, ranks=3)
