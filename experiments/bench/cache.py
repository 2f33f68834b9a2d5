"""Samples per second of a stage with frozen encoders: read from the feature cache, and with every encoder at work.

    make bench-cache [ARGS="--data data/fashion --encoders minilm --batches 256 1024 --folder /tmp/cache --profile"]

Each row is a run of its own of EXP=fusion_moe, with all encoders frozen and the losses of the stage `fuse`, as users
start it: loader, towers, head, losses, optimizer and metrics.csv; neither validation nor checkpoint. The cache is
filled first, outside the time. "Encoding" is the same run with model.cache.use=off and model.memo_gib=0, so that each
step reads, decodes and encodes what it trains on. The clock runs from the end of the first steps (of which each row
has its own number) to that of the last; the median of REPEATS runs counts. The clock is never a test: a row below the
goal says so and the exit code stays 0.
"""

import argparse
import cProfile
import os
import pstats
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning import Callback
from measured import console, said
from rich.table import Table

Found = Sequence[tuple[int, dict[str, list[np.ndarray]]]]
REPEATS, GOAL = 3, 50  # times the samples per second of encoding
STEPS = {"cached": (50, 200), "encoding": (2, 6)}  # not timed, timed
OPTIONS = {"cached": [], "encoding": ["--model.cache.use=off", "--model.memo_gib=0"]}
FUSE = {
    "until": {"fraction": 1.0},
    "losses": {"query_product": 1.0, "query_text": 0.2, "query_image": 0.2},
    "rates": {"text_encoder": "frozen", "image_encoder": "frozen"},
}
EXPERIMENTS = Path(__file__).parents[1]


class Clock(Callback):
    """Seconds from the end of step `first` to that of the last, by the clock and of processor; profiles where asked."""

    def __init__(self, first: int, profile: cProfile.Profile | None) -> None:
        self.first, self.profile = first, profile
        self.started = self.ended = np.zeros(2)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.ended = np.array([time.perf_counter(), time.process_time()])
        if trainer.global_step == self.first:
            self.started = self.ended
            if self.profile is not None:
                self.profile.enable()

    def on_train_end(self, *_: Any) -> None:
        if self.profile is not None:
            self.profile.disable()


def run(kind: str, batch: int, options: Namespace, profile: cProfile.Profile | None = None) -> np.ndarray:
    """Samples per second by the clock, and per second of processor (of this process; readers are threads of none)."""
    from mmfusion.run import FusionCLI  # noqa: PLC0415 (after the number of threads is set)

    first, timed = STEPS[kind]
    clock = Clock(first, profile)
    with tempfile.TemporaryDirectory() as folder:
        overlay = Path(folder) / "fuse.yaml"
        overlay.write_text(yaml.safe_dump({"model": {"stages": {"fuse": FUSE}}}), encoding="utf-8")
        files = ["base", f"encoders/{options.encoders}", "fusion_moe"]
        configs = [*(EXPERIMENTS / f"{name}.yaml" for name in files), overlay]
        cli = FusionCLI.parse(
            [
                *(f"--config={path}" for path in configs),
                f"--data.path={options.data}",
                f"--data.batch_size={batch}",
                f"--trainer.max_steps={first + timed}",
                "--trainer.max_epochs=-1",
                "--trainer.check_val_every_n_epoch=1000",
                "--trainer.enable_progress_bar=false",
                "--wandb.mode=disabled",
                f"--model.cache.folder={options.folder}",
                *OPTIONS[kind],
            ],
            Path(folder) / "run",
        )
        cli.trainer.callbacks = [part for part in cli.trainer.callbacks if "Checkpoint" not in type(part).__name__]
        cli.trainer.callbacks.append(clock)
        cli.trainer.fit(cli.model, cli.datamodule)
    return batch * timed / (clock.ended - clock.started)


def measure(options: Namespace) -> Found:
    """By batch and kind, what each repeat gave; kinds take turns, so that what else the machine does hits both."""
    found = []
    for batch in options.batches:
        rates: dict[str, list[np.ndarray]] = {kind: [] for kind in options.kinds}
        for _ in range(options.repeats):
            for kind, of_kind in rates.items():
                of_kind.append(run(kind, batch, options))
                clock, processor = of_kind[-1]
                told = f"{clock:,.0f} samples/s, {processor:,.0f} per second of processor"
                said(f"batch {batch}, {kind}: {told}; load {os.getloadavg()[0]:.1f}")
        found.append((batch, rates))
    return found


def table(found: Found, options: Namespace) -> Table:
    title = f"{options.data}, ENCODERS={options.encoders}, stage fuse of fusion_moe, {torch.get_num_threads()} threads"
    shown = Table(title=title)
    for column in ("batch", "samples per second", "encoding", "cached", "times", f"goal: {GOAL} times"):
        shown.add_column(column, justify="right")
    for batch, rates in found:
        for place, of in enumerate(("by the clock", "of processor")):
            encoding, cached = (
                statistics.median([both[place] for both in rates.get(kind, [])] or [float("nan")])
                for kind in ("encoding", "cached")
            )
            verdict = "[green]PASS[/]" if cached >= GOAL * encoding else "[red]below[/]"
            cells = (f"{encoding:,.1f}", f"{cached:,.0f}", f"{cached / encoding:.0f}", "" if place else verdict)
            shown.add_row(f"{batch:,}", of, *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/fashion")
    parser.add_argument("--encoders", default="minilm")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--kinds", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--steps", type=int, nargs=2, help="of cached runs: not timed, timed")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", default=None, help="of the feature cache; by default the user's")
    parser.add_argument("--profile", action="store_true", help="one more cached run of the first batch, profiled")
    options = parser.parse_args()
    options.folder = options.folder or os.environ.get("MMFUSION_CACHE") or str(Path("~/.cache/mmfusion").expanduser())
    torch.set_num_threads(options.threads)
    STEPS["cached"] = tuple(options.steps or STEPS["cached"])
    console.print(table(measure(options), options))
    if options.profile:
        profile = cProfile.Profile()
        run("cached", options.batches[0], options, profile)
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)


if __name__ == "__main__":
    main()
