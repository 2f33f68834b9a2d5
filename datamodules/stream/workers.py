"""Reading in worker processes: requests in, what is made of them out, in order."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.outcomes import Outcome, outcome

# Forked workers start at once and share the memory of photos; on a Mac, a fork beside its libraries' threads crashes.
FORKS = sys.platform == "linux"
CONTEXT = "fork" if FORKS else None
PLAIN = (torch.bool, torch.uint8, torch.int64, torch.float32)  # what batches are made of, and NumPy has
AGAIN = 3.0  # seconds
SMALL = 64 * 2**10  # bytes of a tensor that a worker sends as they are: a file of shared memory each takes more time


class _Reading(Dataset[Outcome]):
    """A request -> what `read` makes of it; runs in the workers."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self.read = read

    def __getitem__(self, request: Any) -> Outcome:
        return outcome(self.read, request)


def _as_read(batch: Any) -> Any:
    return batch


def _by_value(tensor: Tensor) -> tuple[Any, ...]:
    """What a tensor of a batch is pickled as."""
    if tensor.nbytes > SMALL or tensor.dtype not in PLAIN or tensor.requires_grad:
        return reduce_tensor(tensor)
    return torch.from_numpy, (tensor.numpy(),)


def _heed_only_the_parent() -> None:
    """Ends the process when its parent says so by SIGTERM, or somebody else a second time, after AGAIN seconds or more.

    A scheduler sends it to every process of a run, which still makes and saves a step: torch's own handler would end
    the worker at once, and the run with it.
    """
    since: float | None = None
    while True:
        told, now = signal.sigwaitinfo({signal.SIGTERM}), time.monotonic()
        if told.si_pid == os.getppid() or (since is not None and now - since > AGAIN):
            os._exit(0)
        since = now if since is None else since


def _begin(worker: int) -> None:
    """Runs in each worker. Its answers hold a dozen small tensors each."""
    ForkingPickler.register(Tensor, _by_value)
    if FORKS:  # a Mac has no sigwaitinfo, and no scheduler
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_heed_only_the_parent, name="signals", daemon=True).start()


def reading(read: Callable[[Any], Any], requests: Iterable[Any], workers: int, persistent: bool) -> DataLoader[Outcome]:
    """`read` applied to the requests in order; request i by worker i % workers, or in this process without workers."""
    options: dict[str, Any] = {"multiprocessing_context": CONTEXT, "persistent_workers": persistent} if workers else {}
    return DataLoader(
        _Reading(read),
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        collate_fn=_as_read,
        worker_init_fn=_begin,
        generator=torch.Generator(),  # DataLoader draws a number per epoch: not from the model's random state
        **options,
    )
