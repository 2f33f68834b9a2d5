"""Photos by URL: a thread that downloads for all others, so that limits hold over them and connections are kept."""

import asyncio
import threading
import weakref
from collections.abc import Sequence

from datamodules.photos.options import Failure, PhotoOptions
from datamodules.photos.visits import Visits


class Downloads:
    """Photos by URL, within the limits of the options over all calls, whichever threads they come from.

    A thread with an event loop serves them and keeps connections open; it ends with this object. Copies in other
    processes have their own.
    """

    def __init__(self, options: PhotoOptions) -> None:
        self._options, self._starting = options, threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def __getstate__(self) -> PhotoOptions:
        return self._options

    def __setstate__(self, options: PhotoOptions) -> None:
        Downloads.__init__(self, options)

    def get(self, urls: Sequence[str]) -> list[bytes | Failure]:
        """What each URL answers, in their order; one that is named twice is fetched once. Reasons: see `Visits`."""
        unique = list(dict.fromkeys(urls))
        if not unique:
            return []
        loop = self._started()
        future = asyncio.run_coroutine_threadsafe(self._visits.photos(unique), loop)
        try:
            found = dict(zip(unique, future.result(), strict=True))
        except BaseException:  # Ctrl-C while we wait: nobody wants the rest
            future.cancel()
            raise
        return [found[url] for url in urls]

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._starting:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                thread = threading.Thread(target=_serve, args=(loop,), name="downloads", daemon=True)
                thread.start()
                self._visits = asyncio.run_coroutine_threadsafe(Visits.open(self._options), loop).result()
                weakref.finalize(self, _stop, loop, thread, self._visits)
                self._loop = loop
            return self._loop


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread, visits: Visits) -> None:
    async def end() -> None:
        unwanted = asyncio.all_tasks() - {asyncio.current_task()}
        for task in unwanted:
            task.cancel()
        await asyncio.gather(*unwanted, return_exceptions=True)
        await visits.close()
        loop.stop()

    asyncio.run_coroutine_threadsafe(end(), loop)
    if threading.current_thread() is not thread:  # where Python happens to collect garbage
        thread.join(timeout=5.0)
