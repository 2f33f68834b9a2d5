"""Whether shards are what their manifest says, before a run relies on them; the same answer on every rank."""

import hashlib
import warnings
from collections import Counter
from typing import TypeVar

import torch
from tqdm import tqdm

from datamodules.shards import Shards
from datamodules.stores.transfer import ShardError
from datamodules.stream.failures import worst

Value = TypeVar("Value")
BLOCK = 2**23  # bytes read at once


def gathered(own: Value, ranks: int) -> list[Value]:
    """Every rank's value, in the order of ranks. With several ranks, all call this at once."""
    values: list[Value | None] = [own] * ranks
    if ranks > 1:
        torch.distributed.all_gather_object(values, own)
    return values  # type: ignore[return-value]


def find_unusable(shards: Shards, rank: int, ranks: int, verify: bool) -> dict[int, str]:
    """Shards that are wrong on any rank, with one of failures.REASONS; with several ranks, all call this at once.

    With `verify`, local shards are hashed, by each rank its part of those that it sees: where machines have a copy
    each, of every copy only the parts of that machine's ranks. Remote ones are hashed when they are fetched.
    """
    own = dict(shards.tars.unusable)
    if verify and shards.tars.local:
        own |= _hashed(shards, rank, ranks)
    found: dict[int, str] = {}
    for other in gathered(own, ranks):
        found |= other
    return dict(sorted(found.items()))


def check_unusable(shards: Shards, max_broken: float) -> None:
    """Raises ValueError when more than that fraction of the products lie in unusable shards; else warns of any."""
    unusable = shards.tars.unusable
    if not unusable:
        return
    lost = Counter(
        {shards.manifest.shards[number].name: shards.manifest.shards[number].products for number in unusable}
    )
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(unusable.values()).most_common())
    said = (
        f"{len(unusable)} of {len(shards.manifest.shards)} shards of {shards.store.address} cannot be used "
        f"({reasons}), with {lost.total()} of {len(shards)} products: {worst(lost)}"
    )
    if lost.total() > max_broken * len(shards):
        raise ValueError(
            f"{said}. That is over the limit data.max_broken={max_broken}: copy or import them again, "
            "or raise the limit to go on without"
        )
    warnings.warn(f"{said}; the run goes on without them", stacklevel=2)


def _hashed(shards: Shards, rank: int, ranks: int) -> dict[int, str]:
    """Of every `ranks`-th shard those whose sha256 is another one."""
    numbers = [n for n in range(rank, len(shards.manifest.shards), ranks) if n not in shards.tars.unusable]
    size = sum(shards.manifest.shards[number].bytes for number in numbers)
    wrong = {}
    with tqdm(total=size, desc="verify shards", unit="B", unit_scale=True, disable=rank > 0) as progress:
        for number in numbers:
            try:
                digest = _digest(shards, number, progress)
            except ShardError:  # it was deleted meanwhile
                wrong[number] = "missing shard"
                continue
            except OSError:
                wrong[number] = "unreachable"
                continue
            if digest != shards.manifest.shards[number].sha256:
                wrong[number] = "checksum"
    return wrong


def _digest(shards: Shards, number: int, progress: "tqdm[None]") -> str:
    digest = hashlib.sha256()
    with shards.store.path(shards.manifest.shards[number].name).open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            progress.update(len(block))
    return digest.hexdigest()
