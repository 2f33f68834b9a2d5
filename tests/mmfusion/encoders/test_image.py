"""timm encoders: shapes, normalisation, tokens, sizes, weights from the local cache, and what a user gets wrong."""

from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from mmfusion.encoders import Augment, TimmEncoder

DRAW = torch.arange(3)


def photos(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def small() -> TimmEncoder:
    return TimmEncoder("test_resnet", augment="strong")


def test_the_default_takes_photos_of_80_by_60() -> None:
    encoder = TimmEncoder()
    encoded = encoder(photos(80, 60), DRAW)
    assert encoded.pooled.shape == (3, encoder.dim) == (3, 1024)
    assert encoded.tokens.shape == (3, 6, encoder.token_dim) == (3, 6, 576)
    assert encoded.mask.all()


@pytest.mark.parametrize(
    ("model", "size", "tokens"),
    [("test_resnet", (48, 40), 4), ("test_vit", (32, 48), 7), ("swin_tiny_patch4_window7_224", (64, 64), 4)],
)
def test_tokens_are_what_is_pooled(model: str, size: tuple[int, int], tokens: int) -> None:
    """Mean of the map, channels first or last, or the class token: in these models the pooled vector itself."""
    encoder = TimmEncoder(model, image_size=size).eval()
    encoded = encoder(photos(*size), DRAW)
    assert encoded.tokens.shape == (3, tokens, encoder.token_dim)
    pooled = encoded.tokens[:, 0] if model == "test_vit" else encoded.tokens.mean(1)
    torch.testing.assert_close(encoded.pooled, pooled, atol=1e-5, rtol=1e-4)


def test_normalisation_is_timms(small: TimmEncoder) -> None:
    data = small.eval().network.model.pretrained_cfg
    mean, std = (torch.tensor(data[name])[:, None, None] for name in ("mean", "std"))
    photo = photos(48, 40)
    pooled, _ = small.network((photo / 255 - mean) / std)
    torch.testing.assert_close(small(photo, DRAW).pooled, pooled, atol=1e-5, rtol=1e-4)


def test_augmented_in_training_only(small: TimmEncoder) -> None:
    photo = photos(48, 40)
    values = photo.float() / 255
    plain = (values - small.mean) / small.std
    assert torch.equal(small.eval().prepared(photo, DRAW), plain)
    seen = small.train().prepared(photo, DRAW)
    assert not torch.allclose(seen, plain, atol=0.1)
    assert torch.equal(small.prepared(photo[1:], DRAW[1:]), seen[1:])
    assert torch.equal(TimmEncoder("test_resnet", augment="none").prepared(photo, DRAW), plain)
    flip = Augment(flip=1, shift=0, zoom=0, brightness=0, contrast=0, saturation=0)
    torch.testing.assert_close(TimmEncoder("test_resnet", augment=flip).prepared(photo, DRAW), plain.flip(-1))


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    encoder = TimmEncoder(drop_path=0.1)
    encoded = encoder(photos(80, 60), DRAW)
    (encoded.pooled.square().sum() + encoded.tokens.sum()).backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


def test_stochastic_depth_reaches_the_model() -> None:
    rates = [m.drop_prob for m in TimmEncoder("test_vit", drop_path=0.2).modules() if hasattr(m, "drop_prob")]
    assert max(rates) == pytest.approx(0.2)


def test_bf16_autocast(small: TimmEncoder) -> None:
    expected = small.eval()(photos(48, 40), DRAW).pooled
    with torch.autocast("cpu", torch.bfloat16):
        pooled = small(photos(48, 40), DRAW).pooled
    torch.testing.assert_close(pooled.float(), expected, atol=0.05, rtol=0.05)


def test_pretrained_weights_come_from_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    model = timm.create_model("test_resnet")
    repository = model.pretrained_cfg["hf_hub_id"].replace("/", "--")
    snapshot = tmp_path / f"models--{repository}" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / f"models--{repository}" / "refs").mkdir()
    (tmp_path / f"models--{repository}" / "refs" / "main").write_text("0" * 40)
    save_file(model.state_dict(), snapshot / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    loaded = TimmEncoder("test_resnet", pretrained=True).network.model.state_dict()
    assert loaded
    for name, weight in loaded.items():
        assert torch.equal(weight, model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "mobilenet_v3_small"}, "no model 'mobilenet_v3_small'; the nearest names are mobilenetv3_small_"),
        ({"model": "resnet18.nobody"}, "no weights 'resnet18.nobody'; of this model it has resnet18.a1_in1k"),
        (
            {"model": "vit_tiny_patch16_224", "image_size": (80, 60)},
            r"patches of 16 x 16, which do not cover 80 x 60; .* \[80, 64\]",
        ),
        ({"model": "vgg11", "drop_path": 0.1}, "vgg11 has no stochastic depth; set drop_path to 0"),
        ({"model": "resnet18", "pretrained": True}, "timm/resnet18.a1_in1k: no such folder, not in the local cache"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimmEncoder(**options)


def test_photos_of_another_size_than_the_model_was_made_for() -> None:
    with pytest.raises(ValueError, match=r"scale is 0\.8; vit_tiny_patch16_224 takes photos of one size alone"):
        TimmEncoder("vit_tiny_patch16_224", image_size=(32, 48), augment=Augment(scale=0.8))
    encoder = TimmEncoder("vit_tiny_patch16_224", image_size=(32, 48))
    with pytest.raises(ValueError, match=r"\(32, 48\) .* received \(80, 64\); set data.image_size to \[32, 48\]"):
        encoder(photos(80, 64), DRAW)
