"""W&B without a key or a network: offline, never asking; CSV that a resumed run continues."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jsonargparse import Namespace

from mmfusion.loggers import AppendingCSVLogger, Wandb, log_of_evaluation, make_loggers
from mmfusion.run import FusionCLI
from tests.mmfusion.test_dashboard import logged, wandb_records


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


def test_the_mode_follows_the_key(no_key, tmp_path):
    assert Wandb().resolved() == "offline"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert Wandb().resolved() == "online"
    no_key.setenv("WANDB_MODE", "disabled")
    assert Wandb().resolved() == "disabled"
    assert Wandb(mode="offline").resolved() == "offline"


def test_a_run_keeps_its_id_when_it_is_resumed(no_key, tmp_path):
    first, again = (make_loggers(tmp_path / "runs" / "exp" / "1", Wandb()) for _ in range(2))
    other = make_loggers(tmp_path / "runs" / "exp" / "2", Wandb())
    assert [logger.version for logger in first] == [logger.version for logger in again]
    assert first[1].version != other[1].version


def test_a_resumed_run_appends_to_its_csv(tmp_path):
    for step in (1, 2):
        logger = AppendingCSVLogger(tmp_path, name="exp", version="1")
        logger.log_metrics({"a": float(step), **({"b": 3.0} if step == 2 else {})}, step)
        logger.finalize("success")
    with Path(tmp_path, "exp/1/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["a"], row["b"]) for row in rows] == [("1", "1.0", ""), ("2", "2.0", "3.0")]


def run_record(folder: Path) -> Any:
    """What the offline file in `folder` says of its run."""
    (offline,) = (folder / "wandb").glob("offline-run-*")
    logged(offline)  # until it is written
    return next(record.run for record in wandb_records(offline) if record.HasField("run"))


@pytest.mark.parametrize(
    ("name", "mark", "group", "job_type"),
    [
        ("moe/1", None, "moe", "train"),
        ("studies/paper/moe/all-1", "studies/paper/study.json", "study paper", "train"),
        ("sweeps/fusion/trials/3", "sweeps/fusion/journal.log", "sweep fusion", "sweep"),
    ],
)
def test_runs_are_filed_by_what_they_belong_to(no_key, tmp_path, name, mark, group, job_type):
    run = tmp_path / "runs" / name
    run.mkdir(parents=True)
    if mark:
        (tmp_path / "runs" / mark).touch()
    _, logger = make_loggers(run, Wandb(tags=["mine", "fused"]), ["moe", "tiny", "fused"])
    logger.experiment.finish()
    record = run_record(run)
    assert (record.run_group, record.job_type) == (group, job_type)
    assert list(record.tags) == ["moe", "tiny", "fused", "mine"]
    assert record.display_name == "/".join(run.parts[-2:])


def test_a_trial_is_found_by_its_experiment():
    files = [
        "experiments/base.yaml",
        "experiments/encoders/tiny.yaml",
        "experiments/fusion_moe.yaml",
        "other/mine.yaml",
    ]
    config = Namespace(config=files, experiment="trials")
    run = SimpleNamespace(config=config, config_init=Namespace(model=Namespace(primary="fused")))
    assert FusionCLI.tags.fget(run) == ["trials", "tiny", "fusion_moe", "fused"]


def test_a_group_of_the_users_own_and_an_agent_of_a_sweep(no_key, tmp_path):
    no_key.setenv("WANDB_SWEEP_ID", "s1")
    _, logger = make_loggers(tmp_path / "runs/moe/1", Wandb(group="night"))
    logger.experiment.finish()
    record = run_record(tmp_path / "runs/moe/1")
    assert (record.run_group, record.job_type) == ("night", "sweep")


def test_an_evaluation_is_a_run_of_its_own_beside_the_trained_one(no_key, tmp_path):
    run = tmp_path / "runs/moe/1"
    folder = run / "eval/0123-test"
    folder.mkdir(parents=True)
    _, logger = make_loggers(run, Wandb())
    log = log_of_evaluation(folder, run, Wandb(), ["moe"], {"model": {"dim": 8}})
    log.finish()
    record = run_record(folder)
    assert (record.job_type, record.run_group, list(record.tags)) == ("eval", "moe", ["moe"])
    assert record.display_name == "moe/1 0123-test"
    assert record.run_id not in ("", logger.version)
    assert {item.key: json.loads(item.value_json) for item in record.config.update}["model"] == {"dim": 8}
    assert log_of_evaluation(folder, run, Wandb(mode="disabled"), [], {}) is None
