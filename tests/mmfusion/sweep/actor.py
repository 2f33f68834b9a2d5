"""A trial without training, for tests of who runs when: the options, files and exit codes of the real one.

It reaches .9 - (x - .3)^2 at --x, on the way there a third and two thirds of it. `--act.WHAT=VALUE` among its options:
seconds=S (between two validations), hold=PATH (no end before that file is gone), crash_above=X, deaf=true, leave=PATH
(once, where that file is: as a run that is preempted). Each writes what it was given, and when it began and ended, to
acted.jsonl beside the trials. What it leaves is held against a real run in test_sweep_runs.py.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VALIDATIONS = (10, 20, 30)  # steps
OPTIONS = {
    "seed_everything": 1, "trainer": {}, "data": {},
    "model": {
        "groups": {}, "modalities": ["text", "image"], "evaluation": {},
        "stages": {name: {"until": {"epochs": 1}, "losses": {}} for name in ("adapt", "align", "fuse")},
    },
}  # fmt: skip
STATE = {
    "status": "running", "stage": "fuse", "step": 0, "steps": 30, "started": 0.0, "updated": 0.0, "host": "here",
    "job": None, "commit": None, "message": None,
}  # fmt: skip


def given(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises ValueError for what it does not know."""
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    for name in ("exp", "encoders", "data", "experiment", "runs", "seed_everything"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("resume", "branch", "checkpoint_stages", "trainer.callbacks+", "data.test_splits", "kind"):
        parser.add_argument(f"--{name}")
    for name in ("x", "y", "act.seconds", "act.crash_above"):
        parser.add_argument(f"--{name}", dest=name.removeprefix("act."), type=float)
    for name in ("act.hold", "act.deaf", "act.leave"):
        parser.add_argument(f"--{name}", dest=name.removeprefix("act."))
    try:
        known, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if unknown:
        raise ValueError(f"unrecognized arguments: {' '.join(unknown)}")
    return known


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """The options of a run of which nothing that it shares with others was given."""
    given(arguments)
    return OPTIONS


def note(options: argparse.Namespace, **line: object) -> None:
    with Path(options.runs, "acted.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.time(), **line}) + "\n")


def main() -> None:
    options = given(sys.argv[1:])
    if options.deaf:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = Path(options.runs, options.experiment, os.environ["MMFUSION_VERSION"])
    assert not (run / "config.yaml").exists() or options.resume, f"{run} holds a run"
    about = {"name": f"{options.experiment}/{run.name}", "pid": os.getpid(), "x": options.x, "branch": options.branch}
    told = {"gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "rank": os.environ.get("SLURM_PROCID")}
    note(options, event="begins", resume=options.resume, **told, **about)
    if options.crash_above is not None and options.x is not None and options.x > options.crash_above:
        print("error: it fell over", flush=True)
        sys.exit(3)
    if options.leave and Path(options.leave).exists():
        Path(options.leave).unlink()
        sys.exit(75)
    checkpoints = run / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(
        json.dumps({"model": {"fusion": options.kind}, "data": {"init_args": {"path": "d"}}})
    )
    if options.checkpoint_stages:
        time.sleep(options.seconds or 0)
        (checkpoints / f"stage-{options.checkpoint_stages.strip('[]')}.ckpt").touch()
        time.sleep(60)
    value = 0.9 - ((options.x or 0.0) - 0.3) ** 2
    with (run / "metrics.csv").open("a") as file:
        print("epoch,step,train/loss,val/primary", file=file, flush=True)
        for place, step in enumerate(VALIDATIONS, 1):
            print(f"0,{step - 1},1.0,\n0,{step},,{value * place / len(VALIDATIONS)}", file=file, flush=True)
            (checkpoints / "last.ckpt").touch()
            (run / "state.json").write_text(json.dumps(STATE | {"pid": os.getpid(), "best": value}))
            time.sleep(options.seconds or 0)
    while options.hold and Path(options.hold).exists():
        time.sleep(0.02)
    (run / "per_query.parquet").touch()
    cell = {"relevance/ndcg@10": {"value": value, "low": value - 0.02, "high": value + 0.02}}
    (run / "results.json").write_text(json.dumps({"val": {"fused": cell}, "run": {"primary": "fused"}}))
    note(options, event="ends", **about)


if __name__ == "__main__":
    main()
