"""The plan of stages by hand, modes, checksums."""

import pytest
import torch
from torch import nn

from mmfusion.ranks import checksum
from mmfusion.stages import LossWeights, Stage, StagePlan, Until, set_modes, summarise


def stages(**untils: Until) -> dict[str, Stage]:
    return {name: Stage(until, LossWeights(query_text=1.0)) for name, until in untils.items()}


def test_three_ways_to_end_a_stage():
    laid = StagePlan.lay(stages(a=Until(epochs=1.5), b=Until(steps=40), c=Until(fraction=1.0)), 100, 20)
    assert laid.ends == [30, 40, 100]
    assert [laid.index(step) for step in (0, 29, 30, 39, 40, 99, 100)] == [0, 0, 1, 1, 2, 2, 2]
    assert laid.progress(30) == 0
    assert laid.progress(70) == 0.5


@pytest.mark.parametrize(
    ("untils", "said"),
    [
        ({"a": Until(fraction=0.5)}, "must end with the run"),
        ({"a": Until(steps=80), "b": Until(steps=60), "c": Until(fraction=1.0)}, "after the one before"),
        ({"a": Until(fraction=0.001), "b": Until(fraction=1.0)}, "after the one before"),
        ({}, "empty"),
    ],
)
def test_a_plan_that_cannot_be_is_an_error(untils, said):
    with pytest.raises(ValueError, match=said):
        StagePlan.lay(stages(**untils), 100, 20)


@pytest.mark.parametrize("wrong", [{}, {"steps": 3, "fraction": 0.5}, {"fraction": 1.5}, {"epochs": 0}])
def test_until_takes_exactly_one_sensible_value(wrong):
    with pytest.raises(ValueError, match="until"):
        Until(**wrong)


def test_frozen_parts_go_to_eval_mode_and_trainable_ones_do_not():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    model[1].requires_grad_(False)
    model.eval()
    set_modes(model)
    assert [m.training for m in (model, model[0], model[0][1], model[1], model[1][0], model[1][1])] == [
        True, True, True, False, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_a_checksum_sees_one_flipped_bit(dtype):
    a = [torch.arange(6).to(dtype), torch.ones(3, 3).to(dtype)]
    b = [a[0].clone(), a[1].clone()]
    assert torch.equal(checksum(a), checksum(b))
    b[1][2, 1] = 2
    assert (checksum(a) != checksum(b)).tolist() == [False, True]


def test_a_checksum_of_a_boolean_buffer():
    assert checksum([torch.tensor([True, False, True])]).tolist() == [1 + 5]


def test_parameters_are_summed_up_by_their_part():
    names = ["product.image.encoder.network.a.weight", "product.image.encoder.network.b", "product.fusion.gate.weight"]
    names += ["query.projection.network.weight", "losses.query_text.log_scale"]
    assert (
        summarise(names) == "product.image.encoder (2), product.fusion (1), query.projection (1), losses.query_text (1)"
    )
