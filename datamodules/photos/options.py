"""What a user decides about photos at import, and why a photo may be absent."""

from dataclasses import dataclass, replace
from typing import NamedTuple


class Failure(NamedTuple):
    """Why there is no photo: a few words to count by. A transient one may succeed at another time."""

    reason: str
    transient: bool


ABSENT, TOO_LARGE = Failure("no such file", False), Failure("too large", False)


@dataclass(frozen=True)
class PhotoOptions:
    """How photos are stored and downloaded. Raises ValueError where a number makes no sense.

    Args:
        max_side: photos with a longer side are resized to this many pixels; by default all are stored as they are.
        quality: of the JPEG that a resized photo becomes, 1 to 95.
        connections: downloads at a time, over all processes.
        per_host: downloads at a time from one host, over all processes.
        timeout: seconds without a connection or without a byte after which an attempt is given up. A photo may take ten
            times as long in all; a server that answers 429 is left alone for as long as it asks, up to three times.
        retries: further attempts after one that failed for the moment (timeout, no connection, HTTP 429 or 5xx).
        max_mib: the greatest photo, MiB; a larger one is missing.
        max_failed: the fraction of the photos named that may fail to download.
        user_agent: how downloads introduce themselves.
    """

    max_side: int | None = None
    quality: int = 90
    connections: int = 64
    per_host: int = 8
    timeout: float = 20.0
    retries: int = 3
    max_mib: float = 20.0
    max_failed: float = 0.05
    user_agent: str = "mmfusion (photo import)"

    def __post_init__(self) -> None:
        least = {"max_side": 1, "quality": 1, "connections": 1, "per_host": 1, "retries": 0}
        for name, value in least.items():
            if (found := getattr(self, name)) is not None and found < value:
                raise ValueError(f"photos.{name} is {found}; expected at least {value}")
        for name in ("timeout", "max_mib"):
            if not getattr(self, name) > 0:
                raise ValueError(f"photos.{name} is {getattr(self, name)}; expected more than 0")
        if self.quality > 95:
            raise ValueError(f"photos.quality is {self.quality}; expected 1 to 95")
        if not 0 <= self.max_failed <= 1:
            raise ValueError(f"photos.max_failed is {self.max_failed}; expected a fraction between 0 and 1")


def shared(options: PhotoOptions, jobs: int) -> PhotoOptions:
    """One process's part of the connections, where `jobs` processes download; at least one each."""
    return replace(options, connections=max(1, options.connections // jobs), per_host=max(1, options.per_host // jobs))
