"""Layers of encoders by the names of their parameters, and the rates of a run that falls from layer to layer."""

from pathlib import Path

import pytest
import torch
from lightning import Callback
from torch import nn

from mmfusion.encoders import ScratchImageEncoder, ScratchTextEncoder, SentenceTransformerEncoder, TimmEncoder
from mmfusion.encoders.checkpoint import MINILM, packaged_folder
from mmfusion.encoders.dual import DualImageEncoder, DualTextEncoder
from mmfusion.layers import below_top
from mmfusion.optim import Optim, rate_at
from mmfusion.stages import Group
from tests.ddp import run_ranks
from tests.small_run import GROUPS, small_data, small_module, small_shards, small_trainer, weights


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


def check(encoder: nn.Module, expected: dict[str, int]) -> None:
    """expected: by beginning of a name, the longest that fits."""
    found = below_top(encoder)
    assert set(found) == {name for name, _ in encoder.named_parameters()}
    for name, below in found.items():
        fitting = [start for start in expected if name.startswith(start)]
        assert fitting, name
        assert below == expected[max(fitting, key=len)], name
    assert all(any(name.startswith(start) for name in found) for start in expected)


def test_a_transformer_from_scratch():
    layers = {f"network.layers.{i}.": 2 - i for i in range(3)}
    embeddings = {"network.embedding.": 3, "network.position": 3}
    check(ScratchTextEncoder(width=16, layers=3, heads=2), embeddings | layers | {"network.norm.": 0})


def test_one_layer_alone_has_the_embeddings_below_it():
    encoder = ScratchTextEncoder(width=16, layers=1, heads=2)
    check(encoder, {"network.": 0, "network.embedding.": 1, "network.position": 1})


def test_a_residual_network_from_scratch():
    encoder = ScratchImageEncoder(stem=4, channels=(4, 8, 8), blocks=(1, 2, 1))
    check(encoder, {"network.stem.": 4} | {f"network.layers.{i}.": 3 - i for i in range(4)})


def test_minilm():
    folder = packaged_folder(MINILM)
    if folder is None:
        pytest.skip("the dev extra is not installed")
    body = "network.0.model."
    layers = {f"{body}encoder.layer.{i}.": 5 - i for i in range(6)}
    check(SentenceTransformerEncoder(str(folder)), {f"{body}embeddings.": 6} | layers)


def test_the_towers_of_a_dual_checkpoint(clip):
    layers = {f"network.body.encoder.layers.{i}.": 1 - i for i in range(2)}
    below, top = {"network.body.embeddings.": 2}, {"network.projection.": 0}
    check(DualTextEncoder(str(clip)), below | layers | top | {"network.body.final_layer_norm.": 0})
    outer = {"network.body.pre_layrnorm.": 2, "network.body.post_layernorm.": 0}
    check(DualImageEncoder(str(clip)), below | layers | top | outer)


@pytest.mark.parametrize("model", ["test_vit", "test_resnet", "test_efficientnet", "mobilenetv3_small_050"])
def test_timm_models_have_the_factors_of_timms_own_optimizer(model):
    from timm.optim import param_groups_layer_decay

    encoder = TimmEncoder(model)
    network = encoder.network.model
    names = {id(parameter): f"network.model.{name}" for name, parameter in network.named_parameters()}
    groups = param_groups_layer_decay(network, layer_decay=0.5)
    expected = {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}
    found = {name: 0.5**below for name, below in below_top(encoder).items()}
    assert found == pytest.approx(expected)
    assert len(set(found.values())) > 2


def test_a_vision_transformer_by_name():
    layers = {f"network.model.blocks.{i}.": 5 - i for i in range(6)}
    embeddings = {f"network.model.{name}": 6 for name in ("cls_token", "pos_embed", "patch_embed.")}
    check(TimmEncoder("test_vit"), embeddings | layers | {"network.model.norm.": 0})


def test_an_encoder_without_a_list_of_layers_is_refused_where_it_trains():
    flat = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    with pytest.raises(ValueError, match=r"layer_decay: Sequential has no list of layers .*set it to 1\.0"):
        below_top(flat)
    assert below_top(nn.Sequential(nn.Identity())) == {}


@pytest.mark.parametrize("decay", [0.0, -1.0, 1.1])
def test_a_decay_that_cannot_be(decay):
    with pytest.raises(ValueError, match=r"model\.optim\.layer_decay is .*expected a factor in \(0, 1\]"):
        Optim(layer_decay=decay)


class Rates(Callback):
    """The rate of every parameter in every step, as the optimizer has it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        self.steps.append({names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]})
        self.groups = [group["name"] for group in optimizer.param_groups]


def test_every_step_of_every_stage_has_the_rate_of_its_layer(shards, tmp_path):
    module, rates = small_module(optim=Optim(layer_decay=0.5), query="copy"), Rates()
    small_trainer(tmp_path, rates).fit(module, small_data(shards))
    views = {"query": module.query, "product.text": module.product.text, "product.image": module.product.image}
    below = {
        f"{side}.encoder.{name}": count
        for side, view in views.items()
        for name, count in below_top(view.encoder).items()
    }
    assert set(below) < set(rates.steps[0])
    assert {*below.values()} == set(range(7))
    for step, found in enumerate(rates.steps):
        for name, rate in found.items():
            own = rate_at(step, module.assigned[name], module.groups, module.stages, module.stage_plan)
            assert rate == pytest.approx(own * 0.5 ** below.get(name, 0)), (step, name)
    assert "text_encoder/top-1" in rates.groups
    assert "image_encoder/top-1/no_decay" in rates.groups
    assert "image_encoder/top-6" in rates.groups


def test_a_frozen_encoder_needs_no_layers():
    """MiniLM's overlay freezes the text; what has no layers then is nobody's concern."""
    frozen = {"text_encoder": Group(GROUPS["text_encoder"].match, "frozen")}
    module = small_module(optim=Optim(layer_decay=0.5), groups=GROUPS | frozen)
    assert {name.split(".")[1] for name in module.below_top} == {"image"}
    assert small_module().below_top == {}


def both(rank: int, world: int, shards: Path, folder: Path) -> list[dict[str, torch.Tensor]]:
    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint(folder / f"{trainer.global_step}.ckpt")

    found = []
    for resumed in (None, folder / "1.ckpt", folder / "4.ckpt"):
        module = small_module(dropout=0.1, optim=Optim(layer_decay=0.5))
        trainer = small_trainer(folder, *([] if resumed else [Save()]), devices=world, strategy="ddp")
        trainer.fit(module, small_data(shards), ckpt_path=resumed, weights_only=True)
        found.append(weights(module))
    return found


def test_two_ranks_agree_and_go_on_exactly(shards, tmp_path):
    first, second = run_ranks(both, 2, shards, tmp_path, timeout=240)
    for other in [*first[1:], *second]:
        assert [name for name, value in first[0].items() if not torch.equal(other[name], value)] == []
