"""A run without training, for tests of who runs when: the options, files, signals and exit codes of the real one.

What it leaves is held against a real run in test_study_runs.py. Options that it does not know are refused.
`--act.WHAT=VALUE` among its options: crash=start|end (after the last stage), seconds=S (between any two stages),
hold=PATH (no stage before that file is gone), deaf=true (Ctrl-C is ignored), say=TEXT (before a crash), bar=TEXT. Each
writes what it was given, and when it began and ended, to acted.jsonl beside the study.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def given(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises ValueError for what it does not know."""
    parser = Parser(allow_abbrev=False)
    for name in ("exp", "encoders", "data", "experiment", "runs", "seed_everything"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("resume", "branch", "checkpoint_stages", "trainer.callbacks+", "model.dim", "x", "y"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--act.crash", dest="crash")
    parser.add_argument("--act.seconds", dest="seconds", type=float, default=0.0)
    parser.add_argument("--act.hold", dest="hold")
    parser.add_argument("--act.deaf", dest="deaf")
    parser.add_argument("--act.bar", dest="bar", default="")
    parser.add_argument("--act.say", dest="say", default="error: it fell over")
    return parser.parse_args(arguments)


def main() -> None:
    options = given(sys.argv[1:])
    if options.deaf:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    version = os.environ["MMFUSION_VERSION"]
    run = Path(options.resume).parents[1] if options.resume else Path(options.runs) / options.experiment / version
    assert not (run / "config.yaml").exists() or options.resume, f"{run} holds a run"
    assert run == Path(options.runs, options.experiment, version)
    assert not options.branch or Path(options.branch).is_file(), "no such checkpoint"
    note(
        options, event="begins", name=f"{options.experiment}/{version}", pid=os.getpid(), **how(options),
        threads=os.environ["OMP_NUM_THREADS"], gpus=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )  # fmt: skip
    if options.crash == "start":
        print(f"a first line\n{options.say}", flush=True)
        sys.exit(3)
    print(options.bar, end="\r", flush=True)
    act(run, options)
    note(options, event="ends", name=f"{options.experiment}/{version}")


def how(options: argparse.Namespace) -> dict[str, str | None]:
    return {name: getattr(options, name) for name in ("resume", "branch", "checkpoint_stages")}


def note(options: argparse.Namespace, **line: object) -> None:
    with Path(options.runs, "acted.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.time(), **line}) + "\n")


def act(run: Path, options: argparse.Namespace) -> None:
    checkpoints = run / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text("{}")
    while options.hold and Path(options.hold).exists():
        time.sleep(0.02)
    time.sleep(options.seconds)
    for stage in (options.checkpoint_stages or "[]").strip("[]").split(","):
        if stage:
            (checkpoints / f"stage-{stage}.ckpt").touch()
            (checkpoints / "last.ckpt").touch()
            time.sleep(options.seconds)
    (checkpoints / "last.ckpt").touch()
    time.sleep(options.seconds)
    if options.crash == "end":
        os.abort()
    (run / "per_query.parquet").touch()
    cell = {"relevance/ndcg@10": {"value": 0.5, "low": 0.4, "high": 0.6}}
    (run / "results.json").write_text(json.dumps({"val": {"fused": cell}, "run": {}}))


if __name__ == "__main__":
    main()
