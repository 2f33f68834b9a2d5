"""What a run says of its speed: parts add up, waits are told as what they are, and training is the same without."""

import csv
import errno
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from lightning.pytorch.profilers import PassThroughProfiler

from mmfusion.loggers import AppendingCSVLogger
from mmfusion.speed import callback as speed_callback
from mmfusion.speed.callback import Speed
from mmfusion.speed.timeline import PARTS
from tests.ddp import run_ranks
from tests.small_run import small_data, small_module, small_shards, small_trainer, three_stages, weights

WAIT = 0.2
STAGES = {"adapt": 2, "align": 3, "fuse": 7}  # 12 steps, 3 an epoch


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


class Waits(Callback):
    """Makes one thing slow: an interval, in seconds, to be found again in its part."""

    def __init__(self, where: str | None) -> None:
        self.where = where

    def _wait(self, where: str) -> None:
        if where == self.where:
            time.sleep(WAIT)

    def on_before_backward(self, trainer, pl_module, loss):
        loss.register_hook(lambda gradient: self._wait("backward"))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self._wait("optimizer")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._wait("other")


def slow(data: Any, module: Any, where: str | None) -> None:
    if where == "data":
        inner = data.on_after_batch_transfer
        data.on_after_batch_transfer = lambda *given: (time.sleep(WAIT), inner(*given))[1]
    if where == "forward":
        terms = module.terms
        module.terms = lambda *given: (time.sleep(WAIT), terms(*given))[1]


def train(
    rank: int, world: int, shards: Path, run: Path, where: str | None = None, slow_rank: int = 0, **options: Any
) -> dict[str, torch.Tensor]:
    stages = three_stages(*options.pop("ends", (2, 5)))
    module, data = small_module(options.pop("dropout", 0.0), stages=stages), small_data(shards)
    place = where if rank == slow_rank else None
    slow(data, module, place)
    logger = AppendingCSVLogger(run.parent, name="", version=run.name)
    ranks = {"devices": world, "strategy": "ddp"} if world > 1 else {}
    steps = options.pop("steps", 12)
    trainer = small_trainer(
        run, *options.pop("callbacks", [Speed(run)]), Waits(place), logger=logger, steps=steps,
        **{"log_every_n_steps": 4, **ranks, **options},
    )  # fmt: skip
    trainer.fit(module, data)
    return weights(module)


def logged(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row in rows if "speed/step_ms" in row]


def test_parts_add_up_to_the_step_and_all_steps_but_a_stages_first_are_there(shards, tmp_path, capsys):
    train(0, 1, shards, tmp_path / "run")
    rows, content = logged(tmp_path / "run"), json.loads((tmp_path / "run" / "speed.json").read_text())
    assert [row["step"] for row in rows] == [3, 7, 11]
    for values in [*content["stages"].values(), *({k.removeprefix("speed/"): v for k, v in r.items()} for r in rows)]:
        assert sum(values[f"{part}_ms"] for part in PARTS) == pytest.approx(values["step_ms"], rel=1e-4)
        assert min(values[f"{part}_ms"] for part in ("data", "forward", "backward", "optimizer")) > 0
        assert values["communication_ms"] == 0
        assert values["samples_per_s"] == pytest.approx(16_000 / values["step_ms"], rel=1e-4)
        assert 0.05 < values["host_gib"] < 20
        assert "mfu" not in values, "nobody knows the peak of this device"
    assert {name: stage["steps"] for name, stage in content["sums"].items()} == {n: s - 1 for n, s in STAGES.items()}
    assert {name: stage["samples"] for name, stage in content["sums"].items()} == {
        name: 16 * (steps - 1) for name, steps in STAGES.items()
    }
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["speed", *STAGES]
    told = {line[:18].strip(): line[18:].split() for line in lines[1:]}
    fuse = content["stages"]["fuse"]
    assert list(told) == [
        "samples/s", "ms per step", "data", "forward", "backward", "optimizer", "other", "minutes per epoch",
        "GiB of the process",
    ], "one process communicates with none"  # fmt: skip
    assert float(told["ms per step"][2].replace(",", "")) == pytest.approx(fuse["step_ms"], rel=0.05)
    assert float(told["minutes per epoch"][2]) == pytest.approx(3 * fuse["step_ms"] / 60_000, abs=0.006)


@pytest.mark.parametrize("where", ["data", "forward", "backward", "optimizer", "other"])
def test_what_is_slow_is_told_by_its_name(shards, tmp_path, where):
    train(0, 1, shards, tmp_path / "run", where, steps=6)
    values = json.loads((tmp_path / "run" / "speed.json").read_text())["stages"]["align"]
    assert values[f"{where}_ms"] > 1000 * WAIT


def test_a_slow_loader_of_one_rank_is_data_there_and_communication_on_the_other(shards, tmp_path):
    alike = run_ranks(train, 2, shards, tmp_path / "run", "data", 1)
    assert all(torch.equal(alike[0][name], alike[1][name]) for name in alike[0])
    sums = json.loads((tmp_path / "run" / "speed.json").read_text())
    values = sums["stages"]["fuse"]
    assert values["data_ms"] > 500 * WAIT * 0.9, "the mean of two ranks, of which one waits"
    assert values["communication_ms"] > 500 * WAIT * 0.3, "less than the wait where the other rank is slow by itself"
    assert values["samples_per_s"] == pytest.approx(16_000 / values["step_ms"], rel=1e-4), "of both ranks"
    assert sums["sums"]["fuse"]["samples"] == 16 * 6


def test_reduction_of_gradients_that_nothing_hides_is_communication(shards, tmp_path):
    """A rank that is late in its backward pass keeps the other one waiting for its gradients, after its own."""
    run_ranks(train, 2, shards, tmp_path / "run", "backward", 1)
    values = json.loads((tmp_path / "run" / "speed.json").read_text())["stages"]["fuse"]
    assert values["backward_ms"] > 500 * WAIT * 0.9
    assert values["communication_ms"] > 500 * WAIT * 0.3


class SlowValidation(Callback):
    """When steps ended, and how long validations took."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.validations: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.ends.append(time.perf_counter())

    def on_validation_start(self, trainer, pl_module):
        self.start = time.perf_counter()

    def on_validation_end(self, trainer, pl_module):
        time.sleep(5 * WAIT)
        self.validations.append(time.perf_counter() - self.start)


def test_validations_are_no_part_of_a_step(shards, tmp_path):
    run, seen = tmp_path / "run", SlowValidation()
    train(0, 1, shards, run, callbacks=[seen, Speed(run)], limit_val_batches=1.0)
    seconds = json.loads((run / "speed.json").read_text())["sums"]["fuse"]["seconds"]
    took = seen.ends[11] - seen.ends[5] - sum(seen.validations[1:3])  # after steps 6 and 9, of steps 7 to 12
    assert sum(seconds.values()) == pytest.approx(took, abs=5 * WAIT)


def test_accumulated_batches_make_one_step(shards, tmp_path):
    train(0, 1, shards, tmp_path / "run", steps=8, accumulate_grad_batches=2)
    sums = json.loads((tmp_path / "run" / "speed.json").read_text())["sums"]
    assert {name: stage["steps"] for name, stage in sums.items()} == {"adapt": 1, "align": 2, "fuse": 2}
    # an epoch of 3 batches makes a step of 2 and one of 1: fuse has steps 5 (left out), 6 and 7
    assert sums["fuse"]["samples"] == 16 * (2 + 1)


class Stop(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 9:
            raise KeyboardInterrupt


def test_a_run_that_was_stopped_counts_on(shards, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    trainer = small_trainer(run, Speed(run), Stop(), steps=12)
    with pytest.raises(SystemExit):
        trainer.fit(small_module(), small_data(shards))
    assert isinstance(trainer.profiler, PassThroughProfiler)
    before = json.loads((run / "speed.json").read_text())["sums"]
    assert {name: stage["steps"] for name, stage in before.items()} == {"adapt": 1, "align": 2}, "two whole epochs"
    train(0, 1, shards, run)
    after = json.loads((run / "speed.json").read_text())["sums"]
    assert {name: stage["steps"] for name, stage in after.items()} == {"adapt": 2, "align": 4, "fuse": 6}
    assert sum(after["align"]["seconds"].values()) > sum(before["align"]["seconds"].values())


def test_a_full_disk_is_told_of_by_what_found_it(shards, tmp_path, monkeypatch):
    told = []

    class Told(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise ValueError("the disk is full")

        def on_exception(self, trainer, pl_module, exception):
            told.append(str(exception))

    def full(self: Speed, trainer: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Speed, "_write", full)
    with pytest.raises(ValueError, match="the disk is full"):
        train(0, 1, shards, tmp_path / "run", callbacks=[Speed(tmp_path / "run"), Told()])
    assert told == ["the disk is full"]


@pytest.mark.parametrize("content", ["", "[]", '{"sums": {"adapt": {"steps": 1, "clocks": 2}}}', '{"sums": 1}'])
def test_a_damaged_file_is_begun_again(shards, tmp_path, content):
    run = tmp_path / "run"
    run.mkdir()
    (run / "speed.json").write_text(content)
    train(0, 1, shards, run)
    assert set(json.loads((run / "speed.json").read_text())["stages"]) == set(STAGES)


def known_device(monkeypatch, peak: float) -> None:
    """As if this device were one whose peak is known."""
    inner = Speed.on_train_start

    def on_train_start(self, trainer, pl_module):
        inner(self, trainer, pl_module)
        self.peak = peak

    monkeypatch.setattr(speed_callback.Speed, "on_train_start", on_train_start)


def test_utilisation_is_operations_over_those_that_the_peak_allows(shards, tmp_path, monkeypatch):
    plain = train(0, 1, shards, tmp_path / "plain", callbacks=[], dropout=0.1, ends=(3, 6))
    known_device(monkeypatch, 1e10)
    counting = train(0, 1, shards, tmp_path / "run", dropout=0.1, ends=(3, 6))
    assert all(torch.equal(plain[name], counting[name]) for name in plain), "counting must not change training"
    content = json.loads((tmp_path / "run" / "speed.json").read_text())
    for name, values in content["stages"].items():
        sums = content["sums"][name]
        assert values["mfu"] == pytest.approx(sums["flops"] / sum(sums["seconds"].values()) / 1e10)
    per_step = {name: sums["flops"] / sums["steps"] for name, sums in content["sums"].items()}
    assert per_step["adapt"] > 5 * per_step["align"], "frozen encoders are not run again"
