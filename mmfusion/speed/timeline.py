"""Where the time of a training step goes: a line of marks, on which each instant belongs to one part.

Time is the device's. On CUDA a mark is an event in the current stream, read when the step is long over: nothing waits
for the device. What the stream stood still for is then found where it stood: for data between the marks around the
loader's answer (none, where work was left to do), for a collective between the marks around it.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

DATA, FORWARD, BACKWARD, COMMUNICATION, OPTIMIZER, OTHER = (
    "data", "forward", "backward", "communication", "optimizer", "other",
)  # fmt: skip
PARTS = (DATA, FORWARD, BACKWARD, COMMUNICATION, OPTIMIZER, OTHER)
PAUSE = "pause"  # validations and checkpoints: no part of a step

Moment = Any  # a reading of the clock in seconds; on CUDA an event
Mark = tuple[Moment, str]  # from when on, and which part

_running: "Timeline | None" = None  # one training at a time in a process


class Timeline:
    """Parts may lie in one another: an instant belongs to the innermost one, and all of a pause to the pause."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._open = [OTHER]
        self._marks: list[Mark] = [(self._now(), OTHER)]

    @property
    def part(self) -> str:
        return self._open[-1]

    def enter(self, part: str) -> None:
        self._open.append(PAUSE if self.part == PAUSE else part)
        self._marks.append((self._now(), self.part))

    def leave(self) -> None:
        self._open.pop()
        self._marks.append((self._now(), self.part))

    def cut(self) -> list[Mark]:
        """The marks since the last cut, and one of now; for `split`, later."""
        end = (self._now(), self.part)
        marks, self._marks = [*self._marks, end], [end]
        return marks

    def _now(self) -> Moment:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def split(marks: Sequence[Mark]) -> dict[str, float]:
    """Seconds of each of PARTS between the first mark and the last one, without pauses."""
    seconds = dict.fromkeys((*PARTS, PAUSE), 0.0)
    for (start, part), (end, _) in pairwise(marks):
        seconds[part] += _between(start, end)
    del seconds[PAUSE]
    return seconds


def _between(start: Moment, end: Moment) -> float:
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


def run(timeline: Timeline | None) -> None:
    """From now on `communicating` marks this one; None: nothing."""
    global _running  # noqa: PLW0603
    _running = timeline


@contextmanager
def communicating() -> Iterator[None]:
    """Around a collective of a training step, its wait included."""
    timeline = _running
    if timeline is None:
        yield
        return
    timeline.enter(COMMUNICATION)
    try:
        yield
    finally:
        timeline.leave()
