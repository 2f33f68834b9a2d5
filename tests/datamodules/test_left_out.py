"""A trainer's stages without content: the same tuples with accumulation, on ranks, and resumed anywhere."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from datamodules.tuples import TupleDataModule
from mmfusion.batch import Known, ProductBatch, QueryBatch, TupleBatch
from tests.datamodules.drawn import SIZE, Tables, draw_shards
from tests.datamodules.test_tuples import Recorder, SaveEverywhere, trainer
from tests.ddp import run_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]
ENDS = {2: 4, 7: 100}  # optimizer steps at which a stage without content begins, and ends


class Staged(Recorder):
    """Leaves content out stage by stage; each tuple as `tuples_of` has it, and whether it has content."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[tuple[int, bool]] = []
        self.until, self.known = -1, None

    def on_train_batch_start(self, batch: TupleBatch, batch_idx: int) -> None:
        data, step = self.trainer.datamodule, self.trainer.global_step  # type: ignore[attr-defined]
        if self.known is None:
            batches = list(data.product_batches(np.arange(len(data.shards))))
            self.known = Known(torch.cat([b.present for b in batches]), torch.cat([b.valid for b in batches]))
        until = next((end for begin, end in ENDS.items() if begin <= step < end), 0)
        if until != self.until:
            data.leave_out(self.known if until else None, until)
            data.leave_out_of_evaluation(self.known if until else None)
            self.until = until

    def training_step(self, batch: TupleBatch, batch_idx: int) -> torch.Tensor:
        self.shown.append((self.trainer.global_step, batch.product.shown))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: QueryBatch | ProductBatch, batch_idx: int, dataloader_idx: int) -> None:
        super().validation_step(batch, batch_idx, dataloader_idx)
        if isinstance(batch, ProductBatch) and self.until >= 0:
            assert batch.shown == (self.until == 0)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    return draw_shards(tmp_path_factory.mktemp("catalogue"))


def fit(
    path: Path,
    callbacks: list[Callback],
    world: int,
    limits: dict[str, Any],
    ckpt: Path | None,
    options: dict[str, Any],
) -> Staged:
    recorder = Staged()
    data = TupleDataModule(str(path), batch_size=16, image_size=SIZE, eval_batch_size=16, hard_negatives=1, **options)
    trainer(callbacks, world, **{"max_epochs": 3, **limits}).fit(recorder, data, ckpt_path=ckpt, weights_only=True)
    return recorder


def straight(tables: Tables, limits: dict[str, Any]) -> list[Any]:
    """Of a recorder that leaves nothing out."""
    recorder = Recorder()
    data = TupleDataModule(str(tables.path), batch_size=16, image_size=SIZE, eval_batch_size=16, hard_negatives=1)
    trainer([], **{"max_epochs": 3, **limits}).fit(recorder, data)
    return recorder.seen


def check(shown: list[tuple[int, bool]], accumulated: int, exactly: bool) -> None:
    """A step of a stage that needs content has it; `exactly`: one that needs none lacks it, but for the stage's first
    batch, which is made before the stage begins. Workers are asked for some more before."""
    steps = sorted({step for step, _ in shown})
    assert len(steps) > 7 // accumulated
    for number, (step, has) in enumerate(shown):
        begins = not number or (step in ENDS and shown[number - 1][0] < step)
        free = any(begin <= step < end for begin, end in ENDS.items())
        assert has or free, step
        if exactly:
            assert has == (not free or begins), step


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limits", [{}, {"accumulate_grad_batches": 2}], ids=str)
def test_a_run_sees_the_same_tuples(tables: Tables, tmp_path: Path, limits: dict[str, Any], workers: int) -> None:
    options = {"workers": workers}
    whole = straight(tables, limits)
    run = fit(tables.path, [SaveEverywhere(tmp_path)], 1, limits, None, options)
    each = limits.get("accumulate_grad_batches", 1)
    assert run.seen == whole
    assert not all(has for _, has in run.shown)
    check(run.shown, each, exactly=not workers)
    for name in ("002-batch", "003-batch", "005-batch"):  # the last checkpoint of so many optimizer steps
        done = max(i for i, (step, _) in enumerate(run.shown) if step < int(name[:3])) + 1
        again = fit(tables.path, [], 1, limits, tmp_path / f"{name}.ckpt", options)
        assert again.seen in (whole[done:], whole[done + 1 :])
        check(again.shown, each, exactly=not workers)


def _rank(rank: int, world: int, path: Path) -> tuple[list[Any], list[tuple[int, bool]]]:
    run = fit(path, [], world, {"accumulate_grad_batches": 2}, None, {"workers": 1})
    return run.seen, run.shown


def test_ranks_see_the_same_tuples(tables: Tables) -> None:
    whole = straight(tables, {"accumulate_grad_batches": 2})
    (first, shown), (second, shown_too) = run_ranks(_rank, 2, tables.path)
    assert [(*a[:2], a[2] + b[2]) for a, b in zip(first, second, strict=True)] == whole
    check(shown, 2, exactly=False)
    assert [step for step, _ in shown] == [step for step, _ in shown_too]
