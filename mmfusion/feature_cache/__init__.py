"""Outputs of frozen encoders on disk, by dense id: for later stages, epochs, evaluations and runs."""

from mmfusion.feature_cache.identity import described, digest
from mmfusion.feature_cache.plain import NoIdentityError
from mmfusion.feature_cache.room import CacheOptions, make_room
from mmfusion.feature_cache.store import PART, TOKEN_PART, VERSION, FeatureFolder, bytes_needed, folder_of
from mmfusion.feature_cache.stored import Stored, open_stored

__all__ = [
    "PART",
    "TOKEN_PART",
    "VERSION",
    "CacheOptions",
    "FeatureFolder",
    "NoIdentityError",
    "Stored",
    "bytes_needed",
    "described",
    "digest",
    "folder_of",
    "make_room",
    "open_stored",
]
