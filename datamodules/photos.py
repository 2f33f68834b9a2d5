"""Bytes of a photo -> RGB pixels of a fixed size, or a thumbnail; however a file fails, it is a PhotoError."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from PIL.Image import Resampling, Transpose
from torch import Tensor

# Pillow knows some forty formats, one of which starts Ghostscript: only those that shops use are decoded.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 64_000_000  # of the file as stored, from its header: 64 million pixels are 192 MB decoded
ORIENTATION = 0x0112
QUALITY = 80  # of a thumbnail
UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


class PhotoError(ValueError):
    """A photo that cannot be decoded. `reason` is one of a few words to count by; the message names the product."""

    def __init__(self, reason: str, product_id: str, detail: str) -> None:
        super().__init__(f"the photo of product {product_id!r} cannot be decoded: {reason} ({detail})")
        self.reason = reason


def decode_photo(content: bytes, size: tuple[int, int], product_id: str) -> UInt8[Tensor, "3 height width"]:
    """The whole photo, upright, on white, squashed into `size` = (height, width) by an antialiased bilinear filter.

    Raises PhotoError: empty, not a photo (of FORMATS), too large (over MAX_PIXELS, before decoding) or damaged.
    """
    with _opened(content, product_id) as photo:
        pixels = np.array(_fitted(photo, size))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def thumbnail(content: bytes, side: int, product_id: str) -> bytes:
    """The whole photo as a JPEG, upright, on white, its longer side `side` pixels or, if that is less, its own.

    Raises PhotoError as `decode_photo` does.
    """
    with _opened(content, product_id) as photo:
        height, width = photo.size[::-1] if _orientation(photo) < 5 else photo.size
        scale = min(1.0, side / max(height, width))
        small = _fitted(photo, (max(1, round(height * scale)), max(1, round(width * scale))))
        buffer = BytesIO()
        small.save(buffer, "JPEG", quality=QUALITY, comment=b"")  # else the comment of the file, of any length, is kept
    return buffer.getvalue()


@contextmanager
def _opened(content: bytes, product_id: str) -> Iterator[Image.Image]:
    """The photo, to be decoded within the block; what fails there is a PhotoError as well."""
    if not content:
        raise PhotoError("empty", product_id, "0 bytes")
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as photo:
            if photo.width * photo.height > MAX_PIXELS:
                detail = f"{photo.width} x {photo.height} pixels, at most {MAX_PIXELS:,} are decoded"
                raise PhotoError("too large", product_id, detail)
            yield photo
    except PhotoError:
        raise
    except UnidentifiedImageError as error:
        raise PhotoError("not a photo", product_id, f"{len(content)} bytes, not one of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise PhotoError("too large", product_id, str(error)) from error
    except Exception as error:  # Pillow's decoders raise anything from SyntaxError to struct.error on damaged files
        raise PhotoError("damaged", product_id, f"{type(error).__name__}: {error}") from error


def _fitted(photo: Image.Image, size: tuple[int, int]) -> Image.Image:
    orientation = _orientation(photo)
    height, width = size if orientation < 5 else size[::-1]  # from 5 on, the file lies on its side
    photo.draft(None, (width, height))  # a JPEG is decoded at a half, quarter or eighth where that is enough
    resized = _on_white(photo).resize((width, height), Resampling.BILINEAR, reducing_gap=3.0)
    return resized.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else resized


def _orientation(photo: Image.Image) -> int:
    """EXIF's number from 1 (upright) to 8; a damaged or absent EXIF block says nothing, so 1."""
    try:
        value = photo.getexif().get(ORIENTATION, 1)
    except Exception:  # the parser of EXIF raises whatever the damage leads to; the pixels may be sound
        return 1
    return value if value in UPRIGHT else 1


def _on_white(photo: Image.Image) -> Image.Image:
    """RGB, 8 bits; what is transparent shows white."""
    if photo.mode.startswith("I"):  # 16 bits of grey: convert() would clip instead of scaling
        return Image.fromarray((np.asarray(photo).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if photo.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in photo.info:
        opaque = photo.convert("RGBA")
        white = Image.new("RGBA", opaque.size, "white")
        return Image.alpha_composite(white, opaque).convert("RGB")
    return photo.convert("RGB")
