"""The best trial's file, which has what was found and not what made the trial short."""

from pathlib import Path
from typing import Any

import yaml

from mmfusion.retrieval.side import flattened
from mmfusion.sweep.best import write_best

CONFIG = {
    "model": {
        "dim": 8, "modality_dropout": 0.25,
        "stages": {
            "adapt": {"until": {"epochs": None, "fraction": 0.6}},
            "align": {"until": {"epochs": None, "fraction": 0.7}},
            "fuse": {"losses": {"query_text": 0.1}},
        },
    },
    "data": {"init_args": {"path": "shards", "extra_queries": 0, "batch_size": 32}},
    "trainer": {"max_epochs": 6, "precision": "32-true"},
}  # fmt: skip


def best(folder: Path, experiment: dict[str, Any], trial_args: list[str], *options: str) -> dict[str, Any]:
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    told = flattened({"files": {"base": {"model": {"dim": 8}}, "mine": experiment}})
    told |= {"experiment": "mine", "encoders": "tiny", "metric": "val/primary", "seed": 1, "trial_args": trial_args}
    cell = {"value": 0.5, "low": 0.4, "high": 0.6}
    return yaml.safe_load(write_best(folder / "best.yaml", folder, told, options, cell).read_text())


def test_it_holds_what_was_found_and_the_experiment(tmp_path):
    found = best(tmp_path, {"data": {"init_args": {"batch_size": 64}}}, [], "--model.modality_dropout=0.25")
    assert found == {"data": {"init_args": {"batch_size": 32}}, "model": {"modality_dropout": 0.25}}


def test_what_made_the_trial_short_is_as_the_files_have_it(tmp_path):
    short = ["--model.stages.adapt.until.fraction=0.6", "--model.stages.align.until={fraction: 0.7}"]
    short += ["--trainer.max_epochs=6", "--data.extra_queries=0", "--model.dim=8"]
    mine = {
        "model": {"stages": {"align": {"until": {"epochs": 3}}}}, "trainer": {"max_epochs": 20},
        "data": {"init_args": {"extra_queries": 9}},
    }  # fmt: skip
    found = best(tmp_path, mine, short, "--model.stages.fuse.losses.query_text=0.1", "--trainer.precision=32-true")
    assert found["model"]["stages"] == {
        "adapt": {"until": {"epochs": None}}, "align": {"until": {"epochs": 3}},
        "fuse": {"losses": {"query_text": 0.1}},
    }  # fmt: skip
    assert found["trainer"] == {"max_epochs": 20, "precision": "32-true"}
    assert found["data"] == {"init_args": {"extra_queries": 9}}
    assert "dim" not in found["model"]


def test_what_the_command_gave_stays(tmp_path):
    found = best(tmp_path, {}, ["--trainer.max_epochs=10"], "--trainer.max_epochs=6")
    assert found == {"trainer": {"max_epochs": 6}}
