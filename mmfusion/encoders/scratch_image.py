"""A small residual network from scratch, for small photos on a processor or for a catalogue of its own kind."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from mmfusion.encoders.augment import Augment, AugmentName
from mmfusion.encoders.encoded import Encoded
from mmfusion.encoders.image import ImageEncoder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class ScratchImageEncoder(ImageEncoder):
    """Residual blocks of two 3 x 3 convolutions (He et al. 2015, arXiv 1512.03385) at twice a ResNet's resolution.

    A stem halves the photo, each stage after the first halves the map again; pooled is the mean of the last map, whose
    places are the tokens. From scratch on small photos it learns more per minute than networks that are made to be
    small (depthwise convolutions) or made for photos of 224 pixels (a quarter of the resolution before the first
    block): experiments/LOG.md.

    Args:
        stem: channels of the stem
        channels: of each stage; the last is the width of tokens and pooled vectors
        blocks: of each stage
        augment: "none", "light", "strong", or single values (mmfusion.encoders.augment.Augment)
    """

    def __init__(
        self,
        *,
        stem: int = 24,
        channels: Sequence[int] = (24, 48, 96, 192),
        blocks: Sequence[int] = (1, 1, 1, 1),
        augment: AugmentName | Augment = "light",
    ) -> None:
        super().__init__(augment)
        if not channels or len(channels) != len(blocks) or min(stem, *channels, *blocks) < 1:
            raise ValueError(
                f"ScratchImageEncoder: stem is {stem}, channels {list(channels)} and blocks {list(blocks)}; expected "
                "numbers of 1 or more, as many channels as blocks: one of each per stage"
            )
        self.network = ResidualNet(stem, channels, blocks)
        self.dim = self.token_dim = channels[-1]
        self.set_normalisation(MEAN, STD)

    def forward(self, photo: UInt8[Tensor, "product 3 height width"], draw: Int[Tensor, "product"]) -> Encoded:
        values = self.prepared(photo, draw).contiguous(memory_format=torch.channels_last)
        return Encoded.unpadded(*self.network(values))

    def compile_network(self, **options: Any) -> None:
        self.network.compile(**options)


class ResidualNet(nn.Module):
    """Photos into the mean of the last feature map, and its places."""

    def __init__(self, stem: int, channels: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        self.stem = nn.Sequential(convolution(3, stem, 3, stride=2), nn.ReLU(inplace=True))
        layers: list[nn.Module] = []
        width = stem
        for stage, (wide, count) in enumerate(zip(channels, blocks, strict=True)):
            for number in range(count):
                layers.append(ResidualBlock(width, wide, stride=2 if stage and not number else 1))
                width = wide
        self.layers = nn.Sequential(*layers)

    def forward(
        self, values: Float[Tensor, "product 3 high wide"]
    ) -> tuple[Float[Tensor, "product width"], Float[Tensor, "product token width"]]:
        features = self.layers(self.stem(values))
        return features.mean((2, 3)), features.flatten(2).mT


class ResidualBlock(nn.Module):
    """Where the map shrinks, what is passed around the block is averaged, not left out (He et al. 2018, ResNet-D)."""

    def __init__(self, width: int, wide: int, stride: int) -> None:
        super().__init__()
        self.first = convolution(width, wide, 3, stride)
        self.second = convolution(wide, wide, 3)
        around: list[nn.Module] = [nn.AvgPool2d(stride, ceil_mode=True)] if stride > 1 else []
        around += [convolution(width, wide, 1)] if stride > 1 or width != wide else []
        self.around = nn.Sequential(*around)

    def forward(self, values: Float[Tensor, "product width high wide"]) -> Float[Tensor, "product out tall broad"]:
        return (self.second(self.first(values).relu_()) + self.around(values)).relu_()


def convolution(width: int, wide: int, size: int, stride: int = 1) -> nn.Sequential:
    """Followed by BatchNorm."""
    return nn.Sequential(nn.Conv2d(width, wide, size, stride, size // 2, bias=False), nn.BatchNorm2d(wide))
