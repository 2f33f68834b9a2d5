"""Ctrl-C, a scheduler's signal and a closed terminal: all stop a study in the same way."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """The study was asked to stop; nothing that it started runs any more, and that has been said."""


class Signals:
    """How often the study was asked to stop. Each time a KeyboardInterrupt is raised, but not while `held`."""

    def __init__(self) -> None:
        self.asked, self.held = 0, False

    @contextmanager
    def caught(self) -> Iterator["Signals"]:
        names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # SIGINT too: a shell ignores it for what runs behind it
        before = {name: signal.signal(name, self._receive) for name in names}
        try:
            yield self
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """No exception comes from a signal in here: what is begun is noted, what runs is stopped."""
        self.held = True
        try:
            yield
        finally:
            self.held = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1
        if not self.held:
            raise KeyboardInterrupt
