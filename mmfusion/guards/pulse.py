"""The sign of life that finished work gives: a batch, a chunk of a search, a part of the feature cache."""


class Pulse:
    """Counts what was finished in this process."""

    def __init__(self) -> None:
        self.beats = 0

    def beat(self) -> None:
        self.beats += 1


PULSE = Pulse()
