"""Photos of one shard, in order, a few chunks ahead of who writes them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from threading import Thread

from datamodules.photos.files import Photos, is_web
from datamodules.photos.options import Failure, PhotoOptions

CHUNK = 32  # photos that are fetched at once, some by URL; of AHEAD times as many the bytes are in memory
AHEAD = 4  # chunks that are fetched at a time, at most, where some come by URL: a slow host holds up only its own

Fetched = list[bytes | Failure]


def chunks_ahead(photos: PhotoOptions, workers: int) -> int:
    """How many chunks each worker fetches at a time: at most AHEAD, and so many that a host bears one download each."""
    return max(1, min(AHEAD, photos.per_host // workers))


def fetched(photos: Photos, names: Sequence[str], ahead: int = AHEAD) -> Iterator[bytes | Failure]:
    """What `photos.get` gives, in the order of `names`; its ValueErrors come when it is the chunk's turn."""
    waiting: deque[Callable[[], Iterable[bytes | Failure]]] = deque()
    for start in range(0, len(names), CHUNK):
        chunk = names[start : start + CHUNK]
        if any(map(is_web, chunk)):
            waiting.append(_started(photos, chunk).result)
        else:
            waiting.append(partial(_one_by_one, photos, chunk))
        if len(waiting) == ahead:
            yield from waiting.popleft()()
    while waiting:
        yield from waiting.popleft()()


def _one_by_one(photos: Photos, names: Sequence[str]) -> Iterator[bytes | Failure]:
    """From files, each read when it is its turn."""
    for name in names:
        yield from photos.get([name])


def _started(photos: Photos, names: Sequence[str]) -> Future[Fetched]:
    """A thread that does not keep the process alive, as those of an executor do: Ctrl-C would wait for downloads."""
    future: Future[Fetched] = Future()
    Thread(target=_get, args=(future, photos, names), daemon=True).start()
    return future


def _get(future: Future[Fetched], photos: Photos, names: Sequence[str]) -> None:
    try:
        future.set_result(photos.get(names))
    except BaseException as error:
        future.set_exception(error)
