"""Stages across two real ranks: equal weights, equal gradients, equal to one process; and what each stage moves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback

from mmfusion.fusion import ConcatLinear, ConcatMLP, CrossAttention, Gated, MaskedSum, MoEBilinear, WeightedMean
from mmfusion.ranks import check_ranks_agree
from tests.ddp import RankError, run_ranks
from tests.small_run import small_data, small_module, small_shards, small_trainer, weights

HEADS = {
    "MaskedSum": MaskedSum, "WeightedMean": WeightedMean, "ConcatLinear": ConcatLinear, "ConcatMLP": ConcatMLP,
    "Gated": Gated, "CrossAttention": lambda dim: CrossAttention(dim, heads=2), "MoEBilinear": MoEBilinear,
}  # fmt: skip


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


class Watch(Callback):
    """What the model looked like after every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.before: dict[str, torch.Tensor] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = weights(pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients = {n: None if p.grad is None else p.grad.clone() for n, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        after = weights(pl_module)
        self.steps.append({
            "stage": pl_module.stage_name,
            "trainable": {n for n, p in pl_module.named_parameters() if p.requires_grad},
            "moved": {n for n in after if not torch.equal(after[n], self.before[n])},
            "gradients": self.gradients,
            "ids": batch.product.id.tolist(),
            "frozen_in_train_mode": [
                n for n, m in pl_module.named_modules()
                if list(m.parameters()) and not any(p.requires_grad for p in m.parameters()) and m.training
            ],
            "trained_in_eval_mode": [
                n for n, m in pl_module.named_modules()
                if any(p.requires_grad for p in m.parameters()) and not m.training
            ],
        })  # fmt: skip


def train(rank: int, world: int, shards: Path, folder: Path) -> dict[str, Any]:
    module, watch = small_module(), Watch()
    trainer = small_trainer(folder, watch, devices=world, strategy="ddp", precision="64-true", deterministic=True)
    trainer.fit(module, small_data(shards))
    return {"weights": weights(module), "steps": watch.steps}


def test_two_ranks_end_with_the_weights_of_one_process(shards, tmp_path):
    one = run_ranks(train, 1, shards, tmp_path)[0]
    two = run_ranks(train, 2, shards, tmp_path)
    for step, (first, second) in enumerate(zip(two[0]["steps"], two[1]["steps"], strict=True)):
        assert not set(first["ids"]) & set(second["ids"]), "ranks must see different products"
        alone = one["steps"][step]
        assert sorted(alone["ids"]) == sorted(first["ids"] + second["ids"])
        for name, gradient in alone["gradients"].items():
            if gradient is not None:
                scale = gradient.abs().max().clamp(min=1e-12)
                assert (first["gradients"][name] - gradient).abs().max() / scale < 1e-6, (step, name)
    for name, weight in one["weights"].items():
        assert torch.equal(two[0]["weights"][name], two[1]["weights"][name]), f"ranks drifted apart in {name}"
        scale = weight.abs().max().clamp(min=1e-6)  # of the tensor: a key's bias has no gradient but rounding
        assert (two[0]["weights"][name] - weight).abs().max() / scale < 1e-6, name
    assert [step["stage"] for step in one["steps"]] == ["adapt"] * 2 + ["align"] * 3 + ["fuse"] * 3


@pytest.mark.parametrize("head", HEADS)
def test_every_trainable_parameter_gets_a_gradient_and_no_frozen_one_moves(shards, tmp_path, head):
    module, watch = small_module(fusion=HEADS[head], dropout=0.1, augment="light"), Watch()
    small_trainer(tmp_path, watch).fit(module, small_data(shards))
    for step in watch.steps:
        for name, gradient in step["gradients"].items():
            assert (gradient is not None) == (name in step["trainable"]), (step["stage"], name)
        assert step["moved"] <= step["trainable"]
        assert not step["frozen_in_train_mode"]
        assert not step["trained_in_eval_mode"]
    for stage in ("adapt", "align", "fuse"):
        last = [step for step in watch.steps if step["stage"] == stage][-1]
        still = {name for name in last["trainable"] - last["moved"] if last["gradients"][name].any()}
        assert not still, f"{stage}: {still} have a gradient and did not move"
    trained = {stage: next(s["trainable"] for s in watch.steps if s["stage"] == stage) for stage in ("adapt", "align")}
    assert any("image.encoder" in name for name in trained["adapt"])
    assert not any("encoder" in name or "fusion" in name for name in trained["align"])


def drift(rank: int, world: int) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    check_ranks_agree(module, "at first")
    if rank == 1:
        with torch.no_grad():
            module[1].bias[0] = torch.nextafter(module[1].bias[0], torch.tensor(9.0))
    check_ranks_agree(module, "after a slip")


def test_a_single_bit_of_drift_stops_the_run():
    with pytest.raises(RankError, match=r"different weights after a slip: 1 parameters, first \['1.bias'\]"):
        run_ranks(drift, 2)
