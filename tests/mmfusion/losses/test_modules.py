from typing import Any

import pytest
import torch

from mmfusion.losses import InfoNCE
from tests.mmfusion.losses.slow import positives_of


def test_the_scale_starts_at_the_temperature_and_is_saved_either_way() -> None:
    for learnable in (True, False):
        loss = InfoNCE(temperature=0.05, learnable=learnable)
        assert loss.scale.item() == pytest.approx(20)
        assert list(loss.state_dict()) == ["log_scale"]
        assert [name for name, _ in loss.named_parameters()] == (["log_scale"] if learnable else [])


def test_the_scale_stops_at_its_maximum_and_returns_from_it() -> None:
    rows, valid = torch.eye(4), torch.ones(4, dtype=torch.bool)
    right, wrong = (positives_of([[i, (i + n) % 4] for i in range(4)]) for n in (0, 1))
    loss = InfoNCE(temperature=0.12, max_scale=10)
    optimizer = torch.optim.SGD(loss.parameters(), lr=100.0)
    for pairs in (right, right, wrong):
        optimizer.zero_grad()
        loss(rows, rows, pairs, valid, valid).backward()
        assert loss.scale <= 10.00001
        if pairs is wrong:
            assert loss.scale.item() == pytest.approx(10)
        optimizer.step()
    assert loss.scale < 9


@pytest.mark.parametrize("options", [{"temperature": 0.005}, {"temperature": 0.0}, {"max_scale": -1.0}])
def test_a_temperature_beyond_the_maximum_is_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is at most max_scale"):
        InfoNCE(**options)
