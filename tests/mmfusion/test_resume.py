"""A run that goes on from a checkpoint, in any stage, ends where the straight run ends, bit for bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning import Callback

from datamodules.pair_tables import write_pair_table
from mmfusion.contract import contract, refuse_another_run
from mmfusion.optim import Optim
from mmfusion.run import FusionCLI
from tests.ddp import run_ranks
from tests.small_run import small_data, small_module, small_shards, small_trainer, three_stages, weights

STEPS = 8


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


class SaveAt(Callback):
    """Saves a checkpoint after some steps, as a crash would leave it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def straight(shards: Path, folder: Path, **options) -> dict[str, torch.Tensor]:
    module = small_module(dropout=0.1, augment="light", modality_dropout=0.3)
    small_trainer(folder, SaveAt(folder), steps=STEPS, **options).fit(module, small_data(shards))
    return weights(module)


def resumed(shards: Path, folder: Path, step: int, **options) -> dict[str, torch.Tensor]:
    module = small_module(dropout=0.1, augment="light", modality_dropout=0.3)
    trainer = small_trainer(folder, steps=STEPS, **options)
    trainer.fit(module, small_data(shards), ckpt_path=folder / f"{step}.ckpt", weights_only=True)
    return weights(module)


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return folder, straight(shards, folder)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 7])
def test_resumed_in_any_stage_and_on_its_border(run, shards, step):
    folder, expected = run
    got = resumed(shards, folder, step)
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


def test_dropout_and_augmentation_are_at_work(shards, tmp_path, run):
    """Else the test above would prove less than it says."""
    module = small_module()
    small_trainer(tmp_path, steps=STEPS).fit(module, small_data(shards))
    assert any(not torch.equal(weights(module)[name], weight) for name, weight in run[1].items())


def both(rank: int, world: int, shards: Path, folder: Path) -> tuple[dict, dict]:
    options = {"devices": world, "strategy": "ddp"}
    return straight(shards, folder, **options), resumed(shards, folder, 4, **options)


def test_two_ranks_resume_exactly(shards, tmp_path):
    for expected, got in run_ranks(both, 2, shards, tmp_path, timeout=120):
        assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


@pytest.mark.parametrize(
    ("shares", "options", "data", "said"),
    [
        ({"model.dim": 16}, {}, {}, "model.dim: the checkpoint has None, this run 16"),
        ({}, {}, {"batch_size": 8}, "batch_size"),
        ({}, {}, {"seed": 3}, "seed"),
    ],
)
def test_going_on_as_another_run_is_refused(run, shards, shares, options, data, said):
    folder, _ = run
    module = small_module(**options)
    module.contract = shares
    trainer = small_trainer(folder, steps=STEPS)
    with pytest.raises(ValueError, match=said):
        trainer.fit(module, small_data(shards, **data), ckpt_path=folder / "2.ckpt", weights_only=True)
    assert trainer.global_step == 0


# options that came later
LATER = (
    "data.hard_", "data.extra_queries", "data.scores", "model.micro_batch", "hard_up_to", "chunk", ".more",
    "model.ema", "model.optim.layer_decay", "checkpoint_activations", "augment.scale",
)  # fmt: skip


def options_of(shards: Path, *given: str) -> dict:
    """What the command line has a run share with one that goes on from it."""
    files = ("base", "encoders/tiny", "fusion_gated")
    arguments = [*(f"--config=experiments/{name}.yaml" for name in files), f"--data.init_args.path={shards}", *given]
    return contract(yaml.safe_load(FusionCLI.parse(arguments, None).resolved()))


def saved_by(run: tuple, folder: Path, then: dict, keep_later: bool = False) -> Path:
    """A checkpoint of the straight run after 2 steps that holds the options `then`; of those days, without LATER."""
    checkpoint = torch.load(run[0] / "2.ckpt", weights_only=True)
    kept = {key: value for key, value in then.items() if keep_later or not any(part in key for part in LATER)}
    assert keep_later or len(kept) < len(then)
    checkpoint["contract"] |= kept
    for name in () if keep_later else ("hard_negatives", "hard_from", "hard_max_gain", "extra_queries", "pair_tables"):
        del checkpoint["TupleDataModule"][name]
    torch.save(checkpoint, folder / "before.ckpt")
    return folder / "before.ckpt"


NAMED = "--model.losses.query_text={class_path: InfoNCE, init_args: {label: relevance}}"


@pytest.mark.parametrize("given", [[], [NAMED]])
def test_a_checkpoint_of_a_version_before_goes_on_without_what_came_later(run, shards, tmp_path, given):
    now = options_of(shards, *given)
    path = saved_by(run, tmp_path, now)
    module = small_module(dropout=0.1, augment="light", modality_dropout=0.3)
    module.contract = now
    small_trainer(tmp_path, steps=STEPS).fit(module, small_data(shards), ckpt_path=path, weights_only=True)
    assert [name for name, weight in run[1].items() if not torch.equal(weights(module)[name], weight)] == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--data.hard_negatives=2"], "data.hard_negatives: the checkpoint has 0, this run 2"),
        (["--data.extra_queries=8"], "data.extra_queries: the checkpoint has 0, this run 8"),
        (["--model.losses.query_text.hard_up_to=0.1"], "query_text.hard_up_to: the checkpoint has 0.0, this run 0.1"),
        (["--model.ema=0.9"], "model.ema: the checkpoint has None, this run 0.9"),
        (["--model.optim.layer_decay=0.8"], "optim.layer_decay: the checkpoint has 1.0, this run 0.8"),
        (["--model.micro_batch=4"], "model.micro_batch: the checkpoint has None, this run 4"),
        (["--model.losses.more={query_text_x: InfoNCE}"], r"more.query_text_x.class_path: .* has None, this run mmf"),
        (
            ["--model.losses.more={query_text_x: InfoNCE}", "--model.stages.fuse.losses.more={query_text_x: 1.0}"],
            r"stages.fuse.losses.more.query_text_x: .* has None, this run 1.0",
        ),
        (["--data.scores=[teacher]"], r"data.scores: the checkpoint has \[\], this run \['teacher'\]"),
    ],
)
def test_a_checkpoint_of_a_version_before_does_not_go_on_with_what_came_later(run, shards, tmp_path, given, said):
    theirs = torch.load(saved_by(run, tmp_path, options_of(shards, NAMED)), weights_only=True)["contract"]
    with pytest.raises(ValueError, match=said):
        refuse_another_run(options_of(shards, NAMED, *given) | {"manifest": theirs["manifest"]}, theirs)


@pytest.mark.parametrize("chunks", [(None, 8), (8, None), (8, 16)])
def test_a_losss_chunk_may_change(run, shards, tmp_path, chunks):
    """Also on from a checkpoint in whose options it is."""
    before, after = (
        options_of(shards, NAMED, f"--model.losses.query_text.chunk={chunk or 'null'}") for chunk in chunks
    )
    then = before | {"model.losses.query_text.chunk": chunks[0], "model.losses.query_text.loss.chunk": chunks[0]}
    module = small_module(dropout=0.1, augment="light", modality_dropout=0.3)
    module.contract = after
    path = saved_by(run, tmp_path, then, keep_later=True)
    small_trainer(tmp_path, steps=STEPS).fit(module, small_data(shards), ckpt_path=path, weights_only=True)
    assert [name for name, weight in run[1].items() if not torch.equal(weights(module)[name], weight)] == []


def test_another_table_of_negatives_is_refused(tmp_path):
    """The catalogue is the same, and the negatives that training draws are not."""
    shards, folder = small_shards(tmp_path), tmp_path / "run"
    query, product = np.arange(4).repeat(3), np.tile(np.array([1, 2, 3]), 4)
    options = {"hard_negatives": 1, "hard_from": ("mined-1",)}
    for step in (0, 1):
        score = np.full(12, step, np.float32)
        write_pair_table(shards, "mined-1", "negatives", query, product, score, {}, replace=True)
        trainer = small_trainer(folder, SaveAt(folder), steps=STEPS)
        if step == 0:
            trainer.fit(small_module(), small_data(shards, **options))
            small_trainer(folder, steps=STEPS).fit(
                small_module(), small_data(shards, **options), ckpt_path=folder / "2.ckpt", weights_only=True
            )
        else:
            with pytest.raises(ValueError, match=r"data.pairs.mined-1: the checkpoint has \w+, this run \w+"):
                trainer.fit(
                    small_module(), small_data(shards, **options), ckpt_path=folder / "2.ckpt", weights_only=True
                )


def test_another_manifest_is_refused(run, tmp_path):
    folder, _ = run
    other = small_shards(tmp_path, products=128)
    with pytest.raises(ValueError, match="manifest"):
        small_trainer(folder, steps=STEPS).fit(
            small_module(), small_data(other), ckpt_path=folder / "2.ckpt", weights_only=True
        )


def test_an_evaluation_of_a_checkpoint_is_bound_to_nothing(run, tmp_path):
    folder, _ = run
    module = small_module(stages=three_stages(2, 4), optim=Optim(weight_decay=0.3))
    small_trainer(folder).test(
        module, small_data(small_shards(tmp_path, products=128), batch_size=8), ckpt_path=folder / "8.ckpt",
        weights_only=True, verbose=False,
    )  # fmt: skip
    assert set(module.results) == {"val", "test"}
