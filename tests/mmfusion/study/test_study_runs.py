"""`mmfusion study` as a user types it, on small shards: the same weights as straight runs, and a report."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmfusion.study.jobs import CALLBACK
from mmfusion.study.preflight import parse
from mmfusion.study.progress import progress
from tests.mmfusion.study import actor
from tests.small_run import OPTIONS, small_shards

ROOT = Path(__file__).parents[3]
STUDY = f"""
reference: moe
prefix: align
args: {json.dumps(OPTIONS)}
arms:
  moe: {{}}
  gated: {{experiment: fusion_gated}}
  bm25: {{row_of: moe, view: bm25}}
claims:
  fusion: {{says: "It wins", arm: moe, beats: [gated]}}
"""
RUNS = Path("runs/studies/small")
WAITED_FOR = (
    "config.yaml", "results.json", "per_query.parquet", "checkpoints/last.ckpt", "checkpoints/stage-align.ckpt",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    small_shards(tmp_path)
    (tmp_path / "small.yaml").write_text(STUDY)
    return tmp_path


def command(verb: str, *args: str) -> list[str]:
    return [sys.executable, "-m", "mmfusion.cli", verb, *args]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def study(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    given = command("study", "--study", "small.yaml", "--data", "shards", "--seeds", "1", *args)
    return subprocess.run(
        given, cwd=folder, env=environment(), text=True, capture_output=True, timeout=600, check=False
    )


def made(run: Path) -> dict[str, torch.Tensor]:
    """The weights; a tokenizer is no tensor."""
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def stages_of(run: Path) -> list[str]:
    """That the run trained itself."""
    return list(json.loads((run / "parameters.json").read_text())["stages"])


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not condition():
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.05)


def test_two_arms_share_their_stages_and_are_reported(folder):
    done = study(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = folder / RUNS
    assert stages_of(runs / "moe" / "all-1") == ["adapt", "align", "fuse"]
    assert stages_of(runs / "gated" / "all-1") == ["fuse"]
    about = json.loads((runs / "gated" / "all-1" / "results.json").read_text())["run"]
    assert about["branched_from"].endswith("moe/all-1/checkpoints/stage-align.ckpt")
    jobs = json.loads((runs / "jobs.json").read_text())
    model = made(runs / "gated" / "all-1")
    head = sum(value.numel() for name, value in model.items() if name.startswith("product.fusion."))
    assert jobs["gated/all-1"]["parameters"]["head"] == head
    assert jobs["gated/all-1"]["parameters"]["rest"] < jobs["gated/all-1"]["parameters"]["all"]
    assert jobs["moe/all-1"]["samples_per_s"]["adapt"] > 0
    assert done.stdout.rstrip().splitlines()[-1] == f"report: {RUNS / 'report.html'}"
    assert {"report.html", "report.json"} <= {path.name for path in runs.iterdir()}
    assert_acted_alike(folder, jobs["moe/all-1"]["command"])


def assert_acted_alike(folder: Path, command: list[str]) -> None:
    """What actor.py leaves, which test_runner.py rests on, is what a run leaves that was given the same."""
    real = folder / RUNS / "moe" / "all-1"
    options = [option for option in command[4:] if option not in OPTIONS and not option.startswith("--runs=")]
    acted = folder / "acted" / "moe" / "all-1"
    (folder / "acted").mkdir()
    version = environment(MMFUSION_VERSION="all-1")
    subprocess.run([sys.executable, actor.__file__, *options, f"--runs={folder / 'acted'}"], env=version, check=True)
    files = {path.relative_to(acted) for path in acted.rglob("*") if path.is_file()}
    assert files == {Path(name) for name in WAITED_FOR}
    assert all((real / name).is_file() for name in files)
    ours, theirs = (json.loads((run / "results.json").read_text()) for run in (acted, real))
    assert ours.keys() <= theirs.keys()
    assert ours["val"]["fused"].keys() <= theirs["val"]["fused"].keys()
    bar = progress((folder / RUNS / "logs" / "moe" / "all-1.log").read_text())
    assert bar is not None, "no bar is found in a real log"


def test_options_are_parsed_as_a_run_parses_them(monkeypatch):
    monkeypatch.chdir(ROOT)
    given = ["--exp", "fusion_moe", "--encoders", "tiny", "--data", "shards", "--seed_everything=3", *OPTIONS]
    parse([*given, f"--trainer.callbacks+={CALLBACK}"])
    for option, message in (
        ("--model.dmi=3", r"unrecognized arguments: --model.dmi=3[^$]*the nearest names are --model.dim"),
        ("--model.dim=three", "model.dim"),
        ("--exp=fusion_mo", "EXP=fusion_mo is not in experiments: .* Did you mean fusion_moe"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            parse([*given, option])


def test_make_study_alone_is_the_demo():
    said = subprocess.run(["make", "-n", "study"], cwd=ROOT, text=True, capture_output=True, check=True).stdout
    assert "study --study 'demo'" in said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_interrupted_and_gone_on_with_it_ends_as_straight_runs(folder):
    given = command("study", "--study", "small.yaml", "--data", "shards", "--seeds", "1", "--jobs", "2")
    runner = subprocess.Popen(given, cwd=folder, env=environment(), stdout=subprocess.DEVNULL)
    until((folder / RUNS / "moe" / "all-1" / "checkpoints" / "last.ckpt").is_file, runner)
    runner.send_signal(signal.SIGINT)
    assert runner.wait(60) == 130
    runner = subprocess.Popen(given, cwd=folder, env=environment(), stdout=subprocess.DEVNULL)
    until((folder / RUNS / "gated" / "all-1" / "config.yaml").is_file, runner)
    runner.kill()
    runner.wait()
    done = study(folder, "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    again = study(folder, "--report-only")
    assert again.returncode == 0, again.stderr
    assert again.stdout.rstrip().splitlines()[-1] == f"report: {RUNS / 'report.html'}"
    for arm, experiment in (("moe", "fusion_moe"), ("gated", "fusion_gated")):
        straight = command("train", "--exp", experiment, "--data", "shards", *OPTIONS)
        version = environment(MMFUSION_VERSION="straight")
        subprocess.run(straight, cwd=folder, env=version, check=True, capture_output=True)
        ours, theirs = made(folder / RUNS / arm / "all-1"), made(folder / "runs" / experiment / "straight")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), arm
