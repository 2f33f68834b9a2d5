"""What benchmarks measure by: runs with their time and memory, and lines with the time since the start."""

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

REPEATS, GIB = 3, 2**30

console = Console(width=None if os.isatty(1) else 150)


@dataclass
class Runs:
    """What runs of one contestant took: seconds each, and the most bytes that any added to the process."""

    seconds: list[float] = field(default_factory=list)
    bytes: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def run(self, work: Callable[[], Any], apart: bool = False) -> Any:
        """apart: time and memory in a run each. A peak is measured from a heap that is given back to the system before,
        and what takes milliseconds would be timed fetching its pages again."""
        if apart:
            work()  # what is left of other contestants goes from the processor's cache
            start = time.perf_counter()
            work()
            timed = time.perf_counter() - start
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts from here
        before, start = status("VmRSS"), time.perf_counter()
        result = work()
        self.seconds.append(timed if apart else time.perf_counter() - start)
        self.bytes = max(self.bytes, status("VmHWM") - before)
        return result


def status(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split(f"{name}:")[1].split()[0])


def verdict(holds: bool) -> str:
    return "[green]PASS[/]" if holds else "[red]over limit[/]"


def said(line: str, started: float = time.perf_counter()) -> None:
    console.print(f"[dim]{time.perf_counter() - started:6.1f} s[/]  {line}", highlight=False)
