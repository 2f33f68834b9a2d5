"""Groups by regular expression, rates per stage, by hand-derived values."""

import pytest
from torch import nn

from mmfusion import optim
from mmfusion.stages import Group, LossWeights, Stage, StagePlan, Until


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.query = nn.Linear(2, 2)
        self.text = self.query if tied else nn.Linear(2, 2)
        self.head = nn.Identity()


def stage(fraction: float, **rates) -> Stage:
    return Stage(Until(fraction=fraction), LossWeights(query_text=1.0), rates, warmup=0.1, decay="linear")


GROUPS = {"query": Group("^query", 0.1), "text": Group("^text", 0.2), "head": Group(r"^head\.", 0.3)}


def test_the_first_match_wins():
    groups = {"query": Group("^query", 0.1), "rest": Group(".", 0.2)}
    assigned = optim.assign(Model(), groups, {"a": stage(1.0)})
    assert assigned == {"query.weight": "query", "query.bias": "query", "text.weight": "rest", "text.bias": "rest"}


def test_a_part_without_parameters_or_switched_off_may_be_named():
    optim.assign(Model(), GROUPS, {"a": stage(1.0)})
    groups = {**GROUPS, "image": Group(r"^image\.", 0.1)}
    optim.assign(Model(), groups, {"a": stage(1.0)}, switched_off=["image."])
    with pytest.raises(ValueError, match=r"model\.groups\.image.*matches no parameter"):
        optim.assign(Model(), groups, {"a": stage(1.0)})


@pytest.mark.parametrize(
    ("groups", "stages", "said"),
    [
        ({"query": Group("^query", 0.1)}, {"a": stage(1.0)}, r"no group .* matches the parameters \['text.weight'"),
        (GROUPS, {"a": stage(1.0, texts=0.1)}, "Did you mean text"),
        (GROUPS, {"a": stage(1.0, text=-1.0)}, "must be positive"),
        ({**GROUPS, "bad": Group("(", 0.1)}, {"a": stage(1.0)}, "no regular expression"),
    ],
)
def test_rules_that_cannot_be_are_errors(groups, stages, said):
    with pytest.raises(ValueError, match=said):
        optim.assign(Model(), groups, stages)


def test_a_shared_parameter_goes_by_its_first_name_and_its_rules_must_agree():
    groups = {"query": Group("^query", 0.1), "text": Group("^text", 0.1), "head": Group("^head", 0.1)}
    assigned = optim.assign(Model(tied=True), groups, {"a": stage(1.0)})
    assert assigned == {"query.weight": "query", "query.bias": "query"}
    with pytest.raises(ValueError, match=r"query.weight and text.weight are one shared parameter.*'a'.*frozen"):
        optim.assign(Model(tied=True), groups, {"a": stage(1.0, text="frozen")})


def test_rates_by_hand():
    stages = {"a": stage(0.5), "b": stage(1.0, query="frozen", text=0.4)}
    plan = StagePlan.lay(stages, 200, 10)
    assert optim.rate_at(0, "query", GROUPS, stages, plan) == pytest.approx(0.1 * 0.005 / 0.1)
    assert optim.rate_at(55, "query", GROUPS, stages, plan) == pytest.approx(0.1 * (1 - (0.555 - 0.1) / 0.9))
    assert optim.rate_at(100, "query", GROUPS, stages, plan) == 0
    assert optim.rate_at(100, "text", GROUPS, stages, plan) == pytest.approx(0.4 * 0.005 / 0.1)


def test_the_schedule_drives_the_optimizer_and_vectors_do_not_decay():
    model, stages = Model(), {"a": stage(0.5), "b": stage(1.0, query="frozen")}
    plan = StagePlan.lay(stages, 20, 10)
    assigned = optim.assign(model, GROUPS, stages)
    optimizer, schedule = optim.build(model, assigned, GROUPS, stages, plan, optim.Optim(weight_decay=0.5))
    names = [(group["name"], group["weight_decay"]) for group in optimizer.param_groups]
    assert names == [("query", 0.5), ("query/no_decay", 0.0), ("text", 0.5), ("text/no_decay", 0.0)]
    for step in range(20):
        assert optimizer.param_groups[2]["lr"] == optim.rate_at(step, "text", GROUPS, stages, plan)
        optimizer.step()
        schedule.step()
