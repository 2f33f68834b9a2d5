"""Chaos: two ranks that are killed again and again, and go on with --resume=auto, end as those that were not.

    make bench-chaos [ARGS="--kills 20 --seed 1 --folder /tmp/chaos"]

`mmfusion train` on a catalogue of 64 products, with dropout, augmentation, modality dropout, averaged weights, the
feature cache, validations and an evaluation; ranks are forks of the server in tests/ddp.py. A third of the kills falls
within the saving of a checkpoint (between two writes or two changes of names), a third within a switch of stages, the
rest anywhere, from the start to what follows the last step. SIGKILL hits both ranks or one alone; the other must end by
itself. Some kills take half of last.ckpt with them, as a power cut may. Weights, averages, optimizer, best checkpoint,
the loss and samples of each step on each rank, validations and test metrics must be those of the straight run, bit for
bit; else the exit code is 1, as where a rank hangs or a moment is missed.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._pytree import keystr, tree_flatten_with_path

from mmfusion.checkpoints import BEFORE, BEST, LAST
from tests.chaos.moments import KINDS, MOST, Moment, drawn
from tests.chaos.rank import MISSED, PATIENCE, RANKS, train
from tests.ddp import fork_server
from tests.small_run import small_shards

ROOT, RUN = Path(__file__).parents[2], Path("runs/fusion_gated/job-chaos")
LEFT_OUT = ("callbacks", "loops")  # hold paths, and Lightning's counts of what was restarted
HERE = {"launched": "start", "began": "start", "validating": "in the validation", "testing": "in the evaluation"}


def diary(folder: Path, attempt: int, rank: int = 0) -> list[dict[str, Any]]:
    path = folder / f"diary-{attempt}-{rank}"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def attempt(folder: Path, shards: Path, number: int, moment: Moment | None, straight: Path) -> tuple[str, str]:
    """An attempt until its moment, or to its end; returns where it fell, and what became of each rank.

    Raises AssertionError for a rank that hangs, or that ends otherwise than it should.
    """
    place, delay = moment.place(diary(straight, 0)) if moment else (0, 0.0)
    victims = moment.victims if moment else ()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = [(rank, folder, shards, number, moment, place, port) for rank in range(RANKS)]
    ranks = [fork_server().Process(target=train, args=args) for args in told]
    try:
        for process in ranks:
            process.start()
        while moment and not moment.has_come(diary(folder, number)):
            assert all(process.is_alive() for process in ranks), f"attempt {number} ended before {moment}"
            time.sleep(0.005)
        time.sleep(delay)
        for rank in victims:
            os.killpg(ranks[rank].pid, signal.SIGKILL)
        where, struck = fell(folder, number) if moment else "", time.monotonic()
        assert moment is None or moment.kind == "anywhere" or not where.endswith(MISSED), f"{moment} was missed"
        (folder / f"go-{number}").touch()
        return where, ", ".join(_end(rank, process, moment, struck) for rank, process in enumerate(ranks))
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _end(rank: int, process: ForkServerProcess, moment: Moment | None, struck: float) -> str:
    process.join(PATIENCE if moment else None)
    code = process.exitcode
    assert code is not None, f"rank {rank} hangs, {PATIENCE:.0f} s after {moment}"
    if moment is None:
        assert code == 0, f"rank {rank} ended with exit code {code}: see the log of the last attempt"
        return "done"
    if rank in moment.victims:
        assert code == -signal.SIGKILL, f"rank {rank} ended with exit code {code} before {moment}"
        return "killed"
    assert code > 0, f"rank {rank} ended with exit code {code}, though the other was killed: {moment}"
    return f"ends in {time.monotonic() - struck:.1f} s ({code})"


def fell(folder: Path, number: int) -> str:
    """Where rank 0 was, as far as it had said."""
    lines = diary(folder, number)
    made = [
        f"{line.get('stage', 'begun')}, {line.get('step', line.get('began'))}: "
        for line in lines
        if {"step", "began"} & {*line}
    ]
    (key, value), *_ = lines[-1].items()
    return "".join(made[-1:]) + (str(value) if key in ("at", "event") else HERE.get(key, "then"))


def differences(folder: Path, straight: Path, attempts: int) -> tuple[list[str], int]:
    """What is not as in the straight run, and how much was compared."""
    found, compared = [], 2
    for name in (LAST, BEST):
        got, expected = (_leaves(path / RUN / "checkpoints" / name) for path in (folder, straight))
        found += [f"{name}{key}" for key in got | expected if not _same(got.get(key), expected.get(key))]
        compared += len(expected)
    for rank in range(RANKS):
        got, expected = _said(folder, attempts, rank), _said(straight, 1, rank)
        found += [f"rank {rank}: {key}" for key in got | expected if got.get(key) != expected.get(key)]
        compared += len(got)
    results = [json.loads((path / RUN / "results.json").read_text()) for path in (folder, straight)]
    return found + [split for split in ("val", "test") if results[0][split] != results[1][split]], compared


def _leaves(path: Path) -> dict[str, Any]:
    checkpoint = torch.load(path, weights_only=True)
    kept = {part: value for part, value in checkpoint.items() if part not in LEFT_OUT}
    return {keystr(key): leaf for key, leaf in tree_flatten_with_path(kept)[0]}


def _same(got: Any, expected: Any) -> bool:
    if isinstance(got, torch.Tensor) and isinstance(expected, torch.Tensor):
        return got.dtype == expected.dtype and torch.equal(got, expected)
    return type(got) is type(expected) and got == expected


def _said(folder: Path, attempts: int, rank: int) -> dict[str, set[str]]:
    """By step or validation, all that was ever said of it: one thing, though it was made several times."""
    said: dict[str, set[str]] = {}
    for line in (line for number in range(attempts) for line in diary(folder, number, rank)):
        for key in ("step", "validated"):
            if key in line:
                content = [line.get(part) for part in ("stage", "loss", "ids", "primary")]
                said.setdefault(f"{key} {line[key]}", set()).add(str(content))
    return said


def chaos(folder: Path, kills: int, seed: int, console: Console) -> list[str]:
    """Differences; prints the table."""
    began, moments = time.monotonic(), drawn(kills, seed)
    shards, straight, killed = small_shards(folder), folder / "straight", folder / "killed"
    for path in (straight, killed):
        path.mkdir()
        (path / "experiments").symlink_to(ROOT / "experiments")
    attempt(straight, shards, 0, None, straight)
    table = Table(
        "minute", "", "moment", "stage and step", "ranks", "workers", "halved", "began at", title=f"seed {seed}"
    )
    checkpoints, halved = killed / RUN / "checkpoints", 0
    for number, moment in enumerate([*moments, None]):
        where, ends = attempt(killed, shards, number, moment, straight)
        if moment is None:
            break
        if is_halved := moment.halved and (checkpoints / BEFORE).exists():
            os.truncate(checkpoints / LAST, (checkpoints / LAST).stat().st_size // 2)
            halved += 1
        start = next((str(line["began"]) for line in diary(killed, number) if "began" in line), "")
        row = [f"{(time.monotonic() - began) / 60:.1f}", str(number + 1), moment.kind, where, ends]
        row += [str(moment.workers), LAST if is_halved else "", start]
        table.add_row(*row)
        console.print(*row, sep=" | ", highlight=False)
    logs = [(killed / f"log-{number}-0").read_text() for number in range(kills + 1)]
    left_out, resumes = (sum(words in log for log in logs) for words in ("is left out", "goes on from"))
    assert left_out == halved, f"{left_out} checkpoints were left out, {halved} were halved"
    found, compared = differences(killed, straight, kills + 1)
    alone = sum(len(moment.victims) == 1 for moment in moments)
    each = ", ".join(f"{sum(moment.kind == kind for moment in moments)} {kind}" for kind in KINDS)
    console.print(table)
    console.print(
        f"{kills} kills ({each}; {alone} of one rank), {resumes} resumes, {left_out} checkpoints left out, "
        f"{len(found)} differences of {compared}, {(time.monotonic() - began) / 60:.1f} minutes",
        *found[:40], sep="\n", highlight=False,
    )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="new, and kept; without, a temporary one that failures keep")
    options = parser.parse_args()
    if not 1 <= options.kills <= MOST:
        parser.error(f"--kills={options.kills}: expected 1 to {MOST}")
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="mmfusion-chaos-"))).absolute()
    console = Console(width=None if os.isatty(1) else 150)
    console.print(f"diaries, logs and runs: {folder}", highlight=False)
    found = chaos(folder, options.kills, options.seed, console)
    if options.folder is None and not found:
        shutil.rmtree(folder)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
