"""What `mmfusion runs`, `sync` and `clean-runs` make of runs that `mmfusion train` and `eval` left."""

import json
from pathlib import Path

import pytest

from mmfusion.runs.clean import LEFT_BY_RUNS, OF_CHECKPOINTS
from tests.mmfusion.runs.test_sync import age
from tests.mmfusion.test_cli import SMALL, mmfusion, only_run, shards
from tests.mmfusion.test_loggers import run_record

__all__ = ["mmfusion", "shards"]  # fixtures


def test_a_run_from_its_training_to_its_removal(mmfusion, shards, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    code, _, errors = mmfusion("train", "--exp", "text_only", "--data", str(shards), *SMALL, "--wandb.mode=offline",
                               "--wandb.tags=[night]", "--wandb.project=ours")  # fmt: skip
    assert code == 0, errors
    run = only_run("text_only")
    assert mmfusion("eval", "--run", str(run), "--split", "val")[0] == 0
    (evaluation,) = (run / "eval").iterdir()
    for folder, job in ((run, "train"), (evaluation, "eval")):
        record = run_record(folder)
        assert (record.job_type, record.run_group, record.project) == (job, "text_only", "ours")
        overlay = ["tiny"] if job == "train" else []  # config.yaml names the encoders themselves
        assert list(record.tags) == ["text_only", *overlay, "text", "night"]
    assert {path.name for path in run.iterdir()} <= LEFT_BY_RUNS
    assert all(OF_CHECKPOINTS.fullmatch(path.name) for path in (run / "checkpoints").iterdir())

    code, out, errors = mmfusion("runs", "--json")
    assert code == 0, errors
    (row,) = json.loads(out)
    assert {name: row[name] for name in ("run", "experiment", "status", "stage", "step", "steps")} == {
        "run": str(run), "experiment": "text_only", "status": "done", "stage": "align", "step": 10, "steps": 10,
    }  # fmt: skip
    results = json.loads((run / "results.json").read_text())
    assert row["test"]["value"] == results["test"]["text"][row["metric"]]["value"]
    assert row["best_val"] is not None
    assert mmfusion("runs")[1].splitlines()[1].startswith(str(run))

    age(run, 60)
    code, out, errors = mmfusion("sync", "--run", str(run))
    assert (code, "Traceback" in errors) == (2, False)
    assert "error: there is no key for W&B" in errors

    (Path("runs/text_only/later")).mkdir()
    (Path("runs/text_only/later/config.yaml")).write_bytes((run / "config.yaml").read_bytes())
    code, out, errors = mmfusion("clean-runs", "--keep=1", "--yes")
    assert (code, run.exists()) == (0, True), errors  # no other is done
    (Path("runs/text_only/later/results.json")).write_text('{"run": {}}')
    code, out, errors = mmfusion("clean-runs", "--keep=1", "--yes")
    assert (code, run.exists()) == (0, False), errors
    assert "its W&B log was never sent" in out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["runs"], "there is no folder runs"),
        (["sync"], "there is no folder runs"),
        (["sync", "--run=experiments"], "RUN=experiments is no run"),
        (["clean-runs"], "KEEP=: expected a whole number from 1 on"),
        (["clean-runs", "--keep=0"], "KEEP=0: expected a whole number from 1 on"),
        (["clean-runs", "--keep=3"], "there is no folder runs"),
        (["runs", "--epxeriment=a"], "--epxeriment"),
    ],
)
def test_mistakes(mmfusion, args, said):
    code, _, errors = mmfusion(*args)
    assert code == 2
    assert said in errors
    assert "Traceback" not in errors
