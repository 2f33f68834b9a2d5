"""Operations of a step against those counted by hand, once for what is computed twice; peaks by device name."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mmfusion.cached import in_micro_batches
from mmfusion.speed.flops import Flops, compiled, peak
from tests.ddp import run_ranks

ROWS, INPUT, HIDDEN, OUTPUT = 12, 7, 5, 3
# A product of (rows, a) by (a, b) is 2 rows a b; the backward pass has one by the weights and one by the input, of
# which the first layer needs none.
FIRST, SECOND = 2 * ROWS * INPUT * HIDDEN, 2 * ROWS * HIDDEN * OUTPUT
BY_HAND = 2 * FIRST + 3 * SECOND


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(INPUT, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, OUTPUT))


def counted(forward) -> int:
    flops = Flops()
    with flops:
        loss = forward()
    flops.backward = True
    with flops:
        loss.backward()
    return flops.total


def test_a_linear_model_counts_as_by_hand():
    model, rows = network(), torch.randn(ROWS, INPUT)
    assert counted(lambda: model(rows).sum()) == BY_HAND


def test_what_is_computed_again_counts_once():
    model, rows = network(), torch.randn(ROWS, INPUT)

    def micro() -> torch.Tensor:
        return in_micro_batches(lambda part: model(rows[part]), ROWS, 5, [model]).sum()

    assert counted(micro) == BY_HAND
    assert counted(lambda: checkpoint(model, rows, use_reentrant=False).sum()) == BY_HAND
    plain = Flops()
    with plain:
        micro().backward()
    assert plain.total == BY_HAND + FIRST, "a second forward pass, as far as it is needed, is there to be left out"


def test_a_frozen_layer_counts_its_forward_alone():
    model, rows = network(), torch.randn(ROWS, INPUT)
    model[0].requires_grad_(False)
    assert counted(lambda: model(rows).sum()) == FIRST + 2 * SECOND


def test_a_convolution_counts_as_by_hand():
    layer, photos = torch.nn.Conv2d(3, 8, 5, bias=False), torch.randn(2, 3, 9, 9)
    once = 2 * 2 * 8 * 5 * 5 * 3 * 5 * 5  # photos, channels out, places out, channels in, kernel
    assert counted(lambda: layer(photos).sum()) == 2 * once


def of_a_rank(rank: int, world: int) -> tuple[int, list[torch.Tensor], list[torch.Tensor]]:
    """Operations under DDP, and gradients with and without the counting."""
    rows = torch.randn(ROWS, INPUT, generator=torch.Generator().manual_seed(rank))
    one, other = (torch.nn.parallel.DistributedDataParallel(network()) for _ in range(2))
    total = counted(lambda: one(rows).square().sum())
    other(rows).square().sum().backward()
    return total, *([parameter.grad for parameter in model.parameters()] for model in (one, other))


def test_two_ranks_count_their_own_rows_and_get_the_same_gradients_as_uncounted():
    for found, counted_gradients, gradients in run_ranks(of_a_rank, 2):
        assert found == BY_HAND
        assert all(torch.equal(a, b) for a, b in zip(counted_gradients, gradients, strict=True))


@pytest.mark.parametrize(
    ("device", "half", "full"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 494.7), ("NVIDIA H100 PCIe", 756, 378), ("NVIDIA H100 NVL", 835.5, 417.7),
        ("NVIDIA H200", 989.4, 494.7), ("NVIDIA H200 NVL", 835.5, 417.7), ("NVIDIA GH200 480GB", 989.4, 494.7),
        ("NVIDIA A100-SXM4-80GB", 312, 156), ("NVIDIA A100 80GB PCIe", 312, 156), ("NVIDIA L4", 121, 60),
        ("NVIDIA L40S", 362, 183), ("NVIDIA L40", 181, 90.5), ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA A10", 125, 62.5), ("NVIDIA B200", 2250, 1125),
    ],
)  # fmt: skip
def test_peaks_by_the_names_that_devices_give_themselves(device, half, full, monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak(device, "bf16-mixed") == peak(device, "16-mixed") == half * 1e12
    assert peak(device, "32-true") == full * 1e12
    assert peak(device, "64-true") is None
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert peak(device, "32-true") is None
    assert peak(device, "bf16-mixed") == half * 1e12


@pytest.mark.parametrize(
    "device", ["NVIDIA A10G", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 3090 Ti", "Tesla T4", "cpu"]
)
def test_a_device_that_is_not_known_has_no_peak(device):
    assert peak(device, "bf16-mixed") is None


def test_a_compiled_part_is_seen():
    model = network()
    assert not compiled(model)
    model[0].compile(backend="eager")
    assert compiled(model)
