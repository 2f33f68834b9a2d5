"""Twenty steps through all stages on the small catalogue: a refactoring must not move the curve.

Where a change is meant to move it, write it anew and say why in the commit: python -m tests.test_golden
"""

import json
import tempfile
from pathlib import Path

import pytest
from lightning import Callback

from tests.small_run import small_data, small_module, small_shards, small_trainer, three_stages

GOLDEN = Path(__file__).parent / "golden" / "curve.json"


class Curve(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(round(float(outputs["loss"]), 6))


def curve(folder: Path) -> list[float]:
    """Losses of 20 steps, with dropout, augmentation and modality dropout at work."""
    module = small_module(dropout=0.1, augment="light", modality_dropout=0.2, stages=three_stages(8, 12))
    losses = Curve()
    small_trainer(folder, losses, steps=20).fit(module, small_data(small_shards(folder)))
    return losses.losses


def test_the_golden_curve(tmp_path):
    assert curve(tmp_path) == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(curve(Path(folder))) + "\n")
