"""Who needs a run: other runs, pages, studies and tables of mined negatives name it as <experiment>/<version>."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from mmfusion.runs.found import FoundRun

TELLING = {"config.yaml", "environment.json", "results.json", "jobs.json", "study.json", "manifest.json"}
OWN_PAGE = "report.html"  # tells of its own run alone
CHECKPOINTS = ("last.ckpt", "best.ckpt")


def references(root: Path, runs: Sequence[FoundRun]) -> dict[Path, str]:
    """By the folder of a run that something else needs, what that is: the first that was found.

    Runs of studies and sweeps are not looked for. A name that stands somewhere by accident keeps a run, too.
    """
    named = defaultdict(list)
    for run in runs:
        if run.family is None:
            named[_name(run.folder)].append(run.folder)
    # longest first: 1-2 is not 1
    either = "|".join(map(re.escape, sorted(named, key=len, reverse=True)))
    anywhere = re.compile(rf"(?<![\w.-])({either})(?![\w-])")
    found: dict[Path, str] = {}
    for place, text in _told(root, runs):
        for name in dict.fromkeys(anywhere.findall(text)) if named else ():
            for folder in named[name]:
                if folder not in (place, *place.parents):
                    found.setdefault(folder, str(place))
    for link in _links(root):
        target, place = link.resolve(), link.parent.resolve() / link.name
        for run in runs:
            folder = run.folder.resolve()
            if folder in (target, *target.parents) and folder not in place.parents:
                found.setdefault(run.folder, f"the link {link}")
    return found


def _name(folder: Path) -> str:
    resolved = folder.resolve()
    return f"{resolved.parent.name}/{resolved.name}"


def _told(root: Path, runs: Sequence[FoundRun]) -> Iterator[tuple[Path, str]]:
    """Files and what they say."""
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in ("wandb", "checkpoints")]
        for name in files:
            if name in TELLING or (name.endswith(".html") and name != OWN_PAGE):
                yield from _text(Path(folder, name))
    for manifest in sorted({path / "manifest.json" for run in runs for path in _data_of(run)}):
        yield from _text(manifest)
    for run in runs:
        if not run.results and (since := _branched_from(run.folder)):
            yield run.folder / "checkpoints", since


def _text(path: Path) -> Iterator[tuple[Path, str]]:
    with suppress(OSError):
        yield path, path.read_text(encoding="utf-8", errors="replace")


def _data_of(run: FoundRun) -> Iterator[Path]:
    """The folders that it may have been trained on; addresses have none."""
    with suppress(OSError):
        text = (run.folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
        yield from (Path(path.strip("'\"")) for path in re.findall(r"^ +path: *(\S.*?) *$", text, re.MULTILINE))
    if isinstance(data := run.about.get("data"), str):
        yield Path(data)


def _branched_from(run: Path) -> str | None:
    """Of a run that is not done; its results tell it afterwards."""
    import torch  # noqa: PLC0415  (seconds, and only runs that are not done need it)

    for name in CHECKPOINTS:
        with suppress(Exception):  # a damaged file is for RESUME=auto to tell of
            content = torch.load(run / "checkpoints" / name, map_location="cpu", weights_only=True, mmap=True)
            return content.get("branched_from")
    return None


def _links(root: Path) -> Iterator[Path]:
    """Symbolic links below `root`, those apart with which W&B marks its latest part."""
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name != "wandb"]
        yield from (path for name in (*below, *files) if (path := Path(folder, name)).is_symlink())
