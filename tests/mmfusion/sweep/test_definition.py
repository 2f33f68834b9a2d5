"""Sweep files: what they say is what trials are given, and a mistake in one is told by its key."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import FixedTrial

from mmfusion.study.definition import read_study
from mmfusion.study.preflight import parse
from mmfusion.sweep.definition import read_sweep
from mmfusion.sweep.space import arguments, extremes, walked
from mmfusion.sweep.trials import plan_of, refuse_mistakes

ROOT = Path(__file__).parents[3]
SMALL: dict[str, Any] = {
    "experiment": "fusion_moe",
    "parameters": {
        "model.fusion": {"choice": ["Gated", "MoEBilinear"]},
        "model.fusion.init_args.experts": {"int": [2, 8], "when": {"model.fusion": ["MoEBilinear"]}},
        "model.modality_dropout": {"uniform": [0, 0.5]},
        "model.stages.fuse.rates.fusion": {"loguniform": ["1e-4", 1.0e-2]},
        "model.optim": {"choice": {"none": None, "heavy": {"weight_decay": 0.1}}},
    },
}


def written(folder: Path, content: Any) -> Path:
    path = folder / "small.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def test_a_trial_is_given_what_the_file_says(tmp_path):
    sweep = read_sweep(written(tmp_path, SMALL))
    assert (sweep.name, sweep.metric, sweep.trials, sweep.seed, sweep.pruner) == (
        "small", "val/primary", 20, 1, "median",
    )  # fmt: skip
    trial = FixedTrial({
        "model.fusion": "MoEBilinear", "model.fusion.init_args.experts": 4, "model.modality_dropout": 0.25,
        "model.stages.fuse.rates.fusion": 1e-3, "model.optim": "heavy",
    })  # fmt: skip
    setting = walked(sweep.parameters, lambda parameter: parameter.suggested(trial))
    assert arguments(sweep.parameters, setting) == (
        "--model.fusion=MoEBilinear", "--model.fusion.init_args.experts=4", "--model.modality_dropout=0.25",
        "--model.stages.fuse.rates.fusion=0.001", '--model.optim={"weight_decay": 0.1}',
    )  # fmt: skip
    assert trial.distributions["model.stages.fuse.rates.fusion"].log
    gated = FixedTrial({**trial.params, "model.fusion": "Gated", "model.optim": "none"})
    setting = walked(sweep.parameters, lambda parameter: parameter.suggested(gated))
    assert "model.fusion.init_args.experts" not in setting
    assert arguments(sweep.parameters, setting)[-1] == "--model.optim=null"


def test_each_end_is_tried_under_each_name_that_it_hangs_on(tmp_path):
    found = list(extremes(read_sweep(written(tmp_path, SMALL)).parameters))
    ends = {
        "model.fusion": {"Gated", "MoEBilinear"}, "model.fusion.init_args.experts": {2, 8},
        "model.modality_dropout": {0, 0.5}, "model.stages.fuse.rates.fusion": {1e-4, 1e-2},
        "model.optim": {"none", "heavy"},
    }  # fmt: skip
    assert {option: {setting[option] for setting in found if option in setting} for option in ends} == ends
    experts = "model.fusion.init_args.experts"
    assert all((setting["model.fusion"] == "MoEBilinear") == (experts in setting) for setting in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experimnt": "x"}, "experimnt is an unknown key.*did you mean experiment"),
        ({"parameters": {}}, "parameters is {}: expected dotted options"),
        ({"parameters": {"a": {"unifrm": [0, 1]}}}, "parameters.a.unifrm is an unknown key.*did you mean uniform"),
        ({"parameters": {"a": {}}}, "parameters.a has no distribution: one of uniform, loguniform, int, choice"),
        ({"parameters": {"a": {"int": [1, 2], "uniform": [1, 2]}}}, "parameters.a has uniform and int"),
        ({"parameters": {"a": {"uniform": [1, 1]}}}, r"a.uniform is \[1, 1\]: expected \[low, high\]"),
        ({"parameters": {"a": {"loguniform": [0, 1]}}}, "the first one smaller and above 0"),
        ({"parameters": {"a": {"uniform": [0, float("inf")]}}}, "two numbers"),
        ({"parameters": {"a": {"int": [1, 2.5]}}}, "two whole numbers"),
        ({"parameters": {"a": {"choice": []}}}, r"a.choice is \[\]"),
        ({"parameters": {"seed_everything": {"int": [1, 2]}}}, "seed_everything is given: that is the study's to give"),
        ({"args": ["--a=1"], "parameters": {"a": {"int": [1, 2]}}}, "parameters.a is in args too"),
        ({"parameters": {"a": {"int": [1, 2], "when": {"b": ["x"]}}}}, "names 'b', which is no earlier choice"),
        (
            {"parameters": {"b": {"choice": ["x"]}, "a": {"int": [1, 2], "when": {"b": ["y"]}}}},
            "a.when.b names 'y': there are x",
        ),
        ({"metric": "test/fused/relevance/ndcg@10"}, "a sweep chooses on val"),
        ({"sampler": "tp"}, "sampler names 'tp'.*did you mean tpe"),
        ({"trials": 0}, "trials is 0"),
    ],
)
def test_a_mistake_is_told_by_its_key(tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"small.yaml: .*{message}"):
        read_sweep(written(tmp_path, SMALL | change))


@given(st.text(max_size=200))
def test_no_text_is_more_than_an_error_for_users(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp()
    with pytest.raises(ValueError, match=r"small.yaml"):
        read_sweep(written(folder, text))


@pytest.mark.parametrize("path", sorted((ROOT / "experiments" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("encoders", ["tiny", pytest.param("minilm", marks=pytest.mark.slow)])
def test_a_run_would_take_each_end_of_the_ready_sweeps(path, encoders, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    sweep = dataclasses.replace(read_sweep(path), encoders=encoders)
    refuse_mistakes(sweep, plan_of(sweep, tmp_path, "nowhere", parse=parse))


def test_an_option_that_there_is_not_is_told_before_any_trial(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    wrong = {**SMALL, "parameters": {"model.modality_dropuot": {"uniform": [0, 0.5]}}}
    sweep = read_sweep(written(tmp_path, wrong))
    with pytest.raises(ValueError, match=r"a trial with --model.modality_dropuot=0.0: .*\n.*model.modality_dropout"):
        refuse_mistakes(sweep, plan_of(sweep, tmp_path, "nowhere"))
    sweep = read_sweep(written(tmp_path, SMALL))
    with pytest.raises(ValueError, match="the sweep small varies it"):
        plan_of(sweep, tmp_path, "nowhere", ("--model.fusion=Gated",))
    with pytest.raises(ValueError, match=r"prefix is 'fuse'.*before the last \(adapt, align, fuse\)"):
        plan_of(read_sweep(written(tmp_path, SMALL | {"prefix": "fuse"})), tmp_path, "nowhere")


def test_a_study_is_no_sweep():
    with pytest.raises(ValueError, match="is an unknown key"):
        read_sweep(ROOT / "experiments" / "studies" / "demo.yaml")
    with pytest.raises(ValueError, match="is an unknown key"):
        read_study(ROOT / "experiments" / "sweeps" / "fusion.yaml")
