"""Folders as runs leave them, without training."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from mmfusion.runs.found import CONFIG
from mmfusion.state import RunState

CONTENT = "seed_everything: 1\ntrainer:\n  devices: 1\nmodel:\n  dim: 8\ndata:\n  init_args:\n    path: {data}\n"
NDCG, COMMIT = "relevance/ndcg@10", "0123456789abcdef+"


def draw_run(
    folder: Path, status: Any = "done", hours: float = 1.0, checkpoints: bool = True, test: float | None = 0.5,
    branched_from: str | None = None, data: str = "data/demo", **state: Any,
) -> Path:  # fmt: skip
    """status: None draws a run from before state.json. hours: since it was last written. test: None: no results."""
    written = time.time() - 3600 * hours
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(CONTENT.format(data=data) + f"experiment: {folder.parent.name}\n")
    if checkpoints:
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "last.ckpt").write_bytes(b"0" * 1000)
        os.link(folder / "checkpoints" / "last.ckpt", folder / "checkpoints" / "before.ckpt")
    if test is not None:
        cells = {"relevance/mrr": {"value": 0.1}, NDCG: {"value": test, "low": test - 0.1, "high": test + 0.1}}
        about = {"primary": "fused", "commit": COMMIT, "folder": str(folder.resolve())}
        about |= {"branched_from": branched_from} if branched_from else {}
        views = {"text": {NDCG: {"value": 0.9}}, "fused": cells}
        (folder / "results.json").write_text(json.dumps({"val": views, "test": views, "run": about}))
    if status is not None:
        told = {
            "status": status, "stage": "fuse", "step": 7, "steps": 10, "best": 0.25, "started": written - 60,
            "updated": written, "host": socket.gethostname(), "pid": os.getpid(), "job": None, "commit": COMMIT,
            "message": None,
        }  # fmt: skip
        RunState(**{**told, **state}).write(folder)
    for path in folder.rglob("*"):
        os.utime(path, (written, written))
    return folder
