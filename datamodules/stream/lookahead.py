"""Shards of the next steps are fetched from their store while the present step trains."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from datamodules.stream.tars import Tars

STEPS = 32  # how far ahead: at .1 s a step, the seconds that a shard of some hundred MB takes

# A worker that is forked while a thread downloads would inherit whatever locks that thread holds, for ever.
_fetching = threading.Lock()
os.register_at_fork(before=_fetching.acquire, after_in_parent=_fetching.release, after_in_child=_fetching.release)


class LookAhead:
    """A thread that fetches what the steps before `last` need, never more than STEPS ahead of the one under way.

    `shards_of` gives the numbers of the shards of a step; it runs in the thread.
    """

    def __init__(self, tars: Tars, shards_of: Callable[[int], list[int]], first: int, last: int) -> None:
        self._tars, self._shards_of = tars, shards_of
        self._next, self._last, self._limit = first, last, first + STEPS
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="look-ahead", daemon=True)
        self._thread.start()

    def at(self, step: int) -> None:
        """The step under way."""
        with self._changed:
            self._next, self._limit = max(self._next, step + 1), step + 1 + STEPS
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread, which still finishes a fetch that has begun."""
        with self._changed:
            self._last = 0
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next < self._limit or self._next >= self._last)
                if self._next >= self._last:
                    return
                step = self._next
                self._next += 1
            with _fetching:
                self._tars.fetch(self._shards_of(step))


@contextmanager
def looking_ahead(
    tars: Tars, shards_of: Callable[[int], list[int]], first: int, last: int
) -> Iterator[Callable[[int], None]]:
    """A function to be told of the step under way; nothing is fetched where the shards are local."""
    if tars.local:
        yield lambda step: None
        return
    ahead = LookAhead(tars, shards_of, first, last)
    try:
        yield ahead.at
    finally:
        ahead.close()
