"""Splits by the text of a query: a data set without val gets one that is the same on every machine."""

import unicodedata
from collections.abc import Iterable
from hashlib import blake2b

STEP = 2.0**-53  # between positions


def normalised(text: str) -> str:
    """The text by which two queries count as one: NFKC, casefold, runs of white space as one space."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def position(text: str, seed: int) -> float:
    """Where a text falls in [0, 1), uniformly: a hash of the seed and the normalised text."""
    digest = blake2b(f"{seed}\0{normalised(text)}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * STEP


def in_val(query: str, seed: int, fraction: float) -> bool:
    """Whether a train query goes to val; about `fraction` of all do. Raises ValueError unless 0 <= fraction < 1."""
    if not 0 <= fraction < 1:
        raise ValueError(f"the fraction of val queries is {fraction}; expected 0 or more and less than 1")
    return position(query, seed) < fraction


def with_val(query: Iterable[str | None], split: Iterable[str | None], seed: int, fraction: float) -> list[str | None]:
    """The splits, after val has been taken out of train."""
    rows = zip(query, split, strict=True)
    return ["val" if was == "train" and in_val(text or "", seed, fraction) else was for text, was in rows]
