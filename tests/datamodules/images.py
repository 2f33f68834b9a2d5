"""Photos that tests draw, and their files."""

import io

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def smooth(height: int, width: int) -> Image.Image:
    """Three gradients: no two corners alike, and JPEG keeps them."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 255 // height, columns * 255 // width, 255 - rows * 255 // height], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))
