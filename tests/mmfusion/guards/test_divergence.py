"""A bit of drift between ranks stops a run at the next proof, on all ranks, with the parameter's name."""

from pathlib import Path

import pyarrow.dataset  # noqa: F401  (reading a table imports it: now in the fork server, not in each process)
import pytest
import torch
from lightning import Callback

import mmfusion.encoders.timm_model  # noqa: F401  (and small_module)
from mmfusion.guards import divergence
from mmfusion.guards.divergence import RanksAgree
from mmfusion.guards.error import GuardError
from mmfusion.stages import LossWeights, Stage, Until
from tests.ddp import run_ranks
from tests.small_run import small_data, small_module, small_shards, small_trainer

DRIFTED = "product.text.projection.network.weight"


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


class Slip(Callback):
    """One bit of one weight of rank 1, in the third step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2 and trainer.global_rank == 1:
            with torch.no_grad():
                weight = dict(pl_module.named_parameters())[DRIFTED].view(-1)
                weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))


def drifting(rank: int, world: int, shards: Path, folder: Path, every: int) -> tuple[str, int]:
    stages = {"all": Stage(Until(fraction=1.0), LossWeights(query_text=1.0))}
    trainer = small_trainer(folder, RanksAgree(every), Slip(), devices=world, strategy="ddp", steps=8)
    with pytest.raises(GuardError) as error:
        trainer.fit(small_module(stages=stages), small_data(shards))
    return str(error.value), trainer.global_step


@pytest.mark.parametrize(("every", "found_at"), [(4, 4), (100, 8)], ids=["by the guard", "at the end, without it"])
def test_drift_stops_every_rank(shards, tmp_path, every, found_at):
    (said, step), other = run_ranks(drifting, 2, shards, tmp_path, every)
    assert (said, step) == other
    assert step == found_at
    where = "after step 4" if every == 4 else "at the end of training"
    assert said.startswith(f"ranks hold different weights {where}: ")
    assert DRIFTED in said or "parameters, first" in said
    assert "ranks [1] of 2 differ from rank 0" in said
    assert "go on from an earlier one" in said


def steps_proved(rank: int, world: int, shards: Path, folder: Path) -> list[str]:
    proved = []
    found = divergence.check_ranks_agree

    def noted(module, where, trained_only=False):
        proved.append(where)
        assert trained_only
        found(module, where, trained_only)

    divergence.check_ranks_agree = noted
    trainer = small_trainer(folder, RanksAgree(2), devices=world, strategy="ddp", steps=6, accumulate_grad_batches=2)
    trainer.fit(small_module(), small_data(shards))
    return proved


def test_ranks_that_agree_go_on_and_accumulated_batches_are_one_step(shards, tmp_path):
    for proved in run_ranks(steps_proved, 2, shards, tmp_path):
        assert proved == ["after step 2", "after step 4", "after step 6"]
