"""The runs below a folder, as they lie on disk; what is no run, or is broken, does not stop the rest."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmfusion.retrieval.examples import main_metric
from mmfusion.retrieval.report import primary_view
from mmfusion.runs.family import family
from mmfusion.state import LOST, RunState, read_state

CONFIG = "config.yaml"
OPTIONS = ("data", "experiment", "model", "trainer")  # of a run's config.yaml, at its top
DEPTH = 8  # folders below the given one
WRITTEN = (CONFIG, "metrics.csv", "results.json", "checkpoints/last.ckpt")
Cell = Mapping[str, Any]


@dataclass(frozen=True)
class FoundRun:
    """A run's folder. linked: whether it was found through a symbolic link."""

    folder: Path
    linked: bool = False

    @cached_property
    def state(self) -> RunState | None:
        """None of a run from before state.json."""
        return read_state(self.folder)

    @cached_property
    def results(self) -> Mapping[str, Any]:
        return _json(self.folder / "results.json")

    @cached_property
    def family(self) -> str | None:
        return family(self.folder)

    @cached_property
    def experiment(self) -> str:
        """As the run's options name it, and so its folder."""
        named = re.search(r"^experiment: *(\S.*?) *$", _text(self.folder / CONFIG), re.MULTILINE)
        return named[1].strip("'\"") if named else self.folder.parent.name

    @cached_property
    def written(self) -> float:
        """When it was last written, in seconds since 1970."""
        paths = [self.folder / name for name in WRITTEN]
        times = [path.stat().st_mtime for path in paths if path.is_file()]
        return self.state.updated if self.state else max(times, default=0.0)

    @property
    def about(self) -> Mapping[str, Any]:
        """The key `run` of its results."""
        about = self.results.get("run")
        return about if isinstance(about, dict) else {}

    @property
    def commit(self) -> str | None:
        told = self.state.commit if self.state else None
        return told or self.about.get("commit") or _json(self.folder / "environment.json").get("commit")

    @property
    def has_checkpoint(self) -> bool:
        return any((self.folder / "checkpoints").glob("*.ckpt"))

    def status(self, now: float) -> str:
        """As RunState.seen; of a run from before state.json done or unfinished."""
        if self.state:
            return self.state.seen(now)
        return "done" if self.results else "unfinished"

    def is_written(self, now: float) -> bool:
        """Whether a process may still write it."""
        return self.status(now) == "running" or (self.state is None and now - self.written < LOST)

    def best(self) -> float | None:
        """The best validation in the last stage; of a run from before state.json the evaluation on val."""
        if self.state:
            return self.state.best
        measured = self.measured("val")
        return measured[1]["value"] if measured else None

    def measured(self, split: str) -> tuple[str, Cell] | None:
        """The primary view's main metric on a split, and its cell of results.json; None where it has none."""
        with suppress(KeyError, TypeError, AttributeError, IndexError):  # of another hand
            views = self.results[split]
            view = views[self.about.get("primary") or primary_view(views)]
            metric = main_metric(view)
            return metric, {name: view[metric][name] for name in ("value", "low", "high")}
        return None


def find_runs(root: Path) -> Iterator[FoundRun]:
    """Those below `root`, or `root` itself; each once, under its own name rather than a link's.

    Raises FileNotFoundError where there is no such folder.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}: runs are kept below runs/, or where --runs says")
    seen: set[Path] = set()
    links = [(root, 0)]
    while links:
        place, depth = links.pop(0)
        yield from _below(place, depth, place.is_symlink() and place != root, seen, links)


def _below(
    folder: Path, depth: int, linked: bool, seen: set[Path], links: list[tuple[Path, int]]
) -> Iterator[FoundRun]:
    """Links on the way are left to `links`."""
    if depth > DEPTH or folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    if is_run(folder):
        yield FoundRun(folder, linked)
        return
    with suppress(PermissionError):
        for below in sorted(path for path in folder.iterdir() if path.is_dir()):
            if below.is_symlink():
                links.append((below, depth + 1))
            else:
                yield from _below(below, depth + 1, linked, seen, links)


def is_run(folder: Path) -> bool:
    """Whether the folder's config.yaml is a run's."""
    text = _text(folder / CONFIG)
    return all(re.search(rf"^{name}:", text, re.MULTILINE) for name in OPTIONS)


def run_of(folder: Path) -> FoundRun:
    """Raises ValueError for a folder that is no run's."""
    if not is_run(folder):
        raise ValueError(f"RUN={folder} is no run: expected a folder runs/<exp>/<version> with the {CONFIG} of a run")
    return FoundRun(folder)


def _text(path: Path) -> str:
    """Empty where there is none that can be read."""
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8")
    return ""


def _json(path: Path) -> Mapping[str, Any]:
    with suppress(ValueError):
        content = json.loads(_text(path))
        return content if isinstance(content, dict) else {}
    return {}
