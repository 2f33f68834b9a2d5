"""A run that branches off from the end of another's stage ends as the same run trained straight, bit for bit."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mmfusion import cli
from mmfusion.branch import Branch
from mmfusion.checkpoints import BestCheckpoint, LastCheckpoint, StageCheckpoints
from mmfusion.fusion import ConcatLinear, ConcatMLP, CrossAttention, FusionHead, MaskedSum, MoEBilinear
from mmfusion.losses import GradedInfoNCE, InfoNCE
from mmfusion.module import RetrievalModule
from mmfusion.stages import Group, LossWeights, Stage, Until
from mmfusion.terms import Losses
from tests.ddp import run_ranks
from tests.mmfusion.test_kill import assert_equal
from tests.small_run import ENCODERS_FROZEN, GROUPS, small_data, small_module, small_shards, small_trainer, three_stages

STEPS = 8
Make = Callable[[], RetrievalModule]


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


def moe(**options: Any) -> RetrievalModule:
    """The run that others branch off from: dropout, augmentation and modality dropout are at work."""
    return small_module(**{"dropout": 0.1, "augment": "light", "modality_dropout": 0.3, **options})


def headed(head: Callable[[int], FusionHead], **options: Any) -> RetrievalModule:
    """Another experiment: another head, modality dropout, loss and rate of the last stage."""
    stages = three_stages()
    rates: dict[str, Any] = {**ENCODERS_FROZEN, "projection": 1e-3}
    losses = LossWeights(query_product=0.7, query_image=0.3, more={"query_product_graded": 0.4})
    stages["fuse"] = Stage(Until(fraction=1.0), losses, rates, warmup=0.2, decay="linear")
    more = {"query_product_graded": GradedInfoNCE(temperature=0.2)}
    terms = Losses(query_product=InfoNCE(temperature=0.1), more=more)
    groups = GROUPS | {"fusion": Group(r"^product\.fusion\.", 5e-3)}
    return moe(
        **{"fusion": head, "modality_dropout": 0.1, "losses": terms, "stages": stages, "groups": groups} | options
    )


def concat_linear() -> RetrievalModule:
    return headed(ConcatLinear)


def concat_mlp() -> RetrievalModule:
    """Its last layer is as large as that of the first run's head, and begins elsewhere."""
    return headed(lambda dim: ConcatMLP(dim, hidden=1.5, residual=False))


def masked_sum() -> RetrievalModule:
    return headed(MaskedSum)


def cross_attention() -> RetrievalModule:
    return headed(lambda dim: CrossAttention(dim, heads=2))


def four_stages() -> RetrievalModule:
    """align in two parts, ends told in other words."""
    stages, aligned = three_stages(), three_stages()["align"]
    text = Stage(Until(fraction=0.5), LossWeights(query_text=1.0), aligned.rates)
    image = Stage(Until(steps=6), LossWeights(query_image=1.0), aligned.rates, warmup=0.0)
    adapt = Stage(Until(fraction=0.25), stages["adapt"].losses)
    return moe(stages={"adapt": adapt, "text": text, "image": image, "fuse": stages["fuse"]})


def train(
    shards: Path, folder: Path, make: Make, since: Path | None = None, branch: bool = False, **options: Any
) -> dict[str, Any]:
    """The last checkpoint of a run that keeps one at the end of each stage."""
    module = make()
    callbacks = [StageCheckpoints(folder, list(module.stages)), LastCheckpoint(folder)]
    best = [BestCheckpoint(folder)] if "limit_val_batches" in options else []
    more = [Branch(str(since))] if branch else []
    trainer = small_trainer(folder, *more, *best, *callbacks, steps=STEPS, enable_checkpointing=True, **options)
    trainer.fit(module, small_data(shards), ckpt_path=since, weights_only=True)
    assert trainer.global_step == trainer.max_steps
    return load(folder / "last.ckpt")


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def assert_same_run(got: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Weights, optimizer, schedule, place in the data and what is said of the run."""
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "course", "contract"):
        assert_equal(got[key], expected[key], key)


@pytest.fixture(scope="module")
def first(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    train(shards, folder, moe)
    return folder


@pytest.mark.parametrize(
    ("make", "stage"),
    [(concat_linear, "adapt"), (concat_mlp, "adapt"), (masked_sum, "align"), (cross_attention, "align")],
)
def test_another_head_branches_off(first, shards, tmp_path, make, stage):
    straight = train(shards, tmp_path / "straight", make)
    branched = train(shards, tmp_path / "branched", make, first / f"stage-{stage}.ckpt", branch=True)
    assert branched["branched_from"] == str(first / f"stage-{stage}.ckpt")
    assert_same_run(branched, straight)
    ends = ["align"] if stage == "adapt" else []
    for end in [*ends, "fuse"]:
        name = f"stage-{end}.ckpt"
        assert_same_run(load(tmp_path / "branched" / name), load(tmp_path / "straight" / name))


def test_other_stages_branch_off_and_off_again(first, shards, tmp_path):
    straight = train(shards, tmp_path / "straight", four_stages)
    train(shards, tmp_path / "once", four_stages, first / "stage-adapt.ckpt", branch=True)
    again = train(shards, tmp_path / "again", four_stages, tmp_path / "once" / "stage-text.ckpt", branch=True)
    assert_same_run(again, straight)


def test_a_branched_run_is_resumed_as_any(first, shards, tmp_path):
    straight = train(shards, tmp_path / "straight", cross_attention)
    train(shards, tmp_path / "run", cross_attention, first / "stage-adapt.ckpt", branch=True)
    resumed = train(shards, tmp_path / "run", cross_attention, tmp_path / "run" / "stage-align.ckpt")
    assert resumed["branched_from"] == str(first / "stage-adapt.ckpt")
    assert_same_run(resumed, straight)


def on_ranks(rank: int, world: int, shards: Path, folder: Path) -> tuple[dict, dict]:
    options = {"devices": world, "strategy": "ddp"}
    train(shards, folder / "first", moe, **options)
    straight = train(shards, folder / "straight", cross_attention, **options)
    since = folder / "first" / "stage-adapt.ckpt"
    return straight, train(shards, folder / "branched", cross_attention, since, branch=True, **options)


def test_two_ranks_branch_off(shards, tmp_path):
    for straight, branched in run_ranks(on_ranks, 2, shards, tmp_path, timeout=120):
        assert_same_run(branched, straight)


@pytest.mark.parametrize(
    ("ends", "options"),
    [
        ((3, 5), {}),  # adapt ends with an epoch
        ((3, 5), {"limit_val_batches": 1.0}),  # and a validation
        # a validation alone
        pytest.param((2, 5), {"limit_val_batches": 1.0, "val_check_interval": 2}, marks=pytest.mark.slow),
        ((2, 5), {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
    ],
)
def test_wherever_the_stage_ends(shards, tmp_path, ends, options):
    def make(head: Make) -> Make:
        return lambda: with_ends(head(), ends)

    train(shards, tmp_path / "first", make(moe), **options)
    straight = train(shards, tmp_path / "straight", make(concat_linear), **options)
    since = tmp_path / "first" / "stage-adapt.ckpt"
    assert load(since)["global_step"] == ends[0]
    assert_same_run(train(shards, tmp_path / "branched", make(concat_linear), since, branch=True, **options), straight)


def with_ends(module: RetrievalModule, ends: tuple[int, int]) -> RetrievalModule:
    for stage, end in zip(("adapt", "align"), ends, strict=True):
        module.stages[stage].until = Until(steps=end)
    return module


def stages_with(**adapt: Any) -> dict[str, Stage]:
    stages = three_stages()
    given: dict[str, Any] = {"until": stages["adapt"].until, "losses": stages["adapt"].losses, **adapt}
    return stages | {"adapt": Stage(**given)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stages": stages_with(until=Until(steps=3))}, "the end of stage adapt, in steps: .* has 2, this run 3"),
        ({"stages": stages_with(warmup=0.5)}, r"model.stages.adapt.warmup: the checkpoint has 0.05, this run 0.5"),
        (
            {"stages": stages_with(losses=LossWeights(query_text=2.0, query_image=1.0))},
            r"adapt.losses.query_text: .* has 1.0, this run 2.0\n.*text_image: the checkpoint has 0.5, .* 0.0",
        ),
        (
            {"groups": GROUPS | {"projection": Group("projection", 1e-3)}},
            "the rate of projection in stage adapt: the checkpoint has 0.002, this run 0.001",
        ),
        (
            {"stages": {"tune": three_stages()["adapt"], **three_stages(3, 6)}},
            r"until there: .*\['adapt'\].*\['tune'\]",
        ),
        ({"groups": {"scale": GROUPS["scale"], **GROUPS}}, "the order of model.groups"),
        ({"stages": {"adapt": Stage(Until(steps=8), stages_with()["adapt"].losses)}}, "nothing is left to train"),
    ],
)
def test_another_past_is_refused(first, shards, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        train(shards, tmp_path, lambda: moe(**options), first / "stage-adapt.ckpt", branch=True)
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_was_trained_is_of_the_past(shards, tmp_path):
    """Then it goes along with its optimizer state, and another one is refused by its options."""
    stages = {
        "one": Stage(Until(steps=4), LossWeights(query_product=1.0, query_text=1.0)),
        "two": three_stages()["fuse"],
    }

    def make() -> RetrievalModule:
        module = moe(stages=stages, fusion=lambda dim: MoEBilinear(dim, experts=2, rank=4))
        module.contract = {"model.fusion.experts": 2, "model.modality_dropout": 0.3}
        return module

    straight = train(shards, tmp_path / "straight", make)
    since = tmp_path / "straight" / "stage-one.ckpt"
    assert_same_run(train(shards, tmp_path / "branched", make, since, branch=True), straight)

    def other() -> RetrievalModule:
        module = make()
        module.contract |= {"model.fusion.experts": 3, "model.modality_dropout": 0.0}
        return module

    said = r"fusion.experts: the checkpoint has 2, this run 3\n.*modality_dropout: the checkpoint has 0.3, this run 0.0"
    with pytest.raises(ValueError, match=said):
        train(shards, tmp_path / "other", other, since, branch=True)


def test_a_step_within_a_stage_is_no_place_to_branch_off(first, shards, tmp_path):
    checkpoint = load(first / "stage-adapt.ckpt") | {"global_step": 3}
    torch.save(checkpoint, tmp_path / "3.ckpt")
    with pytest.raises(ValueError, match=r"is at step 3, .*adapt at step 2, align at step 5, fuse at step 8"):
        train(shards, tmp_path / "run", concat_linear, tmp_path / "3.ckpt", branch=True)
    del checkpoint["course"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match="it is of a version before --branch"):
        train(shards, tmp_path / "run", concat_linear, tmp_path / "old.ckpt", branch=True)


@pytest.fixture
def mmfusion(monkeypatch, tmp_path, capfd):
    """Trains by the command line into a folder under runs/; gives exit code and errors."""
    (tmp_path / "experiments").symlink_to(Path(__file__).parents[2] / "experiments")
    monkeypatch.chdir(tmp_path)

    def run(shards: Path, experiment: str, version: str, *more: str) -> tuple[int, str]:
        monkeypatch.setenv("MMFUSION_VERSION", version)
        given = ["train", "--exp", experiment, "--data", str(shards), *SMALL, *more]
        monkeypatch.setattr(sys, "argv", ["mmfusion", *given])
        try:
            cli.main()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 1, capfd.readouterr().err
        return 0, capfd.readouterr().err

    return run


SMALL = [
    "--data.batch_size=16", "--data.streams=4", "--data.image_size=[32, 32]", "--trainer.max_steps=10",
    "--trainer.check_val_every_n_epoch=1", "--trainer.accelerator=cpu", "--wandb.mode=disabled",
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--model.evaluation.baselines=false",
]  # fmt: skip


def test_by_the_command_line(mmfusion, shards):
    """A branched run reports as the straight one, is resumed, tells whence it comes, and runs again from the start."""
    rate = "--model.stages.fuse.rates.projection=1e-4"
    since = Path("runs/fusion_moe/first/checkpoints/stage-adapt.ckpt")
    straight, branched = Path("runs/masked_sum/straight"), Path("runs/masked_sum/branched")
    assert mmfusion(shards, "fusion_moe", "first", "--checkpoint_stages=[adapt]") == (0, "")
    checkpoints = ["before.ckpt", "best.ckpt", "last.ckpt", "stage-adapt.ckpt"]
    assert sorted(path.name for path in since.parent.iterdir()) == ["SHA256SUMS", *checkpoints]
    assert mmfusion(shards, "masked_sum", "straight", rate)[0] == 0
    code, errors = mmfusion(shards, "masked_sum", "branched", rate, f"--branch={since}", "--checkpoint_stages=[align]")
    assert code == 0, errors
    for name in ("last.ckpt", "best.ckpt"):
        assert_same_run(load(branched / "checkpoints" / name), load(straight / "checkpoints" / name))
    expected = json.loads((straight / "results.json").read_text())
    ends = branched / "checkpoints" / "stage-align.ckpt"
    for resume in (None, f"--resume={ends}"):
        if resume:
            assert mmfusion(shards, "masked_sum", "branched", rate, resume)[0] == 0
        results = json.loads((branched / "results.json").read_text())
        assert results["run"]["branched_from"] == str(since)
        assert results["test"] == expected["test"]
        assert results["val"] == expected["val"]
    assert "branched_from" not in expected["run"]
    assert yaml.safe_load((branched / "config.yaml").read_text())["branch"] is None

    others = ["--model.dim=16", "--data.epoch=pairs", "--model.losses.query_text=GradedInfoNCE"]
    code, errors = mmfusion(shards, "masked_sum", "other", f"--branch={since}", *others)
    assert code == 2
    assert "make these equal, or train it from the start:\n  data.epoch: the checkpoint has products" in errors
    assert "model.dim: the checkpoint has 128, this run 16\n  model.losses.query_text" in errors
    assert not (branched.parent / "other").exists()


def test_mistakes_at_the_command_line(mmfusion, first, shards):
    code, errors = mmfusion(shards, "fusion_moe", "first", "--checkpoint_stages=[adpt]")
    assert code == 2
    assert "--checkpoint_stages names 'adpt'; model.stages has adapt, align, fuse. Did you mean adapt?" in errors
    code, errors = mmfusion(shards, "masked_sum", "second", "--branch=nowhere.ckpt")
    assert code == 2
    assert "--branch=nowhere.ckpt is no checkpoint" in errors
    code, errors = mmfusion(shards, "masked_sum", "third", f"--branch={first / 'stage-adapt.ckpt'}")
    assert code == 2
    assert "data.batch_size: the checkpoint has None, this run 16" in errors
    assert not Path("runs").exists()
