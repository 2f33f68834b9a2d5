"""W&B without a key or a network: offline, never asking; a table of examples; CSV that a resumed run continues."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from mmfusion.examples import ExampleTable
from mmfusion.loggers import AppendingCSVLogger, Wandb, make_loggers
from tests.small_run import small_data, small_module, small_shards, small_trainer


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


def test_a_run_offline_keeps_its_id_and_holds_a_table_of_photos(no_key, tmp_path):
    run = tmp_path / "runs" / "exp" / "1"
    loggers = make_loggers(run, Wandb())
    assert [logger.version for logger in make_loggers(run, Wandb())] == [logger.version for logger in loggers]
    shards = small_shards(tmp_path)
    trainer = small_trainer(tmp_path, ExampleTable(queries=2, products=3), logger=loggers, limit_val_batches=1.0)
    module = small_module()
    trainer.fit(module, small_data(shards))
    trainer.test(module, small_data(shards), verbose=False)
    for logger in loggers:
        logger.finalize("success")
    loggers[1].experiment.finish()
    (offline,) = (run / "wandb").glob("offline-run-*")
    (table,) = (offline / "files" / "media" / "table" / "test").glob("examples*.json")
    rows = json.loads(table.read_text())
    assert rows["columns"] == ["query", "relevance/ndcg@10", "1", "2", "3"]
    assert {row[0] for row in rows["data"]} == {"yellow shoe", "red lamp"}
    assert all(row[2:] == ["Image"] * 3 for row in rows["data"]), "pixels travel in the table's artifact"
    (_, cells), result = ExampleTable(products=2).table(module.results["test"]["fused"], module.data), module.results
    first = result["test"]["fused"].top.ids[0, 0]
    photo = module.data.products(first[None].numpy()).photo[0].permute(1, 2, 0).numpy()
    assert (np.asarray(cells[0][2].image)[..., :3] == photo).all()


def test_a_resumed_run_appends_to_its_csv(tmp_path):
    for step in (1, 2):
        logger = AppendingCSVLogger(tmp_path, name="exp", version="1")
        logger.log_metrics({"a": float(step), **({"b": 3.0} if step == 2 else {})}, step)
        logger.finalize("success")
    with Path(tmp_path, "exp/1/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["a"], row["b"]) for row in rows] == [("1", "1.0", ""), ("2", "2.0", "3.0")]
