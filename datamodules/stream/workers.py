"""Reading in worker processes: requests in, what is made of them out, in order."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.outcomes import Outcome, outcome

# Forked workers start at once and share the memory of photos; on a Mac, a fork beside its libraries' threads crashes.
FORKS = sys.platform == "linux"
CONTEXT = "fork" if FORKS else None


class _Reading(Dataset[Outcome]):
    """A request -> what `read` makes of it; runs in the workers."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self.read = read

    def __getitem__(self, request: Any) -> Outcome:
        return outcome(self.read, request)


def _as_read(batch: Any) -> Any:
    return batch


def reading(read: Callable[[Any], Any], requests: Iterable[Any], workers: int, persistent: bool) -> DataLoader[Outcome]:
    """`read` applied to the requests in order; request i by worker i % workers, or in this process without workers."""
    options: dict[str, Any] = {"multiprocessing_context": CONTEXT, "persistent_workers": persistent} if workers else {}
    return DataLoader(
        _Reading(read),
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        collate_fn=_as_read,
        generator=torch.Generator(),  # DataLoader draws a number per epoch: not from the model's random state
        **options,
    )
