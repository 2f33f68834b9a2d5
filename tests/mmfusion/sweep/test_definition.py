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
from mmfusion.sweep.preflight import refuse_metric, refuse_mistakes
from mmfusion.sweep.space import arguments, extremes, walked
from mmfusion.sweep.trials import plan_of

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
        ({"parameters": {"seed_everything": {"int": [1, 2]}}}, "seed_everything is given: the command gives that"),
        ({"args": ["--a=1"], "parameters": {"a": {"int": [1, 2]}}}, "parameters.a is in args too"),
        ({"trial_args": ["--a=1"], "parameters": {"a": {"int": [1, 2]}}}, "parameters.a is in trial_args too"),
        ({"trial_args": ["--exp=a"]}, "trial_args holds '--exp=a'"),
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
@pytest.mark.parametrize("encoders", ["tiny", "minilm"])
@pytest.mark.slow
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


FREE = {
    "model.groups.fusion.rate": {"loguniform": [1e-4, 1e-2]},
    "model.stages.fuse.losses.query_text": {"uniform": [0, 1]},
    "model.losses.query_product": {"choice": ["InfoNCE", "Sigmoid"]},
}


@pytest.mark.parametrize(
    ("prefix", "changing", "told"),
    [
        ("align", {}, None),
        ("adapt", {"model.stages.align.warmup": {"uniform": [0.0, 0.2]}}, None),
        pytest.param(
            "align",
            {"model.dim": {"choice": [128, 64]}},
            "model.dim: the checkpoint has 128, this run 64",
            marks=pytest.mark.slow,
        ),
        (
            "align",
            {"model.stages.adapt.until.fraction": {"uniform": [0.4, 0.45]}},
            "until.fraction: .* 0.45, this run 0.4",
        ),
        ("align", {"model.groups.projection.rate": {"uniform": [1e-3, 1e-2]}}, "the rate of projection in stage adapt"),
        pytest.param(
            "align",
            {
                "model.text": {"choice": ["ScratchTextEncoder", "SentenceTransformerEncoder"]},
                "model.text.init_args.width": {"int": [64, 128], "when": {"model.text": ["ScratchTextEncoder"]}},
            },
            "model.text.width: the checkpoint has 128, this run 64",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_changes_the_shared_stages_is_told_before_they_are_trained(prefix, changing, told, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    content = {"experiment": "fusion_moe", "prefix": prefix, "parameters": FREE | changing}
    sweep = read_sweep(written(tmp_path, content))
    plan = plan_of(sweep, tmp_path, "nowhere")
    if told is None:
        refuse_mistakes(sweep, plan)
        return
    with pytest.raises(ValueError, match=f"(.|\n)*{told}") as raised:
        refuse_mistakes(sweep, plan)
    said = f"sweep small: all trials share the stages until align, and {list(changing)[-1]} changes them: take that out"
    assert str(raised.value).startswith(said)


LABELS = {"relevance": {"E": 1.0, "I": 0.0}}
MODEL = {"modalities": ["text", "image"], "evaluation": {"metrics": ["ndcg@10", "share@5"], "baselines": False}}


@pytest.mark.parametrize(
    ("metric", "labels", "told"),
    [
        ("val/fused/relevance/ndcg@10", LABELS, None),
        ("val/text@64/relevance/share_e@5", LABELS, None),
        ("val/fused/elsewhere/share_e@5", None, None),
        ("val/fusd/relevance/ndcg@10", LABELS, "names 'fusd': there are text, image, fused; did you mean fused?"),
        ("val/hybrid_sum/relevance/ndcg@10", LABELS, "names 'hybrid_sum': there are"),
        ("val/fused/relevance/ndgc@10", LABELS, "names 'relevance/ndgc@10': .*did you mean relevance/ndcg@10?"),
        ("val/fused/relevanse/ndcg@10", LABELS, "did you mean relevance/ndcg@10?"),
        ("val/fused/elsewhere/ndcg@100", None, "did you mean elsewhere/ndcg@10?"),
        ("val/primry", LABELS, "names 'primry'"),
    ],
)
def test_a_metric_that_results_would_not_hold_is_told(metric, labels, told):
    if told is None:
        refuse_metric(metric, MODEL, labels)
        return
    with pytest.raises(ValueError, match=told.replace("?", r"\?")):
        refuse_metric(metric, MODEL, labels)


def test_a_metric_is_looked_for_before_any_trial(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    (tmp_path / "manifest.json").write_text('{"labels": {"relevance": {}}}')
    content = {"experiment": "fusion_moe", "parameters": FREE, "metric": "val/fused/relevance/ndgc@10"}
    sweep = read_sweep(written(tmp_path, content))
    with pytest.raises(ValueError, match=r"a trial with .*: the sweep's metric .* did you mean relevance/ndcg@10"):
        refuse_mistakes(sweep, plan_of(sweep, tmp_path, str(tmp_path)))


def test_a_study_is_no_sweep():
    with pytest.raises(ValueError, match="is an unknown key"):
        read_sweep(ROOT / "experiments" / "studies" / "demo.yaml")
    with pytest.raises(ValueError, match="is an unknown key"):
        read_study(ROOT / "experiments" / "sweeps" / "fusion.yaml")
