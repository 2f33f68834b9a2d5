"""`mmfusion sweep` as a user types it, on small shards: trials begin where the prefix ends, and the best holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from mmfusion.contract import contract
from mmfusion.study.progress import progress
from mmfusion.sweep.definition import read_sweep
from mmfusion.sweep.space import arguments
from tests.mmfusion.sweep import actor
from tests.small_run import OPTIONS, small_shards

ROOT = Path(__file__).parents[3]
SWEEP = f"""
experiment: fusion_moe
trials: 2
prefix: align
args: {json.dumps(OPTIONS)}
parameters:
  model.fusion: {{choice: [MoEBilinear, ConcatMLP]}}
  model.fusion.init_args.hidden: {{uniform: [0.5, 2.0]}}
  model.stages.fuse.rates.fusion: {{loguniform: [1.0e-3, 1.0e-2]}}
"""
FOLDER = Path("runs/sweeps/small")


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    small_shards(tmp_path)
    (tmp_path / "small.yaml").write_text(SWEEP)
    return tmp_path


def mmfusion(folder: Path, verb: str, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "mmfusion.cli", verb, *args], cwd=folder, env=environment, text=True,
        capture_output=True, timeout=800, check=False,
    )  # fmt: skip


def sweep(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return mmfusion(folder, "sweep", "--sweep", "small.yaml", "--data", "shards", *args)


def weights(run: Path) -> dict[str, torch.Tensor]:
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


@pytest.mark.slow
def test_a_trial_is_a_run_that_begins_where_the_prefix_ends(folder):
    done = sweep(folder, "--trials", "1", "--seeds", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((folder / FOLDER / "report.json").read_text())
    (row,) = report["trials"]
    trial = folder / FOLDER / row["run"]
    about = json.loads((trial / "results.json").read_text())
    assert about["run"]["branched_from"].endswith("prefix/all-1/checkpoints/stage-align.ckpt")
    trained = json.loads((trial / "parameters.json").read_text())["stages"]
    assert list(trained) == ["fuse"], "it trained the last stage alone"
    assert "test" not in about
    assert not (folder / FOLDER / "prefix/all-1/results.json").exists()
    assert row["value"] == about["val"]["fused"]["relevance/ndcg@10"]["value"]
    assert row["low"] <= row["value"] <= row["high"]
    config = yaml.safe_load((trial / "config.yaml").read_text())
    assert config["model"]["fusion"]["init_args"]["hidden"] == row["setting"]["model.fusion.init_args.hidden"]
    assert config["seed_everything"] == 1
    assert progress((folder / FOLDER / "logs" / "0.log").read_text()) is not None
    header = (trial / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"step", "val/primary"} <= set(header), "what the pruner reads"
    assert_the_best_is_an_experiment(folder, trial, report["best"])
    assert_acted_alike(folder, trial)


def assert_the_best_is_an_experiment(folder: Path, trial: Path, best: str) -> None:
    """`make train EXP=` of it is the trial, from its first step on."""
    said = mmfusion(folder, "train", "--exp", best, "--data", "shards", "--wandb.mode=disabled", "--print_config")
    ours = contract(yaml.safe_load(said.stdout))
    theirs = contract(yaml.safe_load((trial / "config.yaml").read_text()))
    assert {key: (ours.get(key), value) for key, value in theirs.items() if ours.get(key) != value} == {}
    assert f"make train EXP={best} ENCODERS=tiny" in (folder / best).read_text()


def assert_acted_alike(folder: Path, trial: Path) -> None:
    """What actor.py leaves, which test_runner.py rests on, is what a trial leaves."""
    acted = folder / "acted"
    given = ["--exp=e", "--encoders=e", "--data=d", "--experiment=trials", f"--runs={acted}", "--seed_everything=1"]
    acted.mkdir()
    subprocess.run([sys.executable, actor.__file__, *given], env=os.environ | {"MMFUSION_VERSION": "0"}, check=True)
    files = {path.relative_to(acted / "trials/0") for path in (acted / "trials/0").rglob("*") if path.is_file()}
    assert all((trial / name).is_file() for name in files)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_at_a_time_and_the_best_again(folder):
    done = sweep(folder, "--jobs", "2", "--seeds", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((folder / FOLDER / "report.json").read_text())
    assert [row["state"] for row in report["trials"]] == ["COMPLETE"] * 2
    best = report["trials"][0]
    assert report["again"]["seeds"] == [2, 3]
    assert report["again"]["split"] == "test"
    (claim,) = report["again"]["claims"]
    assert claim["sentence"] in done.stdout
    assert (folder / FOLDER / "seeds" / f"trial-{best['trial']}" / "all-2" / "results.json").is_file()
    assert 'href="seeds/report.html"' in (folder / FOLDER / "report.html").read_text()
    # a trial trained from its first step on ends with the same weights, bit for bit
    definition = read_sweep(folder / "small.yaml")
    chosen = arguments(definition.parameters, best["setting"])
    straight = mmfusion(
        folder, "train", "--exp", "fusion_moe", "--data", "shards", "--runs=straight", *OPTIONS, *chosen,
        "--seed_everything=1", "--data.test_splits=[val]",
    )  # fmt: skip
    assert straight.returncode == 0, straight.stderr
    (run,) = (folder / "straight/fusion_moe").iterdir()
    ours, theirs = weights(folder / FOLDER / best["run"]), weights(run)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
