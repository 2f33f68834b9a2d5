"""The command itself on two ranks that Lightning starts, as on two GPUs: one run folder, one set of results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_run import small_shards

ROOT = Path(__file__).parents[2]


def mmfusion(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    if not (folder / "experiments").exists():
        (folder / "experiments").symlink_to(ROOT / "experiments")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "mmfusion" / "cli.py"), *args], cwd=folder, env=environment, text=True,
        capture_output=True, timeout=240, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    shards = small_shards(tmp_path_factory.mktemp("small"))
    return [
        "train", "--exp", "fusion_moe", "--data", str(shards), "--data.batch_size=16", "--data.streams=4",
        "--data.image_size=[32, 32]", "--trainer.max_steps=10", "--trainer.accelerator=cpu", "--trainer.devices=2",
        "--trainer.strategy=ddp", "--wandb.mode=disabled",
    ]  # fmt: skip


def test_two_ranks_write_one_run_and_go_on_from_it(tmp_path, command):
    done = mmfusion(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs" / "fusion_moe").iterdir()
    assert done.stdout.rstrip().splitlines()[-1] == f"run: {run.relative_to(tmp_path)}"
    assert done.stdout.count("run: ") == 1, "one rank prints"
    results = json.loads((run / "results.json").read_text())
    assert set(results) == {"val", "test", "slices", "calibration", "gates", "exclusive", "run"}
    refused = mmfusion(tmp_path, *command, f"--resume={run}/checkpoints/last.ckpt", "--model.dim=16")
    assert refused.returncode == 2
    assert refused.stderr.count("error: ") == 1
    assert json.loads((run / "results.json").read_text()) == results


def test_a_number_of_ranks_that_does_not_divide_is_one_message(tmp_path, command):
    refused = mmfusion(tmp_path, *command, "--data.streams=1")
    assert refused.returncode == 2
    assert refused.stderr.count("error: ") == 1
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "runs").exists()
