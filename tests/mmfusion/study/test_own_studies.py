"""The studies that come with the project compare heads of one size."""

from pathlib import Path

import pytest
import yaml

from mmfusion import fusion
from mmfusion.study.definition import read_study

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
OPTION = "--model.fusion.init_args."
LEARNED = {
    "demo": {"concat_linear", "gated", "moe_bilinear"},
    "paper": {"concat_linear", "concat_mlp", "gated", "cross_attention", "moe_bilinear"},
}


def settings(name: str) -> dict:
    return yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text())["model"]


@pytest.mark.parametrize("name", LEARNED)
def test_learned_heads_have_the_parameters_of_the_reference(name: str) -> None:
    """The head alone: the towers' own parts are told apart in the report."""
    study = read_study(EXPERIMENTS / "studies" / f"{name}.yaml")
    dim = settings(f"encoders/{study.encoders}").get("dim", settings("base")["dim"])
    sizes = {}
    for arm, options in study.trained().items():
        if arm not in LEARNED[name]:
            continue
        head = settings(options.experiment)["fusion"]
        given = {key.removeprefix(OPTION): float(value) for key, _, value in (o.partition("=") for o in options.args)
                 if key.startswith(OPTION)}  # fmt: skip
        built = getattr(fusion, head["class_path"])(dim, **(head.get("init_args", {}) | given))
        sizes[arm] = sum(p.numel() for p in built.parameters())
    assert sizes.keys() == LEARNED[name]
    for size in sizes.values():
        assert size == pytest.approx(sizes[study.reference], rel=0.1)
    told = (EXPERIMENTS / "studies" / f"{name}.yaml").read_text()
    assert f"{sizes[study.reference]:,}" in told  # in the file's header
