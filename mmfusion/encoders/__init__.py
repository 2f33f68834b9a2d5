"""Encoders: text or photos into tokens, a mask and a pooled vector."""

from mmfusion.encoders.augment import Augment
from mmfusion.encoders.dual import DualImageEncoder, DualTextEncoder
from mmfusion.encoders.encoded import Encoded
from mmfusion.encoders.image import ImageEncoder, TimmEncoder
from mmfusion.encoders.scratch_image import ScratchImageEncoder
from mmfusion.encoders.scratch_text import ScratchTextEncoder
from mmfusion.encoders.text import SentenceTransformerEncoder, TextEncoder

__all__ = [
    "Augment",
    "DualImageEncoder",
    "DualTextEncoder",
    "Encoded",
    "ImageEncoder",
    "ScratchImageEncoder",
    "ScratchTextEncoder",
    "SentenceTransformerEncoder",
    "TextEncoder",
    "TimmEncoder",
]
