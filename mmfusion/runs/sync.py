"""`make sync`: what runs logged for W&B without a network goes there, the parts of a resumed run one after the other.

W&B's own `wandb sync` sends a part and marks it (*.wandb.synced). It goes on with the run that the server holds, so a
part that comes late would follow what came after it.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmfusion.loggers import has_key, server
from mmfusion.runs.found import FoundRun, find_runs, run_of

ANSWER = 15.0  # seconds that the server may take to say anything
QUIET = 10.0  # seconds that W&B's process may take to write the end of a part once the run has told of its own
CUT_SHORT = "the file ends with an incomplete record"  # of W&B's, wandb 0.31
PART = re.compile(r"(?:offline-)?run-(\d{8}_\d{6})-(.+)")  # a part's folder: its start and the run's id


@dataclass(frozen=True)
class Part:
    """What one process logged. id: of the W&B run that it belongs to."""

    file: Path
    id: str

    @property
    def mark(self) -> Path:
        return self.file.with_suffix(".wandb.synced")

    @property
    def is_sent(self) -> bool:
        return self.mark.exists()


@dataclass(frozen=True)
class Log:
    """A run of W&B in its folder `place`, of a training or an evaluation. parts: in order of their start."""

    place: Path
    parts: tuple[Part, ...]

    @property
    def unsent(self) -> list[Part]:
        return [part for part in self.parts if not part.is_sent]

    @property
    def is_quiet(self) -> bool:
        return all(time.time() - part.file.stat().st_mtime > QUIET for part in self.parts)


def logs_of(run: Path) -> Iterator[Log]:
    """A run that was moved and resumed has parts of two ids: all go to that of the first, online or not."""
    for place in sorted([run, *(run / "eval").glob("*")]):
        found = {folder: PART.fullmatch(folder.name) for folder in (place / "wandb").glob("*run-*")}
        parts = sorted((match[1], folder, match[2]) for folder, match in found.items() if match)
        offline = (folder for _, folder, _ in parts if folder.name.startswith("offline-"))
        files = [file for folder in offline for file in folder.glob("*.wandb")]
        if files:
            yield Log(place, tuple(Part(file, parts[0][2]) for file in files))


def sync(root: Path, run: Path | None) -> None:
    """Sends what has not been sent of `run`, or of all runs below `root`; exit code 1 where some of it could not be.

    Raises ValueError where there is something to send and no key, or no server, and for a folder that is no run's.
    """
    runs = [run_of(run)] if run else sorted(find_runs(root), key=lambda found: found.written)
    logs = [log for found in runs for log in _to_send(found)]
    if not logs:
        print("there is nothing to send to W&B now")
        return
    if not has_key():
        raise ValueError(
            "there is no key for W&B: set WANDB_API_KEY, or type `.venv/bin/wandb login` once; for a server of your "
            "own WANDB_BASE_URL too"
        )
    _refuse_silence()
    if failed := [log for log in logs if not _send(log)]:
        print(f"error: {len(failed)} of {len(logs)} could not be sent; the same command tries again", file=sys.stderr)
        sys.exit(1)


def _refuse_silence() -> None:
    """Raises ValueError where the server does not answer, for which `wandb sync` would wait for hours."""
    try:
        urllib.request.urlopen(server(), timeout=ANSWER).close()
    except urllib.error.HTTPError:
        return  # an answer
    except OSError as error:
        why = getattr(error, "reason", error)
        raise ValueError(f"{server()} does not answer ({why}): sync from a machine that reaches it") from None


def _to_send(run: FoundRun) -> Iterator[Log]:
    """Says of each log how much there is."""
    for log in logs_of(run.folder):
        if not log.unsent:
            continue
        if run.is_written(time.time()) or not log.is_quiet:
            print(f"{log.place}: left out, it is being written")
            continue
        sent = len(log.parts) - len(log.unsent)
        parts = f"{len(log.unsent)} part{'s'[: len(log.unsent) != 1]} to send"
        print(f"{log.place}: {parts}" + (f", {sent} sent before" if sent else ""))
        yield log


def _send(log: Log) -> bool:
    """Part by part, until one cannot be sent: whether all were."""
    for part in log.unsent:
        print(f"{part.file.parent} ...", flush=True)
        said = _wandb_sync(part)
        if CUT_SHORT in " ".join(said):  # by a kill: the rest was sent, and would be again with the next command
            print("  its last record is not whole, as the run was killed: sent without")
            part.mark.touch()
        if not part.is_sent:  # its exit code is 0 whatever happens
            print("\n".join(["W&B did not take it:", *(f"  {line}" for line in said[-5:])]), file=sys.stderr)
            return False
        address = re.search(r" at (https?://\S+)", "\n".join(said))
        print(f"  sent{f' to {address[1]}' if address else ''}", flush=True)
    return True


def _wandb_sync(part: Part) -> Sequence[str]:
    """What it said. Of the environment all but WANDB_MODE counts: that may be why the part was written offline."""
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
    with tempfile.TemporaryDirectory() as folder:  # it writes a log of its own into wandb/ of where it is
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "sync", "--id", part.id, str(part.file.parent.resolve())], check=False,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=folder, env=environment,
        )  # fmt: skip
    return [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
