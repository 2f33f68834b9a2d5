"""model.ema against a loop by hand: across stage switches, validations and ranks; what checkpoints hold; going on."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint

from mmfusion.ema import UNAVERAGED, WeightAverage
from mmfusion.encoders import ScratchImageEncoder
from mmfusion.feature_cache import CacheOptions
from mmfusion.fusion import MaskedSum
from mmfusion.module import RetrievalModule
from tests.ddp import run_ranks
from tests.mmfusion.test_branch import assert_same_run, headed, moe, train
from tests.small_run import small_data, small_module, small_shards, small_trainer, weights

STEPS, DECAY = 8, 0.7
module_of = partial(small_module, dropout=0.1, augment="light", modality_dropout=0.3, ema=DECAY)
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


class SaveAt(Checkpoint):
    """Saves after each step, as the run's own do: last of all callbacks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


class Watch(Callback):
    """The weights before each step and after the last, what trained then, and what validations were made with."""

    def __init__(self) -> None:
        self.weights: list[Weights] = []
        self.trained: list[set[str]] = []
        self.validated: list[tuple[int, Weights]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.weights.append(weights(pl_module))
        self.trained.append({name for name, p in pl_module.named_parameters() if p.requires_grad})

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.validated.append((trainer.global_step, weights(pl_module)))

    def on_train_end(self, trainer, pl_module):
        self.weights.append(weights(pl_module))


def by_hand(watch: Watch) -> list[Weights]:
    """The averaged model after each step, the first after none."""
    found, average, before = [watch.weights[0]], {}, set()
    for step, trained in enumerate(watch.trained):
        average = {name: average[name] if name in before else watch.weights[step][name] for name in trained}
        after = watch.weights[step + 1]
        average = {name: DECAY * value + (1 - DECAY) * after[name] for name, value in average.items()}
        found.append(after | average)
        before = trained
    return found


def fitted(shards: Path, folder: Path, *callbacks: Callback, module: Any = None, **options: Any) -> RetrievalModule:
    module = module or module_of()
    resumed = options.pop("resumed", None)
    options |= {"enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks)}
    small_trainer(folder, *callbacks, steps=STEPS, **options).fit(
        module, small_data(shards), ckpt_path=resumed, weights_only=True
    )
    return module


def check_close(found: Weights, expected: Weights) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)


def check_same(found: Weights, expected: Weights) -> None:
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def run(shards: Path, folder: Path) -> tuple[Path, Watch, Weights]:
    watch = Watch()
    return folder, watch, weights(fitted(shards, folder, watch, SaveAt(folder)))


@pytest.fixture(scope="module")
def straight(shards, tmp_path_factory) -> tuple[Path, Watch, Weights]:
    return run(shards, tmp_path_factory.mktemp("straight"))


def test_checkpoints_and_the_model_afterwards_hold_the_average_of_a_loop_by_hand(straight):
    folder, watch, after = straight
    assert len({frozenset(trained) for trained in watch.trained}) == 3  # three stages that train three sets
    expected = by_hand(watch)
    for step in range(1, STEPS + 1):
        state = torch.load(folder / f"{step}.ckpt", weights_only=True)["state_dict"]
        check_close(state, expected[step])
        shared = [state[f"{side}.encoder.network.norm.weight"] for side in ("query", "product.text")]
        assert torch.equal(*shared)
    check_close(after, expected[STEPS])
    assert any((after[name] - watch.weights[STEPS][name]).abs().max() > 1e-4 for name in after)


def test_training_itself_goes_as_without_it(straight, shards, tmp_path):
    watch = Watch()
    fitted(shards, tmp_path, watch, module=module_of(ema=None))
    check_same(straight[1].weights[STEPS], watch.weights[STEPS])


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7])
def test_going_on_is_exact_in_any_stage_and_on_its_border(straight, shards, tmp_path, step):
    folder, watch, after = straight
    again = Watch()
    module = fitted(shards, tmp_path, again, SaveAt(tmp_path), resumed=folder / f"{step}.ckpt")
    check_same(weights(module), after)
    check_same(again.weights[-1], watch.weights[STEPS])
    one, other = (torch.load(path / f"{STEPS}.ckpt", weights_only=True) for path in (folder, tmp_path))
    check_same(other[UNAVERAGED], one[UNAVERAGED])


def test_frozen_parts_are_their_weights(straight):
    """The encoder's average of the first stage is gone at the switch; the head trains on what the weights give."""
    folder, watch, _ = straight
    frozen = watch.trained[0] - watch.trained[-1]
    assert any("encoder" in name for name in frozen)
    state = torch.load(folder / f"{STEPS}.ckpt", weights_only=True)["state_dict"]
    for name in frozen:
        assert torch.equal(state[name], watch.weights[STEPS][name]), name


def both(rank: int, world: int, shards: Path, folder: Path) -> list[Weights]:
    options = {"devices": world, "strategy": "ddp"}
    watch = Watch()
    straight = weights(fitted(shards, folder, watch, SaveAt(folder), **options))
    check_close(straight, by_hand(watch)[STEPS])
    resumed = weights(fitted(shards, folder / "again", resumed=folder / "4.ckpt", **options))
    return [straight, resumed]


def test_two_ranks_have_one_average_and_go_on_exactly(shards, tmp_path):
    first, second = run_ranks(both, 2, shards, tmp_path, timeout=240)
    for other in (first[1], *second):
        check_same(other, first[0])


def validated(shards: Path, folder: Path, cache: str, **options: Any) -> tuple[Watch, list[dict], Weights]:
    class Measured(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            found.append({view: r.metrics for view, r in pl_module.results["val"].items()})

    found: list[dict] = []
    watch = Watch()
    module = module_of(cache=CacheOptions(use=cache), **options)
    options = {"limit_val_batches": 1.0, "val_check_interval": 1, "num_sanity_val_steps": 1}
    fitted(shards, folder, watch, module=module, **options)
    return watch, found, weights(module)


def test_validations_measure_the_average_and_leave_training_alone(straight, shards, tmp_path):
    watch, _, after = validated(shards, tmp_path, "off")
    expected = by_hand(watch)
    assert {step for step, _ in watch.validated} == set(range(STEPS + 1))
    for step, seen in watch.validated:
        check_close(seen, expected[step])
    check_same(after, straight[2])
    check_same(watch.weights[STEPS], straight[1].weights[STEPS])


def test_stored_outputs_are_those_of_the_evaluated_model(shards, tmp_path):
    """An encoder is stored when it freezes, and its average is its weights from then on."""
    _, stored, with_cache = validated(shards, tmp_path / "a", "auto")
    _, computed, without = validated(shards, tmp_path / "b", "off")
    assert stored == computed
    check_same(with_cache, without)


def test_an_evaluation_after_training_has_a_checkpoints_average(shards, tmp_path):
    """As a run makes it: with the trainer that trained."""
    watch, module, data = Watch(), module_of(), small_data(shards)
    trainer = small_trainer(tmp_path, watch, SaveAt(tmp_path), steps=STEPS, enable_checkpointing=True)
    trainer.fit(module, data)
    trainer.test(module, data, ckpt_path=tmp_path / "7.ckpt", weights_only=True, verbose=False)
    check_close(weights(module), by_hand(watch)[7])
    assert sum(isinstance(callback, WeightAverage) for callback in trainer.callbacks) == 1


def test_statistics_of_batchnorm_are_the_weights_own(shards, tmp_path):
    image = ScratchImageEncoder(stem=4, channels=(4, 8), blocks=(1, 1), augment="none")
    statistics: list[dict] = []

    class Buffers(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            statistics.append({name: buffer.clone() for name, buffer in pl_module.named_buffers()})

    fitted(shards, tmp_path, Buffers(), SaveAt(tmp_path), module=module_of(image=image))
    state = torch.load(tmp_path / "2.ckpt", weights_only=True)["state_dict"]
    names = [name for name in state if "running_mean" in name]
    assert names
    for name in names:
        assert torch.equal(state[name], statistics[1][name])
        assert not torch.equal(state[name], statistics[0][name])


def test_batches_that_accumulate_make_no_step(shards, tmp_path):
    watch = Watch()
    after = weights(fitted(shards, tmp_path, watch, accumulate_grad_batches=3))
    assert len(watch.trained) == STEPS
    check_close(after, by_hand(watch)[STEPS])


def test_a_run_branches_off_with_its_averages(shards, tmp_path):
    first, other = partial(moe, ema=DECAY), partial(headed, MaskedSum, ema=DECAY)
    train(shards, tmp_path / "first", first)
    straight = train(shards, tmp_path / "straight", other)
    branched = train(shards, tmp_path / "branched", other, tmp_path / "first" / "stage-adapt.ckpt", branch=True)
    assert_same_run(branched, straight)
    check_same(branched[UNAVERAGED], straight[UNAVERAGED])


class Failing(Callback):
    def on_validation_epoch_end(self, trainer, pl_module):
        raise KeyError("a bug")


def test_a_failure_amid_a_validation_gives_the_weights_back(shards, tmp_path):
    watch, module = Watch(), module_of()
    with pytest.raises(KeyError, match="a bug"):
        fitted(shards, tmp_path, watch, Failing(), module=module, limit_val_batches=1.0, val_check_interval=2)
    without = Watch()
    fitted(shards, tmp_path, without, module=module_of(ema=None))
    check_same(weights(module), without.weights[2])


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, 2.0])
def test_a_decay_that_cannot_be(decay):
    with pytest.raises(ValueError, match=r"model\.ema is .*expected a decay between 0 and 1"):
        WeightAverage(decay)
