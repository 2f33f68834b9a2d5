"""Augmentation: seeded per photo, against slow loops."""

import math
from dataclasses import replace

import pytest
import torch

from mmfusion.encoders import Augment
from mmfusion.encoders.augment import PRESETS, augmented, splitmix64, uniforms

NOTHING = Augment(flip=0, shift=0, zoom=0, brightness=0, contrast=0, saturation=0)
EVERYTHING = replace(PRESETS["strong"], erase=0.5)
WORD = 2**64


def drawn(products: int, height: int = 8, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    photo = torch.rand(products, 3, height, width, generator=generator)
    return photo, torch.randint(0, 2**63 - 1, (products,), generator=generator)


def test_splitmix64_is_the_published_one() -> None:
    """The first outputs for seed 1234567, as published with the algorithm."""
    steps = torch.tensor([(1234567 + k * 0x9E3779B97F4A7C15 + WORD // 2) % WORD - WORD // 2 for k in (1, 2, 3)])
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [number % WORD for number in splitmix64(steps).tolist()] == expected


def test_uniforms_are_uniform_and_independent() -> None:
    numbers = uniforms(torch.arange(20_000), 4, salt=1).double()  # neighbouring draws, the worst case
    assert numbers.min() >= 0
    assert numbers.max() < 1
    for power in (1, 2, 3):
        torch.testing.assert_close(
            numbers.pow(power).mean(0), torch.full((4,), 1 / (power + 1)).double(), atol=0.01, rtol=0
        )
    others = uniforms(torch.arange(20_000), 4, salt=2).double()
    correlation = torch.corrcoef(torch.cat([numbers, others, numbers.roll(1, 0)], 1).T) - torch.eye(12)
    assert correlation.abs().max() < 0.03


@pytest.mark.parametrize("options", [PRESETS["light"], EVERYTHING], ids=["light", "everything"])
def test_the_same_draw_is_the_same_augmentation_in_any_batch(options: Augment) -> None:
    photo, draw = drawn(33, 20, 15)
    together = augmented(photo, draw, options)
    for rows in ([5], [32, 7, 5], list(range(1, 18))):
        assert torch.equal(augmented(photo[rows], draw[rows], options), together[rows])
    assert not torch.equal(augmented(photo, draw + 1, options), together)


def test_all_at_zero_is_the_identity() -> None:
    photo, draw = drawn(5)
    torch.testing.assert_close(augmented(photo, draw, NOTHING), photo)


def test_flip() -> None:
    photo, draw = drawn(40)
    torch.testing.assert_close(augmented(photo, draw, replace(NOTHING, flip=1.0)), photo.flip(-1))
    half = augmented(photo, draw, replace(NOTHING, flip=0.5))
    flipped = [torch.allclose(half[row], photo[row].flip(-1), atol=1e-5) for row in range(40)]
    assert 10 < sum(flipped) < 30


def bilinear(photo: torch.Tensor, y: float, x: float) -> torch.Tensor:
    """The photo at fractional pixel (y, x), its border repeated."""
    height, width = photo.shape[1:]
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    top, left = min(int(y), height - 2), min(int(x), width - 2)
    a, b = y - top, x - left
    upper = photo[:, top, left] * (1 - b) + photo[:, top, left + 1] * b
    lower = photo[:, top + 1, left] * (1 - b) + photo[:, top + 1, left + 1] * b
    return upper * (1 - a) + lower * a


@pytest.mark.parametrize(("scale", "size"), [(1.0, (7, 5)), (0.75, (5, 4))])
def test_warp_against_a_loop_over_pixels(scale: float, size: tuple[int, int]) -> None:
    """Each output pixel, relative to the centre, is flipped, rotated, shrunk and shifted into the source, in pixels."""
    options = replace(NOTHING, flip=0.5, shift=0.2, zoom=0.3, rotation=30, scale=scale)
    photo, draw = drawn(6, 7, 5)
    actual, chance = augmented(photo, draw, options), uniforms(draw, 12, salt=1).double()
    assert actual.shape[2:] == size
    for row in range(6):
        c = chance[row].tolist()
        flip, zoom = -1 if c[0] < 0.5 else 1, 1 + 0.3 * (2 * c[1] - 1)
        angle = 2 * math.atan((2 * c[2] - 1) * 30 * math.pi / 360)
        for i in range(size[0]):
            for j in range(size[1]):
                y, x = (i + 0.5) * 7 / size[0] - 3.5, flip * ((j + 0.5) * 5 / size[1] - 2.5)
                x, y = math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y
                x, y = x / zoom + 0.2 * (2 * c[3] - 1) * 5, y / zoom + 0.2 * (2 * c[4] - 1) * 7
                torch.testing.assert_close(actual[row, :, i, j], bilinear(photo[row], y + 3, x + 2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [0.4, 1.1])
def test_scales_that_leave_pixels_out_or_make_them_up_are_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=rf"scale is {scale}; expected 0\.5 to 1"):
        Augment(scale=scale)


def test_colours_by_hand() -> None:
    photo, draw = torch.tensor([0.8, 0.4, 0.2])[None, :, None, None].expand(1, 3, 2, 2), torch.tensor([9])
    bright, contrast, saturation = (2 * number - 1 for number in uniforms(draw, 12, salt=1)[0, 5:8].tolist())
    colours = [0.5 + (part * (1 + 0.1 * bright) - 0.5) * (1 + 0.2 * contrast) for part in (0.8, 0.4, 0.2)]
    grey = 0.299 * colours[0] + 0.587 * colours[1] + 0.114 * colours[2]
    expected = torch.tensor([grey + (part - grey) * (1 + 0.3 * saturation) for part in colours])
    actual = augmented(photo, draw, replace(NOTHING, brightness=0.1, contrast=0.2, saturation=0.3))
    torch.testing.assert_close(actual, expected[None, :, None, None].expand(1, 3, 2, 2))


def test_light_keeps_the_order_of_hues() -> None:
    """A shopper's red stays red: the strongest channel stays the strongest."""
    photo = torch.tensor([0.7, 0.3, 0.2])[None, :, None, None].expand(200, 3, 4, 4)
    for preset in ("light", "strong"):
        out = augmented(photo, torch.arange(200), replace(PRESETS[preset], erase=0))
        assert (out.argmax(1) == 0).all()
        assert out.min() >= 0
        assert out.max() <= 1


def test_erased_is_one_grey_rectangle_in_a_share_of_photos() -> None:
    photo, draw = torch.zeros(400, 3, 16, 12), torch.arange(400)
    out = augmented(photo, draw, replace(NOTHING, erase=0.25))
    assert set(out.unique().tolist()) == {0.0, 0.5}
    grey = out[:, 0] == 0.5
    boxes = grey.any(1).sum(1) * grey.any(2).sum(1)  # occupied columns times rows: all grey in a rectangle
    assert torch.equal(boxes, grey.flatten(1).sum(1))
    assert 60 < (boxes > 0).sum() < 140
    assert boxes.max() <= 8 * 6 + 8 + 6 + 1
