"""A profile of a few steps: a trace per stage with the parts of a step, the operators by hand, mistakes in one line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from torch.autograd import DeviceType

from mmfusion.cli import profile
from mmfusion.speed.profile import longest
from tests.ddp import run_ranks
from tests.small_run import small_shards

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


@pytest.fixture
def options(shards, tmp_path, monkeypatch) -> list[str]:
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MMFUSION_VERSION", raising=False)
    return [
        "--exp", "fusion_moe", "--data", str(shards), "--data.batch_size=16", "--data.streams=4",
        "--data.image_size=[32, 32]", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip


def events(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def ranges(path: Path, name: str) -> list[tuple[float, float]]:
    """Start and end of a part on the processor, in microseconds."""
    found = [event for event in events(path) if event.get("cat") == "user_annotation" and event["name"] == name]
    return [(event["ts"], event["ts"] + event["dur"]) for event in found]


def test_stages_that_are_asked_are_traced_in_the_runs_order(options, tmp_path, capsys):
    profile([*options, "--steps=2", "--stages=fuse,adapt"])
    (run,) = (tmp_path / "runs" / "fusion_moe").iterdir()
    assert [path.name for path in run.iterdir()] == ["profile"], "no run is left that could be taken for one"
    assert sorted(path.name for path in (run / "profile").iterdir()) == ["trace-adapt.json.gz", "trace-fuse.json.gz"]
    for stage in ("adapt", "fuse"):
        path = run / "profile" / f"trace-{stage}.json.gz"
        for name in ("data", "forward", "backward", "optimizer"):
            assert len(ranges(path, name)) >= 2, (stage, name)
        steps = [name for event in events(path) if (name := event.get("name", "")).startswith("ProfilerStep#")]
        assert sorted(steps) == ["ProfilerStep#2", "ProfilerStep#3"]
        for (start, end), (backward, done) in zip(ranges(path, "optimizer"), ranges(path, "backward"), strict=True):
            assert start < backward < done < end, "the backward pass lies in the optimizer's step"
    out = capsys.readouterr().out
    assert out.count("longest operators") == 2
    assert "aten::" in out
    assert out.index("stage adapt") < out.index("trace-adapt.json.gz") < out.index("stage fuse")


def test_the_first_stage_is_traced_where_none_is_asked(options, tmp_path):
    profile([*options, "--steps=1", "--trainer.accumulate_grad_batches=2"])
    (trace,) = tmp_path.glob("runs/fusion_moe/*/profile/*")
    assert trace.name == "trace-adapt.json.gz"
    assert len(ranges(trace, "optimizer")) == 1
    assert len(ranges(trace, "backward")) == 2, "two batches make a step"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--stages=fuze", "STAGES names 'fuze'; model.stages has adapt, align, fuse. Did you mean fuse?"),
        (
            "--trainer.profiler=simple",
            "trainer.profiler is not an option of a run: metrics.csv and speed.json tell where time goes, and make "
            "profile EXP=... writes a trace",
        ),
        ("--steps=0", "STEPS=0: expected a whole number from 1 on"),
        ("--branch=x.ckpt", "--branch=x.ckpt: a profile begins where no run has been; leave it out"),
        ("--resume=x.ckpt", "--resume=x.ckpt: a profile begins where no run has been; leave it out"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(options, tmp_path, given, said):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        profile([*options, given])
    assert str(raised.value) == said
    assert not (tmp_path / "runs").exists()


def on_a_rank(rank: int, world: int, options: list[str]) -> None:
    profile([*options, "--steps=2", "--stages=align", f"--trainer.devices={world}", "--trainer.strategy=ddp"])


def test_one_of_two_ranks_writes_the_trace_with_what_they_waited_for(options, tmp_path, monkeypatch):
    monkeypatch.setenv("MMFUSION_VERSION", "ranks")
    run_ranks(on_a_rank, 2, options, timeout=120)
    (trace,) = tmp_path.glob("runs/fusion_moe/*/profile/*")
    forward, communication = ranges(trace, "forward"), ranges(trace, "communication")
    inside = [any(start <= a and b <= end for start, end in forward) for a, b in communication]
    assert sum(inside) >= 2, "the losses gather in the forward pass"
    assert len(communication) - sum(inside) >= 2, "gradients are exchanged in the backward pass"


class Event:
    def __init__(self, key: str, calls: int, cpu: float, device: float, kind: DeviceType = DeviceType.CPU) -> None:
        self.key, self.count, self.device_type = key, calls, kind
        self.self_cpu_time_total, self.self_device_time_total = cpu, device


def test_operators_are_told_by_what_the_device_does_for_them():
    both = [
        Event("aten::mm", 8, 1000, 6000), Event("aten::add", 4, 3000, 2000), Event("forward", 4, 500, 90000),
        Event("gemm_kernel", 8, 0, 6000, DeviceType.CUDA), Event("ProfilerStep*", 4, 10, 10),
    ]  # fmt: skip
    assert longest(both, 4) == [("aten::mm", 2, 1.5, 0.75), ("aten::add", 1, 0.5, 0.25)]
    alone = [Event("aten::mm", 8, 1000, 0), Event("aten::add", 4, 3000, 0)]
    assert longest(alone, 4) == [("aten::add", 1, 0.75, 0.75), ("aten::mm", 2, 0.25, 0.25)]
    assert len(longest([Event(f"aten::{i}", 1, i + 1.0, 0) for i in range(30)], 1)) == 10
