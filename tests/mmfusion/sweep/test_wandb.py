"""The translation into a W&B sweep: its own agent's code makes of it the options that a trial of ours is given."""

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from mmfusion.sweep.definition import Sweep, read_sweep
from mmfusion.sweep.space import Setting, arguments, walked
from mmfusion.sweep.trials import plan_of, prefix_of
from mmfusion.sweep.wandb import translated, write_wandb

ROOT = Path(__file__).parents[3]
KINDS: dict[str, Any] = {
    "experiment": "fusion_moe", "trials": 7, "args": ["--model.evaluation.baselines=false"],
    "parameters": {
        "model.modality_dropout": {"uniform": [0.0, 0.5]},
        "model.stages.fuse.rates.fusion": {"loguniform": [1e-6, 1e-2]},
        "model.dim": {"int": [64, 256]},
        "model.projection_hidden": {"choice": [True, False]},
        "model.micro_batch": {"choice": [None, 32]},
        "model.optim": {"choice": {"none": {}, "heavy": {"weight_decay": 0.1}}},
    },
}  # fmt: skip


def sweep_of(folder: Path, content: dict[str, Any]) -> Sweep:
    (folder / "small.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return read_sweep(folder / "small.yaml")


def drawn(configuration: dict[str, Any], end: str, place: int) -> dict[str, Any]:
    """What W&B's server sends an agent: a value of each parameter, here an end of its distribution."""
    values = {}
    for option, told in configuration["parameters"].items():
        values[option] = told.get("value", told["values"][place % len(told["values"])] if "values" in told else None)
        if values[option] is None:
            values[option] = told[end]
    return {"args": {option: {"value": value} for option, value in values.items()}}


def ours(sweep: Sweep, sent: dict[str, Any]) -> tuple[str, ...]:
    """The options of our own trial with the same values."""
    setting: Setting = walked(
        [one for one in sweep.parameters if one.option in sent["args"]],
        lambda one: (
            next(name for name, text in one.choices.items() if text == sent["args"][one.option]["value"])
            if one.kind == "choice" else sent["args"][one.option]["value"]
        ),
    )  # fmt: skip
    return arguments(sweep.parameters, setting)


def test_every_kind_becomes_the_same_options(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = sweep_of(tmp_path, KINDS)
    (configuration,) = translated(sweep, plan_of(sweep, tmp_path, "shards")).values()
    assert configuration["metric"] == {"name": "val/primary", "goal": "maximize"}
    assert (configuration["method"], configuration["run_cap"]) == ("bayes", 7)
    assert configuration["parameters"] == {
        "model.modality_dropout": {"distribution": "uniform", "min": 0.0, "max": 0.5},
        "model.stages.fuse.rates.fusion": {"distribution": "log_uniform_values", "min": 1e-6, "max": 1e-2},
        "model.dim": {"distribution": "int_uniform", "min": 64, "max": 256},
        "model.projection_hidden": {"values": ["true", "false"]},
        "model.micro_batch": {"values": ["null", "32"]},
        "model.optim": {"values": ["{}", '{"weight_decay": 0.1}']},
    }
    for end in ("min", "max"):
        for place in range(2):
            sent = drawn(configuration, end, place)
            assert tuple(create_sweep_command_args(sent)["args"]) == ours(sweep, sent)


@pytest.mark.parametrize("name", ["fusion", "stages", "losses"])
def test_the_command_of_a_ready_sweep_is_one_that_fit_takes(name, tmp_path, monkeypatch):
    from mmfusion.run import FusionCLI

    class Options(FusionCLI):
        def instantiate_classes(self) -> None:
            pass

    monkeypatch.chdir(ROOT)
    sweep = read_sweep(ROOT / "experiments" / "sweeps" / f"{name}.yaml")
    plan = plan_of(sweep, tmp_path, "shards")
    paths = write_wandb(sweep, plan)
    told = {
        "fusion": ["-MoEBilinear", "-Gated", "-ConcatMLP", "-ConcatLinear", "-MaskedSum"],
        "losses": ["-InfoNCE", "-GradedInfoNCE", "-Sigmoid"],
    }
    suffixes = told.get(name, [""])
    assert [path.name for path in paths] == [f"wandb-sweep{suffix}.yaml" for suffix in suffixes]
    assert sum(yaml.safe_load(path.read_text())["run_cap"] for path in paths) == sweep.trials
    for path in paths:
        configuration = yaml.safe_load(path.read_text())
        sent = drawn(configuration, "max", -1)
        flags = create_sweep_command_args(sent)["args"]
        command = [
            part for word in create_sweep_command(configuration["command"])
            for part in (flags if word == "${args}" else [word])
        ]  # fmt: skip
        assert command[1:4] == ["-m", "mmfusion.cli", "fit"]
        config = Options.parse(command[4:], None).config
        assert (config.experiment, config.runs) == ("wandb", tmp_path)
        assert config.data.init_args.test_splits == ["val"]
        if name == "fusion":
            assert config.model.fusion.class_path.endswith(path.stem.rpartition("-")[2])
            assert config.model.losses.query_product.init_args.temperature == 0.2
            assert config.model.stages["fuse"].rates["text_encoder"] == "frozen"


def test_choices_that_are_named_as_paths_are(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    parameters = {
        "model.text.init_args.model": {"choice": ["a/b"]},
        "model.dim": {"int": [64, 256], "when": {"model.text.init_args.model": ["a/b"]}},
    }
    sweep = sweep_of(tmp_path, KINDS | {"parameters": parameters})
    assert [path.name for path in write_wandb(sweep, plan_of(sweep, tmp_path, "shards"))] == ["wandb-sweep-a_b.yaml"]


def test_agents_begin_from_the_prefix_where_it_is_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = sweep_of(tmp_path, KINDS | {"prefix": "align"})
    plan = plan_of(sweep, tmp_path, "shards")
    (before,) = translated(sweep, plan).values()
    assert not [part for part in before["command"] if part.startswith("--branch")]
    checkpoint = prefix_of(plan).stage_checkpoint("align")
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    (after,) = translated(sweep, plan).values()
    assert after["command"][-2:] == [f"--branch={checkpoint}", "${args}"]


def test_keys_are_not_written(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = sweep_of(tmp_path, KINDS)
    with pytest.raises(ValueError, match=r"^--data.path=s3://bucket/shards: agents run a command in a file") as raised:
        write_wandb(sweep, plan_of(sweep, tmp_path, "s3://name:secret@bucket/shards"))
    assert "secret" not in str(raised.value)


def test_optuna_draws_from_the_same_ranges(tmp_path):
    sweep = sweep_of(tmp_path, KINDS)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    trial = study.ask()
    walked(sweep.parameters, lambda parameter: parameter.suggested(trial))
    told = {name: json.loads(optuna.distributions.distribution_to_json(d)) for name, d in trial.distributions.items()}
    kinds = {name: (one["name"], one["attributes"].get("log")) for name, one in told.items()}
    assert list(kinds.values())[:3] == [
        ("FloatDistribution", False), ("FloatDistribution", True), ("IntDistribution", False),
    ]  # fmt: skip
    assert (told["model.dim"]["attributes"]["low"], told["model.dim"]["attributes"]["high"]) == (64, 256)
