"""Decoding: what kinds of file become, and that every broken file is the same kind of error."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from datamodules.photos.decode import MAX_PIXELS, PhotoError, decode_photo, thumbnail
from tests.datamodules.images import encoded, smooth


def decoded(content: bytes, height: int = 4, width: int = 4) -> torch.Tensor:
    return decode_photo(content, (height, width), "p1")


def test_a_photo_of_the_right_size_is_unchanged() -> None:
    image = smooth(6, 5)
    assert (decoded(encoded(image), 6, 5).permute(1, 2, 0).numpy() == np.asarray(image)).all()


@pytest.mark.parametrize(("height", "width"), [(8, 8), (20, 12), (64, 100)])
def test_resizing_is_bilinear_with_antialias(height: int, width: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    pixels = torch.from_numpy(noise).permute(2, 0, 1)[None].float()
    expected = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)[0]
    assert (decoded(encoded(Image.fromarray(noise)), height, width).float() - expected).abs().max() < 1.01


def test_a_jpeg_decoded_at_a_fraction_looks_like_one_decoded_in_full() -> None:
    image = smooth(900, 700)
    full = np.asarray(image.resize((60, 80), Image.Resampling.BILINEAR)).astype(int)
    found = decoded(encoded(image, "JPEG", quality=95), 80, 60).permute(1, 2, 0).numpy()
    assert np.abs(found - full).mean() < 1


def textured(height: int, width: int) -> Image.Image:
    """What photos have: broad colours, detail of every size, a little grain."""
    random = np.random.default_rng(height + width)
    pixels = random.normal(128, 3, (height, width, 3))
    for side, contrast in ((4, 90), (12, 40), (40, 20), (max(height, width) // 4, 14)):
        for channel in range(3):
            coarse = Image.fromarray(random.standard_normal((side, side)).astype(np.float32))
            pixels[..., channel] += contrast * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def as_by_pillow(content: bytes, height: int, width: int) -> np.ndarray:
    """Pillow's own scaled decoding and resizing, step by step."""
    image = Image.open(io.BytesIO(content))
    image.draft(None, (width, height))
    return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)).astype(int)


SIZES = [((512, 512), (224, 224)), ((80, 60), (64, 64)), ((700, 1500), (224, 224))]
ODD = [((448, 900), (224, 224)), ((9, 300), (4, 64)), ((7, 5), (3, 2)), ((30, 20), (40, 50))]
JPEGS: dict[str, dict[str, object]] = {
    "4:2:0": {},
    "4:4:4": {"subsampling": "4:4:4"},
    "progressive": {"progressive": True},
    "with restarts": {"restart_marker_blocks": 3},
    "with XMP": {"xmp": b"<x:xmpmeta/>"},
}


@pytest.mark.parametrize(("stored", "shown"), SIZES)
def test_a_jpeg_is_close_to_a_full_decode_resized_in_float64(stored: tuple[int, int], shown: tuple[int, int]) -> None:
    content = encoded(textured(*stored), "JPEG", quality=87)
    full = torch.from_numpy(np.array(Image.open(io.BytesIO(content)))).permute(2, 0, 1)[None].double()
    expected = F.interpolate(full, shown, mode="bilinear", antialias=True)[0]
    assert (decoded(content, *shown).double() - expected).abs().mean() < 1.5


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize(("stored", "shown"), [*SIZES, *ODD])
def test_every_kind_of_jpeg_has_the_pixels_of_pillow(
    kind: str, stored: tuple[int, int], shown: tuple[int, int]
) -> None:
    content = encoded(textured(*stored), "JPEG", quality=90, **JPEGS[kind])
    found = decoded(content, *shown).permute(1, 2, 0).numpy()
    assert np.abs(found - as_by_pillow(content, *shown)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_exif_orientation_is_honoured(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(smooth(48, 64), kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    found = decoded(content, upright.height, upright.width).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(found - np.asarray(upright)).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_view_of_a_larger_read_is_decoded_as_a_copy_of_it(kind: str) -> None:
    content = encoded(textured(40, 30), kind)
    view = memoryview(b"before" + content + b"after")[6:-5]
    assert (decode_photo(view, (20, 20), "p1") == decode_photo(content, (20, 20), "p1")).all()
    assert thumbnail(view, 16, "p1") == thumbnail(content, 16, "p1")


def test_an_orientation_behind_padding_and_other_segments_is_found() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(smooth(48, 64), "JPEG", exif=exif, icc_profile=b"\xff\xda" * 50)
    padded = content.replace(b"\xff\xe1", b"\xff\xff\xff\xe1")
    assert len(padded) == len(content) + 2
    assert (decoded(padded, 64, 48) == decoded(content, 64, 48)).all()
    assert decoded(content, 64, 48)[0].float().diff(dim=1).mean() < -1  # what grows downwards grows to the left


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_leaves_the_photo_as_it_lies() -> None:
    image = smooth(4, 4)
    content = encoded(image, "PNG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff broken")
    assert (decoded(content).permute(1, 2, 0).numpy() == np.asarray(image)).all()


def half_clear() -> Image.Image:
    """Left half opaque red, right half fully transparent black."""
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:, :2] = (255, 0, 0, 255)
    return Image.fromarray(pixels, "RGBA")


def palette_with_clear() -> bytes:
    image = Image.fromarray(np.array([[0, 0, 1, 1]] * 4, np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 0, 0])
    return encoded(image, "PNG", transparency=1)


RED_AND_WHITE = [[255, 255, 255, 255], [0, 0, 255, 255], [0, 0, 255, 255]]
KINDS = {
    "alpha": (encoded(half_clear()), RED_AND_WHITE),
    "alpha in WebP": (encoded(half_clear(), "WEBP", lossless=True), RED_AND_WHITE),
    "palette with a clear colour": (palette_with_clear(), RED_AND_WHITE),
    "GIF": (encoded(half_clear(), "GIF"), RED_AND_WHITE),
    "colour that counts as clear": (
        encoded(Image.fromarray(np.array([[[255, 0, 0]] * 2 + [[0, 0, 0]] * 2] * 4, np.uint8)), transparency=(0, 0, 0)),
        RED_AND_WHITE,
    ),
    "half-clear grey": (encoded(Image.new("LA", (4, 4), (0, 128))), [[127] * 4] * 3),
    "palette": (encoded(Image.new("RGB", (4, 4), (10, 200, 30)).quantize(4)), [[10] * 4, [200] * 4, [30] * 4]),
    "1 bit": (encoded(Image.new("1", (4, 4), 1)), [[255] * 4] * 3),
    "grey": (encoded(Image.new("L", (4, 4), 77)), [[77] * 4] * 3),
    "grey of 16 bits": (encoded(Image.fromarray(np.full((4, 4), 0x8012, np.uint16))), [[0x80] * 4] * 3),
    "CMYK": (encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG"), [[255] * 4, [0] * 4, [0] * 4]),
    "CMYK in TIFF": (encoded(Image.new("CMYK", (4, 4), (0, 0, 0, 255)), "TIFF"), [[0] * 4] * 3),
    "BMP": (encoded(Image.new("RGB", (4, 4), (1, 2, 3)), "BMP"), [[1] * 4, [2] * 4, [3] * 4]),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_becomes_rgb_on_white(name: str) -> None:
    content, first_row = KINDS[name]
    assert np.abs(decoded(content)[:, 0].numpy().astype(int) - np.array(first_row)).max() <= 2


def png_of_claimed_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size and which holds nothing else."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    empty = b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, empty, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n"
BROKEN = {
    "nothing": (b"", "empty"),
    "HTML": (b"<html><body>404</body></html>", "not a photo"),
    "PostScript": (POSTSCRIPT, "not a photo"),
    "half a JPEG": (half(encoded(smooth(90, 90), "JPEG")), "damaged"),
    "half a PNG": (half(encoded(smooth(90, 90))), "damaged"),
    "a header of 80 megapixels": (png_of_claimed_size(10_000, 8_000), "too large"),
    "a header of 100 megapixels": (png_of_claimed_size(10_000, 10_000), "too large"),  # where Pillow begins to warn
    "a header of 200 megapixels": (png_of_claimed_size(20_000, 10_000), "too large"),
    "a header without pixels": (png_of_claimed_size(10, 10), "damaged"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_photo_is_an_error_that_names_the_product(name: str) -> None:
    content, reason = BROKEN[name]
    with pytest.raises(PhotoError, match="photo of product 'p1' cannot be decoded") as caught:
        decoded(content)
    assert caught.value.reason == reason
    assert isinstance(caught.value, ValueError)


def test_pixels_are_counted_before_decoding() -> None:
    assert 8_000 * 8_000 <= MAX_PIXELS < 10_000 * 8_000
    with pytest.raises(PhotoError, match=r"10000 x 8000 pixels, at most 64,000,000"):
        decoded(png_of_claimed_size(10_000, 8_000))


def test_pixels_of_a_jpeg_are_counted_before_decoding() -> None:
    content = encoded(smooth(16, 16), "JPEG")
    size = content.index(b"\xff\xc0") + 5  # of the frame's header: length, precision, then height and width
    with pytest.raises(PhotoError, match="9000 x 8000 pixels") as caught:
        decoded(content[:size] + struct.pack(">HH", 8000, 9000) + content[size + 4 :])
    assert caught.value.reason == "too large"


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_ends_too_soon_is_damaged_wherever_it_ends(progressive: bool) -> None:
    content = encoded(textured(120, 90), "JPEG", progressive=progressive)
    start = content.index(b"\xff\xda")
    for end in [*range(start + 20, len(content) - 40, len(content) // 40), len(content) - 40]:
        with pytest.raises(PhotoError) as caught:
            decoded(content[:end], 30, 30)
        assert caught.value.reason == "damaged"


def test_a_jpeg_with_something_superfluous_in_it_is_decoded() -> None:
    content = encoded(smooth(90, 90), "JPEG")
    strewn = content[:-2] + b"\x00\x00\x00" + content[-2:]  # libjpeg warns: extraneous bytes before a marker
    assert (decoded(strewn) == decoded(content)).all()
    assert (decoded(content + b"more") == decoded(content)).all()


def test_quality_decides_the_size_of_a_thumbnail() -> None:
    content = encoded(textured(200, 100), "JPEG")
    small = [len(thumbnail(content, 64, "p1", quality)) for quality in (30, 60, 90)]
    assert small == sorted(small)
    assert Image.open(io.BytesIO(thumbnail(content, 64, "p1"))).size == (32, 64)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_mutated_files_decode_or_fail_as_photo_errors() -> None:
    random = np.random.default_rng(0)
    originals = [encoded(smooth(30, 30), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF")]
    outcomes = {"decoded": 0, "refused": 0}
    for number in range(300):
        content = bytearray(originals[number % len(originals)])
        for place in random.integers(0, len(content), 5):
            content[place] = random.integers(0, 256)
        try:
            assert decoded(bytes(content)).shape == (3, 4, 4)
            outcomes["decoded"] += 1
        except PhotoError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20
