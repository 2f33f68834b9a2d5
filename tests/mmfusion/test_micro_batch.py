"""model.micro_batch: the same run in less memory, in every stage, on one rank and on two."""

import csv
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from mmfusion.encoders import TimmEncoder
from mmfusion.feature_cache import CacheOptions
from mmfusion.fusion import CrossAttention
from mmfusion.loggers import AppendingCSVLogger
from mmfusion.stages import LossWeights, Stage, Until
from mmfusion.terms import TERM_VIEWS
from tests.ddp import run_ranks
from tests.small_run import small_data, small_module, small_shards, small_trainer, weights

ATTENTION = partial(CrossAttention, heads=2, dropout=0.0)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


@pytest.fixture
def batch(shards):
    data = small_data(shards)
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def trained(shards: Path, folder: Path, micro_batch: int | None, steps: int = 8, **options: Any) -> Any:
    module = small_module(micro_batch=micro_batch, **options)
    trainer = small_trainer(folder, precision="64-true", steps=steps, deterministic=True)
    trainer.fit(module, small_data(shards))
    return module


def check_alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, weight in one.items():
        scale = weight.abs().max().clamp(min=1e-6)  # of the tensor: a key's bias has no gradient but rounding
        assert (other[name] - weight).abs().max() / scale < tolerance, name


@pytest.mark.parametrize("fusion", [None, ATTENTION])
def test_gradients_of_all_terms_are_those_of_the_whole_batch(batch, fusion):
    found = {}
    for size in (None, 1, 3, 8):
        options = {} if fusion is None else {"fusion": fusion}
        module = small_module(micro_batch=size, modality_dropout=0.4, **options).double()
        module.query.encoder.fit(["red cup", "blue hat", "number 12 lamp", "green shoe", "yellow"])
        torch.stack(list(module.terms(batch, set(TERM_VIEWS)).values())).sum().backward()
        found[size] = {name: p.grad for name, p in module.named_parameters()}
    for size in (1, 3, 8):
        for name, gradient in found[None].items():
            scale = gradient.abs().max().clamp(min=1e-9)
            assert (found[size][name] - gradient).abs().max() / scale < 1e-12, (size, name)


@pytest.mark.parametrize("options", [{}, {"query": "copy"}, {"fusion": ATTENTION}, {"memo_gib": 0.0}])
def test_a_run_through_all_stages_ends_with_the_same_weights(shards, tmp_path, options):
    whole, parts = (trained(shards, tmp_path, size, **options) for size in (None, 5))
    check_alike(weights(whole), weights(parts), 1e-6)


class Calls(Callback):
    """How many rows an encoder has been given in each training step, and how many distinct ones."""

    def __init__(self) -> None:
        self.steps: dict[int, Counter] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.now = self.steps.setdefault(trainer.global_step, Counter())

    def on_fit_start(self, trainer, pl_module):
        pl_module.product.image.encoder.register_forward_hook(
            lambda _, args, __: self.now.update({"calls": 1, "rows": len(args[0])}) if hasattr(self, "now") else None
        )


def test_a_frozen_encoder_is_asked_once_even_where_its_memo_is_full(shards, tmp_path):
    calls = Calls()
    stages = {
        "all": Stage(Until(steps=2), LossWeights(query_image=1.0, query_product=1.0)),
        "rest": Stage(
            Until(fraction=1.0), LossWeights(query_image=1.0, query_product=1.0), {"image_encoder": "frozen"}
        ),
    }
    module = small_module(micro_batch=6, memo_gib=0.0, stages=stages, cache=CacheOptions(use="off"))
    small_trainer(tmp_path, calls, steps=4).fit(module, small_data(shards))
    assert calls.steps[0] == {"calls": 6, "rows": 32}, "16 rows, 6 at a time, twice"
    assert calls.steps[3] == {"calls": 1, "rows": 64}, "once, in the batches of the memo"


def test_dropout_runs_resume_exactly(shards, tmp_path):
    options = {"dropout": 0.1, "augment": "light", "modality_dropout": 0.3, "micro_batch": 6}

    class Save(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    straight = small_module(**options)
    small_trainer(tmp_path, Save(), steps=6).fit(straight, small_data(shards))
    for step in (1, 4):
        again = small_module(**options)
        path = tmp_path / f"{step}.ckpt"
        small_trainer(tmp_path, steps=6).fit(again, small_data(shards), ckpt_path=path, weights_only=True)
        expected = weights(straight)
        assert [n for n, weight in weights(again).items() if not torch.equal(weight, expected[n])] == []


@pytest.mark.parametrize("norm", ["mobilenetv3_small_050"])
def test_batch_norm_counts_each_micro_batch_once(shards, tmp_path, norm):
    image = TimmEncoder(norm, augment="none")
    stages = {"all": Stage(Until(fraction=1.0), LossWeights(query_image=1.0))}
    module = small_module(image=image, stages=stages, micro_batch=8)
    small_trainer(tmp_path, steps=3).fit(module, small_data(shards))
    counts = {int(b) for name, b in image.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {2 * 3}
    assert {m.momentum for m in image.modules() if hasattr(m, "momentum")} == {0.1}


def test_gates_and_terms_are_logged_once_and_right(shards, tmp_path):
    found = []
    for size in (None, 6):
        logger = AppendingCSVLogger(tmp_path, name="exp", version=str(size))
        module = small_module(micro_batch=size, modality_dropout=0.3)
        small_trainer(tmp_path, logger=logger, log_every_n_steps=2).fit(module, small_data(shards))
        with (tmp_path / f"exp/{size}/metrics.csv").open() as file:
            found.append([row for row in csv.DictReader(file) if row["train/loss"]])
    assert "gates/expert_0/std" in found[0][0]
    assert [row["step"] for row in found[0]] == [row["step"] for row in found[1]]
    for one, other in zip(*found, strict=True):
        for name, value in one.items():
            assert bool(value) == bool(other[name]), name
            if value:
                assert float(other[name]) == pytest.approx(float(value), rel=2e-3, abs=1e-5), name


def test_accumulated_steps_end_with_the_same_weights(shards, tmp_path):
    found = []
    for size, accumulate in ((None, 2), (6, 2), (6, 1)):
        module = small_module(micro_batch=size)
        trainer = small_trainer(
            tmp_path, precision="64-true", max_epochs=-1, accumulate_grad_batches=accumulate, deterministic=True
        )
        trainer.fit(module, small_data(shards))
        assert (trainer.global_step, module.stage_name) == (8, "fuse")
        found.append(weights(module))
    check_alike(found[0], found[1], 1e-6)
    with pytest.raises(AssertionError):
        check_alike(found[0], found[2], 1e-6)


class Gradients(Callback):
    """Those of the first step, as the optimizer gets them."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        parameters = pl_module.named_parameters()
        self.found = {name: p.grad.double().clone() for name, p in parameters if p.grad is not None}


def first_gradients(
    shards: Path, folder: Path, size: int | None, precision: str = "bf16-mixed", **options: Any
) -> dict[str, torch.Tensor]:
    """Of all terms at once. The tensors are not too small for their relative differences to be of use."""
    gradients = Gradients()
    stages = {"all": Stage(Until(fraction=1.0), LossWeights(**dict.fromkeys(TERM_VIEWS, 1.0)))}
    trainer = small_trainer(folder, gradients, steps=1, precision=precision, deterministic=True, **options)
    trainer.fit(small_module(micro_batch=size, stages=stages, memo_gib=0.0), small_data(shards))
    return gradients.found


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Relative, of all gradients together: those of single tensors may be nothing but rounding."""
    assert one.keys() == other.keys()
    apart = torch.stack([(one[name] - other[name]).square().sum() for name in one]).sum()
    return float((apart / torch.stack([gradient.square().sum() for gradient in one.values()]).sum()).sqrt())


@pytest.fixture(scope="module")
def whole_gradients(shards, tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """Of the whole batch at once on one rank, by precision."""
    folder = tmp_path_factory.mktemp("whole")
    return {name: first_gradients(shards, folder, None, name) for name in ("bf16-mixed", "64-true")}


@pytest.mark.parametrize("size", [1, 6, 8])
def test_gradients_in_bf16_are_as_near_as_bf16_allows(shards, tmp_path, whole_gradients, size):
    """Those of the whole batch, but for rounding: both are as far from the gradients in float64."""
    parts, exact = first_gradients(shards, tmp_path, size), whole_gradients["64-true"]
    rounding = distance(exact, whole_gradients["bf16-mixed"])
    assert 1e-4 < rounding < 0.1, "bf16 is at work, and the task is not lost in it"
    assert distance(exact, parts) < 1.5 * rounding
    assert distance(whole_gradients["bf16-mixed"], parts) < rounding


@pytest.mark.slow
@pytest.mark.parametrize("size", [8, 6])
def test_compiled_parts_run_in_micro_batches_too(shards, tmp_path, size):
    """Also where the last micro-batch is smaller, so that the parts are compiled for another shape in between."""
    plain, compiled = trained(shards, tmp_path, None), trained(shards, tmp_path, size, compile="aot_eager")
    check_alike(weights(plain), weights(compiled), 1e-6)


class Rounds(Callback):
    """How often DDP reduced a step's last bucket."""

    def __init__(self) -> None:
        self.of_step: Counter = Counter()
        self.hooked: Any = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.step = trainer.global_step
        if self.hooked is not trainer.strategy.model:  # a stage wraps the module anew
            self.hooked = trainer.strategy.model
            self.hooked.register_comm_hook(None, self.counted)

    def counted(self, state: Any, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.of_step[self.step] += bucket.is_last()
        return allreduce_hook(None, bucket)


def on_ranks(rank: int, world: int, shards: Path, folder: Path, size: int | None) -> dict[str, Any]:
    module, rounds = small_module(micro_batch=size, modality_dropout=0.3), Rounds()
    trainer = small_trainer(folder, rounds, devices=world, strategy="ddp", precision="64-true", deterministic=True)
    trainer.fit(module, small_data(shards))
    return {"weights": weights(module), "rounds": dict(rounds.of_step)}


def test_two_ranks_end_with_the_weights_of_one_process(shards, tmp_path):
    alone = weights(trained(shards, tmp_path, None, modality_dropout=0.3))
    first, second = run_ranks(on_ranks, 2, shards, tmp_path, 3)
    check_alike(alone, first["weights"], 1e-6)
    assert all(torch.equal(weight, second["weights"][name]) for name, weight in first["weights"].items())
    assert first["rounds"] == dict.fromkeys(range(8), 1), "one reduction per step"


def gradients_on_ranks(rank: int, world: int, shards: Path, folder: Path) -> dict[str, torch.Tensor]:
    return first_gradients(shards, folder, 3, devices=world, strategy="ddp")


def test_two_ranks_in_bf16_and_in_parts_have_the_gradients_of_one_process(shards, tmp_path, whole_gradients):
    first, second = run_ranks(gradients_on_ranks, 2, shards, tmp_path)
    assert all(torch.equal(gradient, second[name]) for name, gradient in first.items())
    rounding = distance(whole_gradients["64-true"], whole_gradients["bf16-mixed"])
    assert distance(whole_gradients["64-true"], first) < 1.5 * rounding


def test_no_micro_batch_is_refused():
    with pytest.raises(ValueError, match=r"model.micro_batch is 0; expected at least 1 row"):
        small_module(micro_batch=0)
