"""A project's folder for runs that train nothing, and what they wrote of themselves in acted.jsonl."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write(path: str, content: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content))


@contextmanager
def project(runs: Path, experiments: Mapping[str, Any]) -> Iterator[None]:
    """Fills an empty folder, the working one; in the end kills what a killed command left. runs: where they are."""
    write("experiments/encoders/tiny.yaml", {"model": {"text": "small"}})
    for name, content in experiments.items():
        write(f"experiments/{name}.yaml", content)
    write("data/manifest.json", {"hash": "h1"})
    yield
    for line in acted(runs):
        if line["event"] == "begins":
            with contextlib.suppress(ProcessLookupError):
                os.kill(line["pid"], signal.SIGKILL)


def acted(runs: Path) -> list[dict[str, Any]]:
    path = runs / "acted.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
