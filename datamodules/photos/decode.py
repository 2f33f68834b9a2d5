"""Bytes of a photo -> RGB pixels of a fixed size, or a thumbnail; however a file fails, it is a PhotoError."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
import simplejpeg
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from PIL.Image import Resampling, Transpose
from torch import Tensor

Content = bytes | memoryview  # a photo within a larger read need not be copied out of it

DECODING = 1  # raised by whoever makes decode_photo give other pixels: what was made of the old ones is not used then

# Pillow knows some forty formats, one of which starts Ghostscript: only those that shops use are decoded.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 64_000_000  # of the file as stored, from its header: 64 million pixels are 192 MB decoded
Image.MAX_IMAGE_PIXELS = None  # Pillow would warn the user of what MAX_PIXELS refuses, and is counted
ORIENTATION = 0x0112
QUALITY = 80  # of a thumbnail, unless the caller says another
JPEG, MARKER, SCAN, APP1 = b"\xff\xd8\xff", 0xFF, 0xDA, 0xE1
PLAIN = ("YCbCr", "RGB", "Gray")  # simplejpeg's names of colours; not CMYK and YCCK
MAX_ROOM = 16 * 2**20  # bytes of a decoded photo whose memory is kept for the next
LINE, BEST = 64, 16  # bytes: where in a line of the processor's cache a photo begins; from 32 on, all takes 3 % longer
BLOCK = 8  # pixels: in a smaller file the decoder takes the fractions of an eighth for one another
UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


_own = threading.local()


class PhotoError(ValueError):
    """A photo that cannot be decoded. `reason` is one of a few words to count by; the message names the product."""

    def __init__(self, reason: str, product_id: str, detail: str) -> None:
        super().__init__(f"the photo of product {product_id!r} cannot be decoded: {reason} ({detail})")
        self.reason = reason


def decode_photo(
    content: Content, size: tuple[int, int], product_id: str, out: UInt8[Tensor, "3 height width"] | None = None
) -> UInt8[Tensor, "3 height width"]:
    """The whole photo, upright, on white, squashed into `size` = (height, width) by an antialiased bilinear filter.

    It is written into `out`, where that is given; after an error, that holds anything. Raises PhotoError: empty, not a
    photo (of FORMATS), too large (over MAX_PIXELS, before decoding) or damaged.
    """
    out = torch.empty((3, *size), dtype=torch.uint8) if out is None else out
    return out if _plain_jpeg(content, out) else out.copy_(_by_pillow(content, size, product_id))


def _by_pillow(content: Content, size: tuple[int, int], product_id: str) -> UInt8[Tensor, "3 height width"]:
    with _opened(content, product_id) as photo:
        pixels = np.array(_fitted(photo, size))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def thumbnail(content: Content, side: int, product_id: str, quality: int = QUALITY) -> bytes:
    """The whole photo as a JPEG, upright, on white, its longer side `side` pixels or, if that is less, its own.

    `quality` is the JPEG's, 1 to 95. Raises PhotoError as `decode_photo` does.
    """
    with _opened(content, product_id) as photo:
        height, width = photo.size[::-1] if _orientation(photo) < 5 else photo.size
        scale = min(1.0, side / max(height, width))
        small = _fitted(photo, (max(1, round(height * scale)), max(1, round(width * scale))))
        buffer = BytesIO()
        small.save(buffer, "JPEG", quality=quality, comment=b"")  # else the comment of the file, of any length, is kept
    return buffer.getvalue()


def _plain_jpeg(content: Content, out: UInt8[Tensor, "3 height width"]) -> bool:
    """The same pixels as Pillow's (the resizing rounds apart) in little more than half the time.

    False where Pillow is to judge: what is no JPEG in grey or colour, lies on its side, is too large, or was decoded
    with as much as a warning, which is how libjpeg reports a file that ends too soon.
    """
    if content[: len(JPEG)] != JPEG:
        return False
    size = (out.shape[1], out.shape[2])
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if colours not in PLAIN or height * width > MAX_PIXELS or min(height, width) < BLOCK or _turned(content):
            return False
        least = _divided(height, width, size)
        room = _room(3 * least[0] * least[1])
        pixels = simplejpeg.decode_jpeg(content, "RGB", min_height=least[0], min_width=least[1], buffer=room)
    except (ValueError, RuntimeError):  # of the decoder, in its strict mode
        return False
    stacked = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    # What F.interpolate(stacked, size, mode="bilinear", antialias=True) calls, into memory that is there already.
    torch.ops.aten._upsample_bilinear2d_aa.out(stacked, size, False, None, None, out=out[None])
    return True


def _room(size: int) -> UInt8[np.ndarray, "byte"] | None:
    """This thread's memory for a decoded photo: fresh memory of this size comes from the system, page by page."""
    if size > MAX_ROOM:
        return None
    if getattr(_own, "room", None) is None or len(_own.room) < size:
        whole = np.empty(size + LINE, np.uint8)
        start = (BEST - whole.ctypes.data) % LINE
        _own.room = whole[start : start + size]
    return _own.room


def _divided(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width over the largest of 8, 4, 2 and 1 that leaves at least `size`: what Pillow's `draft` takes.

    The decoder has other eighths as well, without vector instructions for them: decoding all takes less time.
    """
    divisor = next((d for d in (8, 4, 2) if height >= d * size[0] and width >= d * size[1]), 1)
    return -(-height // divisor), -(-width // divisor)


def _turned(content: Content) -> bool:
    """Whether a JPEG may not lie upright. EXIF and XMP say so, which are segments before the first scan."""
    place = 2
    while place + 4 <= len(content) and content[place] == MARKER:
        kind = content[place + 1]
        if kind in (SCAN, APP1):
            return kind == APP1 and _orientation_of(content) != 1
        # A marker may be padded with further bytes of 255.
        place += 1 if kind == MARKER else 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    return True


def _orientation_of(content: Content) -> int | None:
    """None for a file that Pillow does not open, for which its decoder shall have the last word."""
    try:
        with Image.open(BytesIO(content), formats=("JPEG",)) as photo:
            return _orientation(photo)
    except Exception:  # as in _opened
        return None


@contextmanager
def _opened(content: Content, product_id: str) -> Iterator[Image.Image]:
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
