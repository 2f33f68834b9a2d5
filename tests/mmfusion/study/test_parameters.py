from mmfusion.stages import Group, LossWeights, Stage, Until
from mmfusion.study.parameters import trained


def stage(**rates: float | str) -> Stage:
    return Stage(Until(fraction=1.0), LossWeights(query_text=1.0), rates=rates)  # type: ignore[arg-type]


def test_parameters_that_each_stage_trains() -> None:
    """By hand: the text encoder has 3 + 5, of which the last layer 5."""
    groups = {"text": Group("x", "frozen"), "last": Group("y", 0.1), "image": Group("z", 0.1), "rest": Group(".", 0.1)}
    assigned = {
        "query.encoder.low": "text", "query.encoder.last": "last", "product.image.encoder.net": "image",
        "product.image.projection.network.weight": "rest",
    }  # fmt: skip
    sizes = dict(zip(assigned, (3, 5, 7, 11), strict=True))
    stages = {"adapt": stage(), "all": stage(text=0.1), "fuse": stage(last="frozen", image="frozen")}
    assert trained(stages, groups, assigned, sizes) == {
        "adapt": {"text": 5, "image": 7}, "all": {"text": 8, "image": 7}, "fuse": {"text": 0, "image": 0},
    }  # fmt: skip
