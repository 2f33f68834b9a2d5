"""Parts of a step: each instant in one of them, their sum the step; on CUDA from events, read later."""

import time

import pytest
import torch

from mmfusion.speed import timeline as line
from mmfusion.speed.timeline import DATA, FORWARD, OTHER, PARTS, PAUSE, Timeline, communicating, split

CPU = torch.device("cpu")


class Ticks:
    """A clock that reads what it is given."""

    def __init__(self, monkeypatch, *times: float) -> None:
        self.times = iter(map(float, times))
        monkeypatch.setattr(time, "perf_counter", lambda: next(self.times))


def test_an_instant_belongs_to_the_innermost_part(monkeypatch):
    Ticks(monkeypatch, 0, 1, 3, 7, 8, 15)
    timeline = Timeline(CPU)
    timeline.enter(FORWARD)
    timeline.enter(line.COMMUNICATION)
    timeline.leave()
    timeline.leave()
    found = split(timeline.cut())
    assert found == {
        "data": 0, "forward": 3, "backward": 0, "communication": 4, "optimizer": 0, "other": 8,
    }  # fmt: skip
    assert sum(found.values()) == 15


def test_a_pause_and_all_in_it_is_no_part_of_a_step(monkeypatch):
    Ticks(monkeypatch, 0, 1, 2, 5, 6, 10)
    timeline = Timeline(CPU)
    timeline.enter(PAUSE)
    timeline.enter(DATA)
    timeline.leave()
    timeline.leave()
    assert split(timeline.cut()) == dict.fromkeys(PARTS, 0) | {OTHER: 5}


def test_a_step_begins_where_the_one_before_was_cut_in_the_part_that_was_open(monkeypatch):
    Ticks(monkeypatch, 0, 1, 4, 9, 20)
    timeline = Timeline(CPU)
    timeline.enter(PAUSE)
    assert split(timeline.cut())[OTHER] == 1
    timeline.leave()
    assert split(timeline.cut()) == dict.fromkeys(PARTS, 0) | {OTHER: 11}


def test_collectives_are_marked_while_a_timeline_runs_and_after_an_error(monkeypatch):
    with communicating():  # none runs
        pass
    Ticks(monkeypatch, 0, 2, 5, 6)
    timeline = Timeline(CPU)
    line.run(timeline)
    try:
        with pytest.raises(ConnectionError), communicating():
            raise ConnectionError
    finally:
        line.run(None)
    assert timeline.part == OTHER
    assert split(timeline.cut())[line.COMMUNICATION] == 3


class Event:
    """As torch.cuda.Event, on a device whose clock the test sets."""

    clock = 0.0
    waits = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: str) -> None:
        assert stream == "stream of cuda:0"
        self.at = Event.clock

    def synchronize(self) -> None:
        Event.waits += 1

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


def test_on_cuda_marks_are_events_and_nothing_waits_before_they_are_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    timeline = Timeline(torch.device("cuda", 0))
    Event.clock = 250.0
    timeline.enter(FORWARD)
    Event.clock = 1250.0
    timeline.leave()
    marks = timeline.cut()
    assert Event.waits == 0
    assert split(marks) == dict.fromkeys(PARTS, 0) | {OTHER: 0.25, FORWARD: 1.0}
