"""Augmentation of a batch of photos on their device, from each product's `draw` alone.

The same draw gives the same augmentation, bit for bit, whatever the batch, rank or worker: all arithmetic is
elementwise or within one photo. Hue is never touched, and brightness, contrast and saturation little: colour is what
a shopper asks for.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

AugmentName = Literal["none", "light", "strong"]


@dataclass(frozen=True)
class Augment:
    """What a photo may undergo; every range is symmetric around "nothing".

    Args:
        flip: probability of a horizontal flip
        shift: largest shift, a share of the photo's height or width
        zoom: largest change of size, 0.1 for 0.9 to 1.1 times; beyond the border its pixels are repeated
        rotation: largest rotation, degrees
        brightness: largest change, a share
        contrast: largest change, a share, around middle grey
        saturation: largest change, a share
        erase: probability of a grey rectangle, of up to half the height and width
        scale: height and width in training, a share of those in evaluation, from 0.5 to 1; what is learned from smaller
            photos serves larger ones too (Touvron 2019, arXiv 1906.06423) and costs less. Not for networks of one size
    """

    flip: float = 0.5
    shift: float = 0.08
    zoom: float = 0.1
    rotation: float = 0.0
    brightness: float = 0.1
    contrast: float = 0.1
    saturation: float = 0.1
    erase: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0.5 <= self.scale <= 1:  # below, the resampling would leave out pixels
            raise ValueError(f"augment: scale is {self.scale}; expected 0.5 to 1")


PRESETS: dict[str, Augment | None] = {
    "none": None,
    "light": Augment(),
    "strong": Augment(shift=0.15, zoom=0.25, rotation=10, brightness=0.2, contrast=0.2, saturation=0.2, erase=0.25),
}


def augmented(
    photo: Float[Tensor, "product 3 height width"], draw: Int[Tensor, "product"], options: Augment
) -> Float[Tensor, "product 3 high wide"]:
    """Photos with values 0 to 1, each augmented by its own draw; smaller by options.scale."""
    chance = uniforms(draw, 12, salt=1).to(photo.dtype)[:, :, None, None, None].unbind(1)
    photo = _warped(photo, chance[:5], options)
    photo = _coloured(photo, chance[5:8], options)
    return _erased(photo, chance[8:], options) if options.erase else photo


def _signed(chance: Tensor, largest: float) -> Tensor:
    return (2 * chance - 1) * largest


def _warped(
    photo: Float[Tensor, "product 3 height width"], chance: tuple[Tensor, ...], options: Augment
) -> Float[Tensor, "product 3 high wide"]:
    """Flip, zoom, rotation, shift and scale in one resampling; coordinates run from -1 to 1."""
    height, width = (round(size * options.scale) for size in photo.shape[2:])
    flip = torch.where(chance[0] < options.flip, -1.0, 1.0)[:, 0]
    zoom = 1 + _signed(chance[1], options.zoom)[:, 0]
    half = _signed(chance[2], torch.pi / 360)[:, 0] * options.rotation  # tan of half the angle, to a third order
    cos, sin = (1 - half * half) / (1 + half * half), 2 * half / (1 + half * half)
    y = (torch.arange(height, device=photo.device, dtype=photo.dtype) * 2 + 1) / height - 1
    x = ((torch.arange(width, device=photo.device, dtype=photo.dtype) * 2 + 1) / width - 1) * flip
    y, aspect = y[None, :, None], photo.shape[2] / photo.shape[3]
    grid_x = (cos * x - sin * aspect * y) / zoom + 2 * _signed(chance[3], options.shift)[:, 0]
    grid_y = (sin / aspect * x + cos * y) / zoom + 2 * _signed(chance[4], options.shift)[:, 0]
    return F.grid_sample(photo, torch.stack([grid_x, grid_y], -1), padding_mode="border", align_corners=False)


def _coloured(
    photo: Float[Tensor, "product 3 height width"], chance: tuple[Tensor, ...], options: Augment
) -> Float[Tensor, "product 3 height width"]:
    photo = photo * (1 + _signed(chance[0], options.brightness))
    photo = 0.5 + (photo - 0.5) * (1 + _signed(chance[1], options.contrast))
    red, green, blue = photo.split(1, 1)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    return (grey + (photo - grey) * (1 + _signed(chance[2], options.saturation))).clamp(0, 1)


def _erased(
    photo: Float[Tensor, "product 3 height width"], chance: tuple[Tensor, ...], options: Augment
) -> Float[Tensor, "product 3 height width"]:
    """A grey rectangle; the first chance says whether, and scaled to 0 to 1 again, how wide."""
    y, x = (((torch.arange(size, device=photo.device, dtype=photo.dtype) + 0.5) / size) for size in photo.shape[2:])
    whether, high, top, left = chance
    half_width, half_height = whether / options.erase / 4, high / 4
    inside = ((y[:, None] - top).abs() < half_height) & ((x[None] - left).abs() < half_width)
    return torch.where(inside & (whether < options.erase), 0.5, photo)


def uniforms(draw: Int[Tensor, "product"], count: int, salt: int) -> Float[Tensor, "product count"]:
    """`count` independent uniform numbers in [0, 1) per draw; another salt gives other numbers."""
    first = splitmix64(splitmix64(draw) + salt)
    steps = torch.arange(1, count + 1, device=draw.device) * _wrapped(0x9E3779B97F4A7C15)
    return _shifted(splitmix64(first[:, None] + steps), 40).float() / 2**24


def splitmix64(state: Int[Tensor, "*any"]) -> Int[Tensor, "*any"]:
    """The output function of SplitMix64 (Steele 2014): a bijection of 64-bit integers whose every bit is well mixed."""
    state = (state ^ _shifted(state, 30)) * _wrapped(0xBF58476D1CE4E5B9)
    state = (state ^ _shifted(state, 27)) * _wrapped(0x94D049BB133111EB)
    return state ^ _shifted(state, 31)


def _wrapped(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant


def _shifted(state: Int[Tensor, "*any"], bits: int) -> Int[Tensor, "*any"]:
    """Shifted right as an unsigned integer; torch's own shift repeats the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
