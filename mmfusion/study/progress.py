"""How far a run is, from the bars in its log (mmfusion/progress.py)."""

import re
from dataclasses import dataclass

BAR = re.compile(r"([^\r\n|]*?): +\d+%\|[^|]*\| *(\d+)/(\d+) \[[^<\]]*<([\d:]+|\?)")
STAGE = re.compile(r"stage (\S+), epoch \d+")


@dataclass(frozen=True)
class Progress:
    """The last bar that moved: its name, and done of total. minutes: until the run's last step, where that is known."""

    name: str
    done: int
    total: int
    minutes: float | None

    def __str__(self) -> str:
        stage = STAGE.fullmatch(self.name)
        what = f"{stage[1]}, step" if stage else self.name
        return f"{what} {self.done:,} of {self.total:,}"


def progress(log: str) -> Progress | None:
    """From a log's end; None where it has no bar yet."""
    minutes, last = None, None
    for name, done, total, left in BAR.findall(log):
        if STAGE.fullmatch(name.strip()):
            minutes = None if left == "?" else _minutes(left)
        last = (name.strip(), int(done), int(total))
    return None if last is None else Progress(*last, minutes)


def _minutes(clock: str) -> float:
    """Of 04:12 or 1:04:12."""
    seconds = 0
    for part in clock.split(":"):
        seconds = 60 * seconds + int(part)
    return seconds / 60
