"""Runs a test's function in real processes with a gloo group.

A fresh process imports torch in 4 s, and a fork of the test process itself would inherit its threads. So ranks are
forked from multiprocessing's fork server, one per test process: it starts once (5 s) and imports, without running it,
what collecting the tests imported of torch, Lightning and our packages, under the shape checks of conftest.py. Two
ranks with their group are then up in less than .1 s. conftest.py starts it before the first test: a test of imports by
several processes would start it otherwise, with other modules and without the checks.
"""

import faulthandler
import io
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.distributed as dist

Result = TypeVar("Result")
OURS = ("tests", "mmfusion", "datamodules")
SLOW = ("lightning.pytorch", "sentence_transformers", "timm")


class RankError(AssertionError):
    """A rank raised, died or hung; the message holds where."""


def run_ranks(function: Callable[..., Result], world: int, *args: Any, timeout: float = 60) -> list[Result]:
    """What `function(rank, world, *args)` returns on each of `world` ranks, in order of rank.

    `function` is defined at the top of a module; arguments and results travel by value (torch.save). The default group
    is up; environment and working directory are the caller's, with RANK, LOCAL_RANK and WORLD_SIZE as a launcher sets
    them. Each rank has one thread. RankError when the first rank raises or dies, or any runs longer than `timeout` s.
    """
    server = fork_server()
    ranks: list[tuple[ForkServerProcess, connection.Connection]] = []
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        try:
            for rank in range(world):
                launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
                environment = os.environ | {name: str(value) for name, value in launched.items()}
                ours, theirs = server.Pipe()
                task = (function, rank, world, *args)
                process = server.Process(target=_run_rank, args=(_packed(task), environment, folder, timeout, theirs))
                process.start()
                theirs.close()
                ranks.append((process, ours))
            return _results(ranks, Path(folder), timeout)
        finally:
            _end(ranks)


@cache
def fork_server() -> ForkServerContext:
    """The context of the server; the server is started, and importing."""
    context = multiprocessing.get_context("forkserver")
    loaded = [name for name in sys.modules if name.split(".")[0] in OURS or name in SLOW]
    loaded.sort(key=lambda name: name != "tests.conftest")
    context.set_forkserver_preload([*loaded, "torch._dynamo"])  # DDP and optimizers import dynamo when first made
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
    return context


def _run_rank(
    task: bytes, environment: dict[str, str], folder: str, timeout: float, pipe: connection.Connection
) -> None:
    """One rank's life. It stays up until the parent has heard of it: an early exit would fail the others first."""
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    outcome: tuple[bool, Any]
    with Path(folder, f"stack-{environment['RANK']}").open("w") as stack:
        faulthandler.register(signal.SIGUSR1, stack)
        try:
            function, rank, world, *args = _unpacked(task)
            wait = timedelta(seconds=timeout)
            dist.init_process_group("gloo", f"file://{folder}/store", wait, world_size=world, rank=rank)
            outcome = (True, _packed(function(rank, world, *args)))
        except BaseException:
            outcome = (False, traceback.format_exc())
        pipe.send(outcome)
        pipe.poll(None)


def _results(ranks: list[tuple[ForkServerProcess, connection.Connection]], folder: Path, timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    waiting: dict[Any, int] = {pipe: rank for rank, (_, pipe) in enumerate(ranks)}
    while waiting:
        ready = connection.wait(list(waiting), max(0, deadline - time.monotonic()))
        if not ready:
            late = sorted(waiting.values())
            where = "\n".join(f"rank {rank}:\n{_stack(ranks[rank][0], folder / f'stack-{rank}')}" for rank in late)
            raise RankError(f"ranks {late} of {len(ranks)} still ran after {timeout:g} s\n{where}")
        for pipe in ready:
            rank = waiting.pop(pipe)
            results[rank] = _result(rank, *ranks[rank])
    return [results[rank] for rank in range(len(ranks))]


def _result(rank: int, process: ForkServerProcess, pipe: connection.Connection) -> Any:
    try:
        fine, outcome = pipe.recv()
    except EOFError:
        process.join()
        raise RankError(f"rank {rank} died with exit code {process.exitcode}") from None
    if not fine:
        raise RankError(f"rank {rank} raised\n{outcome}")
    return _unpacked(outcome)


def _stack(process: ForkServerProcess, path: Path, patience: float = 1) -> str:
    """Where a rank is: it writes its stack when asked by signal, unless it has not begun."""
    if path.exists() and process.pid:
        os.kill(process.pid, signal.SIGUSR1)
        end = time.monotonic() + patience
        while not path.read_text() and time.monotonic() < end:
            time.sleep(0.01)
    return path.read_text() if path.exists() else "still starting"


def _end(ranks: list[tuple[ForkServerProcess, connection.Connection]]) -> None:
    """Lets the ranks that have finished leave, and kills the others."""
    finished = sys.exc_info()[0] is None
    for _, pipe in ranks:
        pipe.close()
    for process, _ in ranks:
        process.join(5 if finished else 0)
        process.kill()
        process.join()


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(value: bytes) -> Any:
    return torch.load(io.BytesIO(value), weights_only=False)
