"""The residual network from scratch: shapes, tokens, gradients, and what a user gets wrong."""

import pytest
import torch
from torch import nn

from mmfusion.encoders import Augment, ScratchImageEncoder
from mmfusion.encoders.scratch_image import ResidualBlock


def photos(count: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("size", "places"), [((80, 60), 5 * 4), ((79, 61), 5 * 4), ((16, 16), 1), ((1, 1), 1)])
def test_tokens_are_what_is_pooled_at_any_size(size: tuple[int, int], places: int) -> None:
    encoder = ScratchImageEncoder().eval()
    encoded = encoder(photos(2, *size), torch.arange(2))
    assert encoded.tokens.shape == (2, places, encoder.token_dim) == (2, places, encoder.dim)
    torch.testing.assert_close(encoded.pooled, encoded.tokens.mean(1), atol=1e-5, rtol=1e-4)
    assert encoded.mask.all()


def test_photos_are_smaller_in_training_alone() -> None:
    encoder = ScratchImageEncoder(augment=Augment(scale=0.5))
    sizes = [encoder.train(training)(photos(2, 64, 32), torch.arange(2)).tokens.shape[1] for training in (True, False)]
    assert sizes == [2 * 1, 4 * 2]


def test_stages_have_the_channels_and_blocks_that_are_asked_for() -> None:
    network = ScratchImageEncoder(stem=4, channels=[8, 6], blocks=[1, 3]).network
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    shapes = [(m.in_channels, m.out_channels, m.stride[0]) for m in convolutions]
    assert shapes == [(3, 4, 2), (4, 8, 1), (8, 8, 1), (8, 6, 2), (6, 6, 1), *[(6, 6, 1)] * 4]


def test_a_block_is_the_papers() -> None:
    """relu(second(relu(first(x))) + around(x)), the shortcut averaged over 2 x 2, for a map of even size."""
    torch.manual_seed(0)
    block = ResidualBlock(3, 5, stride=2).eval()
    values = torch.randn(2, 3, 6, 4)
    averaged = values.reshape(2, 3, 3, 2, 2, 2).mean((3, 5))
    convolve = nn.functional.conv2d
    parts = {name: part[0].weight for name, part in (("first", block.first), ("second", block.second))}
    scale = 1 / (1 + block.first[1].eps) ** 0.5  # BatchNorm as it is made, of mean 0 and variance 1
    inner = (convolve(values, parts["first"], stride=2, padding=1) * scale).relu()
    around = torch.einsum("oi,bihw->bohw", block.around[1][0].weight[:, :, 0, 0], averaged) * scale
    expected = (convolve(inner, parts["second"], padding=1) * scale + around).relu()
    torch.testing.assert_close(block(values), expected)


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    encoder = ScratchImageEncoder(blocks=[1, 2, 1, 1])
    encoded = encoder(photos(3, 80, 60), torch.arange(3))
    (encoded.pooled.square().sum() + encoded.tokens.sum()).backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


def test_augmented_in_training_only() -> None:
    photo, draw = photos(2, 32, 24), torch.arange(2)
    encoder = ScratchImageEncoder(augment="strong")
    plain = encoder.eval().prepared(photo, draw)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(plain, (photo / 255 - mean) / std)
    assert not torch.allclose(encoder.train().prepared(photo, draw), plain, atol=0.1)


def test_bf16_autocast() -> None:
    encoder = ScratchImageEncoder().eval()
    with torch.autocast("cpu", torch.bfloat16):
        encoded = encoder(photos(2, 80, 60), torch.arange(2))
    exact = encoder(photos(2, 80, 60), torch.arange(2))
    assert torch.cosine_similarity(encoded.pooled.float(), exact.pooled).min() > 0.99


@pytest.mark.parametrize(
    "options", [{"channels": []}, {"channels": [8, 8]}, {"blocks": [1, 1, 0, 1]}, {"stem": 0}], ids=str
)
def test_mistakes_are_told(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"ScratchImageEncoder: stem is .* one of each per stage"):
        ScratchImageEncoder(**options)
