"""W&B without a key or a network: offline, never asking; CSV that a resumed run continues."""

import csv
from pathlib import Path

import pytest

from mmfusion.loggers import AppendingCSVLogger, Wandb, make_loggers


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
