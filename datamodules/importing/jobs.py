"""One map over tasks: in this process, by N processes, or by the tasks of a Ray cluster."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, TypeVar

from datamodules.outcomes import Outcome, outcome, result

Task = TypeVar("Task")
Result = TypeVar("Result")
Jobs = int | Literal["ray"]
ROOT = Path(__file__).parents[2]
IN_FLIGHT = 2  # tasks per worker


def workers(jobs: object) -> int:
    """How many tasks run at a time; starts or joins Ray where it is asked for. Raises ValueError for other values."""
    if jobs == "ray":
        return int(_started_ray().cluster_resources()["CPU"])
    if not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 1:
        raise ValueError(f"jobs is {jobs!r}; expected a number of processes from 1 on, or ray")
    return jobs


def run_map(function: Callable[[Task], Result], tasks: Iterable[Task], jobs: Jobs) -> Iterator[Result]:
    """The function's results as they come, in no order. It is sent to each worker once, a task when it is its turn.

    The first error stops the rest. Whoever stops iterating, and a parent that is killed, leaves no process behind.
    """
    count = workers(jobs)
    if jobs == 1:
        return map(function, tasks)
    return _by_ray(function, tasks, count) if jobs == "ray" else _by_processes(function, tasks, count)


def _by_processes(function: Callable[[Task], Result], tasks: Iterable[Task], count: int) -> Iterator[Result]:
    context = get_context("forkserver")
    context.set_forkserver_preload([function.__module__])  # torch is imported once, not by every process
    ours, theirs = context.Pipe()
    pool = ProcessPoolExecutor(count, context, _begin, (function, theirs))
    try:
        left, running = iter(tasks), set[Future[Outcome]]()
        while True:
            running |= {pool.submit(_run, task) for task in islice(left, IN_FLIGHT * count - len(running))}
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield result(future.result())
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that wrote shards was killed, perhaps for want of memory: fewer JOBS need less, and the same "
            "command goes on"
        ) from error
    finally:
        ours.close()  # whatever the workers are doing, they end
        pool.shutdown(cancel_futures=True)
        theirs.close()


_function: Callable[[Any], Any] | None = None  # of a worker process


def _begin(function: Callable[[Any], Any], parent: Connection) -> None:
    global _function  # noqa: PLW0603  (set once per process, so that it is not sent with every task)
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Connection) -> None:
    """Ends this process when the other end of the pipe is closed, be it because the parent was killed."""
    try:
        parent.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


def _run(task: Any) -> Outcome:
    assert _function is not None
    return outcome(_function, task)


def _by_ray(function: Callable[[Task], Result], tasks: Iterable[Task], count: int) -> Iterator[Result]:
    """All nodes must see the folders by the same paths, and have the packages that this process has."""
    ray = _started_ray()
    shared = ray.put(function)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    remote = ray.remote(outcome).options(runtime_env={"env_vars": {"PYTHONPATH": path}})
    running: list[Any] = []
    try:
        left = iter(tasks)
        while True:
            running += [remote.remote(shared, task) for task in islice(left, IN_FLIGHT * count - len(running))]
            if not running:
                break
            done, running = ray.wait(running)
            for found in ray.get(done):
                yield result(found)
    finally:
        for task in running:
            ray.cancel(task, force=True)


def _started_ray() -> Any:
    """The module, connected to the cluster of RAY_ADDRESS or to one that is started here and ends with this process."""
    try:
        import ray  # noqa: PLC0415  (an extra)
    except ImportError as error:
        raise ValueError("jobs=ray needs the package ray: pip install 'mmfusion[ray]'") from error
    if not ray.is_initialized():
        ray.init(include_dashboard=False)
    return ray
